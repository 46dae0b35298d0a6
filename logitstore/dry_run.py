"""What a build would cost, measured on a few of its own documents before anything is written."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from logitstore.build import BuildConfig
from logitstore.documents import read_documents
from logitstore.plan import Part, plan_batches, plan_shards, unique
from logitstore.sealed import GROUP
from logitstore.selection import Selection
from logitstore.sequences import TokenizeReport, read_sequences, require_ids_below
from logitstore.teacher import Teacher
from logitstore.zarr_store import ZarrStore

PROBE_TOKENS = 512


@dataclass(frozen=True)
class Estimate:
    """The cost of a build; bytes and seconds are extrapolated from a probe."""

    summary: str
    documents: int
    positions: int
    probed_positions: int
    disk_bytes: float
    elapsed_s: float


def estimate(config: BuildConfig) -> Estimate:
    """Run the teacher over about PROBE_TOKENS tokens of what is to do, and write the answers to a throw-away store.

    Raises:
        LogitstoreError: whatever `build` would raise before it starts.
    """
    part = Part.parse(config.shard)
    there = ZarrStore(config.out) if config.out.exists() else None
    rows = read_documents(config.dataset, split=config.split, limit=config.limit)
    teacher = Teacher(config.teacher, config.adapter_path, quiet=config.quiet)
    report = TokenizeReport()
    every = unique(read_sequences(rows, teacher.tokenizer, config.max_length, report, quiet=config.quiet))
    summary = report.describe("--max-length", len(every))
    require_ids_below(teacher.vocab_size, every.values(), f"teacher {teacher.loaded.name}")
    documents = {key: s for key, s in every.items() if part.holds(key)}
    manifest = teacher.manifest(Selection.parse(config.select), config.temperature, config.seed)
    if there is not None:
        there.manifest.require_compatible(manifest, config.out)
        documents = {key: s for key, s in documents.items() if key not in there}
        summary = f"{len(there):,} documents are already there"
    positions = sum(len(s.trained) for s in documents.values())
    if not documents:
        return Estimate(summary, 0, 0, 0, 0.0, 0.0)

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
        store.write_shard(records)
        # A shard's metadata is as large for few positions as for many.
        metadata_bytes = sum(file.stat().st_size for file in store.path.glob(f"shards/*/**/{GROUP}"))
        bytes_per_position = (store.disk_bytes - empty_bytes - metadata_bytes) / probed
    return Estimate(
        summary=summary,
        documents=len(documents),
        positions=positions,
        probed_positions=probed,
        disk_bytes=bytes_per_position * positions
        + metadata_bytes * len(plan_shards(documents))
        + (empty_bytes if there is None else 0),
        elapsed_s=elapsed_s * positions / probed,
    )
