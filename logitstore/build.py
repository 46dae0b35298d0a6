"""Build a store: dataset and teacher in, shards out. Reads from top to bottom.

What is finished stays: every teacher batch is journalled, so a build that was killed goes on where it was, and one that
is finished computes nothing when it is run again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from logitstore.documents import read_documents
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError
from logitstore.journal import WRITE_BACK, ShardWriter, commit_leftovers
from logitstore.manifest import Manifest
from logitstore.plan import Part, plan_batches, plan_shards, unique
from logitstore.selection import Selection
from logitstore.sequences import TokenizeReport, read_sequences, require_ids_below
from logitstore.teacher import Teacher
from logitstore.zarr_store import ZarrStore


@dataclass(frozen=True)
class BuildConfig:
    """What `logitstore build` takes; the names are its flags."""

    teacher: str
    dataset: str
    out: Path
    adapter_path: str | None = None
    split: str = "train"
    select: str = "threshold:16"
    temperature: float = 1.0
    max_length: int = 2048
    batch_tokens: int = 2048
    limit: int | None = None
    seed: int = 0
    shard: str = "1/1"
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ConfigError: naming the flag.
        """
        Selection.parse(self.select)
        Part.parse(self.shard)
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature:g} is not a number above 0; type --temperature 1")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}, expected at least 1; type --batch-tokens 2048")
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}, expected at least 2: one token to read and one to predict; "
                "type --max-length 2048"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit is {self.limit}, expected at least 1; type --limit 100, or leave it out to read all"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed is {self.seed}, expected 0 to 2^64 - 1; type --seed 0")


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    tokenized: TokenizeReport
    computed_documents: int
    computed_positions: int
    """Positions that the teacher was run for."""
    elapsed_s: float
    """Time in the teacher, selection, codec and disk; loading and tokenising apart."""
    store_documents: int
    store_positions: int
    disk_bytes: int

    @property
    def positions_per_second(self) -> float:
        """Positions written per second of the build proper."""
        return self.computed_positions / self.elapsed_s if self.elapsed_s else 0.0


def build(config: BuildConfig, say: Callable[[str], None] = lambda _line: None) -> BuildReport:
    """Build, extend or finish a store.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`; nothing that was finished is lost.
    """
    selection, part = Selection.parse(config.select), Part.parse(config.shard)
    if config.out.exists():
        ZarrStore(config.out)  # not a store, or a damaged one: say so before a teacher is loaded
    rows = read_documents(config.dataset, split=config.split, limit=config.limit)
    teacher = Teacher(config.teacher, config.adapter_path, quiet=config.quiet)
    report = TokenizeReport()
    documents = unique(read_sequences(rows, teacher.tokenizer, config.max_length, report, quiet=config.quiet))
    say(report.describe("--max-length", len(documents)))
    require_ids_below(teacher.vocab_size, documents.values(), f"teacher {teacher.loaded.name}")
    manifest = teacher.manifest(selection, config.temperature, config.seed)

    store = open_or_create(config.out, manifest, teacher)
    commit_leftovers(store, WRITE_BACK)
    todo = {key: s for key, s in documents.items() if part.holds(key) and key not in store}
    with ShardWriter(store, f"build-{part.index}-of-{part.count}") as writer:
        missing = {key: s for key, s in todo.items() if key not in writer}
        if len(missing) < len(documents):
            others = len(documents) - len(missing)
            say(f"{others:,} documents are already there, or another part's; {len(missing):,} to do")
        positions = sum(len(s.trained) for s in missing.values())
        started = time.perf_counter()
        if stale := [key for key in writer.pending if key not in todo]:
            writer.commit(stale)  # the dataset was edited since; the teacher's answers are true all the same
        with tqdm(total=positions, unit="tok", desc="teacher", disable=config.quiet or not missing) as bar:
            for shard in plan_shards(todo):
                rest = {key: todo[key] for key in shard if key not in writer}
                for batch in plan_batches(rest, config.batch_tokens):
                    writer.append(teacher.records([rest[key].token_ids for key in batch], manifest.recipe))
                    bar.update(sum(len(rest[key].trained) for key in batch))
                writer.commit(shard)
    return BuildReport(
        tokenized=report,
        computed_documents=len(missing),
        computed_positions=positions,
        elapsed_s=time.perf_counter() - started,
        store_documents=len(store),
        store_positions=store.positions,
        disk_bytes=store.disk_bytes,
    )


def open_or_create(path: Path, manifest: Manifest, teacher: Teacher) -> ZarrStore:
    """Open the store at `path` if it may be extended by this teacher, or begin it.

    Raises:
        IncompatibleStoreError: it was built by another teacher, tokenizer or recipe.
        StoreWriteError: the place cannot be written.
        ConfigError: it lies inside another store.
    """
    require_outside_stores(path)
    store = ZarrStore(path) if path.exists() else ZarrStore.create(path, manifest, teacher.vocabulary)
    store.manifest.require_compatible(manifest, path)
    return store
