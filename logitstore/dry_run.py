"""What a build would cost, measured on a few of its own documents before anything is written."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from logitstore.build import BuildConfig, documents_of, manifest_of, survey_of
from logitstore.key import document_key
from logitstore.plan import Part, plan_batches, shard_positions, window_count
from logitstore.sealed import GROUP
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.zarr_store import ZarrStore

PROBE_TOKENS = 512
PROBE_DOCUMENTS = 64


@dataclass(frozen=True)
class Estimate:
    """The cost of a build; bytes and seconds are extrapolated from a probe."""

    documents: int
    positions: int
    probed_positions: int
    disk_bytes: float
    elapsed_s: float


def estimate(config: BuildConfig, say: Callable[[str], None] = lambda _line: None) -> Estimate:
    """Run the teacher over about PROBE_TOKENS tokens of what is to do, and write the answers to a throw-away store.

    Args:
        say: takes one line of text at a time for the user: what there is and what is to do, before the teacher reads.

    Raises:
        LogitstoreError: whatever `build` would raise before it starts.
    """
    part = Part.parse(config.shard)
    there = open_store(config.out) if config.out.exists() else None
    rows = documents_of(config)
    teacher = Teacher(config.teacher, config.adapter_path, quiet=config.quiet)
    recipe = config.recipe_of(teacher)
    survey = survey_of(config, rows, teacher)
    manifest = manifest_of(config, teacher)
    if there is not None:
        there.manifest.require_compatible(manifest, config.out)
        say(f"{len(there):,} documents are already there")
    else:
        say(survey.report.describe(len(survey.keys)))
    todo = survey.to_do(part, there)
    if recipe.hidden_layers:
        say(recipe.hidden_cost)
    if not todo.size:
        say("nothing to do")
        return Estimate(0, 0, 0, 0.0, 0.0)
    positions = int(survey.positions[todo].sum())
    say(f"to do: {len(todo):,} documents, {positions:,} positions")

    documents = _some_documents(config, teacher, {survey.keys[i].tobytes() for i in todo[:PROBE_DOCUMENTS]})
    batches = plan_batches(documents, min(config.batch_tokens, PROBE_TOKENS))
    probe = [documents[key].token_ids[:PROBE_TOKENS] for key in batches[len(batches) // 2]]
    teacher.records([probe[0][:8]], manifest.recipe)  # the first call pays for set-up
    started = time.perf_counter()
    records = teacher.records(probe, manifest.recipe)
    elapsed_s = time.perf_counter() - started
    probed = sum(len(record.records) for record in records)
    with tempfile.TemporaryDirectory() as folder:
        store = ZarrStore.create(Path(folder) / "probe.zarr", manifest, teacher.vocabulary)
        empty_bytes = store.disk_bytes
        store.write_documents(records)
        store.save_index()
        # A shard's metadata, and the index's, is as large for few positions as for many.
        shard_bytes, index_bytes = (
            sum(file.stat().st_size for file in store.folder.glob(f"{where}/{GROUP}"))
            for where in ("shards/*/**", "index/**")
        )
        bytes_per_position = (store.disk_bytes - empty_bytes - shard_bytes - index_bytes) / probed
    return Estimate(
        documents=len(todo),
        positions=positions,
        probed_positions=probed,
        disk_bytes=bytes_per_position * positions
        + shard_bytes * window_count(survey.positions[todo].tolist(), shard_positions(recipe))
        + (empty_bytes + index_bytes if there is None else 0),
        elapsed_s=elapsed_s * positions / probed,
    )


def _some_documents(config: BuildConfig, teacher: Teacher, keys: set[bytes]) -> dict[bytes, TokenSequence]:
    """The documents with these keys, tokenised once more."""
    found: dict[bytes, TokenSequence] = {}
    for sequence in tokenize(documents_of(config), teacher.tokenizer, config.max_seq_length):
        key = document_key(sequence.token_ids)
        if key in keys:
            found[key] = sequence
        if len(found) == len(keys):
            break
    return found
