"""Repair a store in a folder: what is damaged goes out of the way, and its documents are computed again, or named.

Documents of damaged shards that can still be told (`quarantine`) are asked of the teacher again. What comes next is
read from the disk each time, so a kill at any moment loses nothing: the same command goes on, and one with a teacher
goes on where one without has stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from logitstore.contract import Store
from logitstore.documents import read_documents
from logitstore.durable import cannot_write
from logitstore.entries import read_root
from logitstore.errors import ConfigError, CorruptStoreError
from logitstore.files import LocalFiles
from logitstore.fill import Answering, fill
from logitstore.gc import remove_index
from logitstore.journal import commit_leftovers
from logitstore.manifest import Manifest
from logitstore.plan import shard_positions, windows
from logitstore.prompts import prompted
from logitstore.quarantine import Lost, put_aside
from logitstore.recipe import Recipe
from logitstore.saved_maps import is_map_folder, remove_map
from logitstore.sealed import Problem
from logitstore.sequences import TokenSequence, require_ids_below, tokenize
from logitstore.store import open_store
from logitstore.stored_index import FOLDER
from logitstore.verify import STRAY, verify
from logitstore.zarr_store import ZarrStore

WRITER = "repair"
GONE = "is gone"
SHOWN = 20


class RepairTeacher(Answering, Protocol):
    """What is asked again; see `teacher.Teacher`."""

    tokenizer: Any
    vocab_size: int

    def manifest(self, recipe: Recipe) -> Manifest: ...


@dataclass
class RepairReport:
    """What was done."""

    quarantined: list[str] = field(default_factory=list)
    """Where the shards lie now that were damaged, from the store."""
    mended: list[str] = field(default_factory=list)
    """What else was done, a line each."""
    recomputed: int = 0
    """Documents that the teacher was asked for again."""
    misses: list[str] = field(default_factory=list)
    """Keys, in hex, of documents of quarantined shards that the store has no more."""
    unnamed: int = 0
    """Quarantined shards that do not tell which documents they held."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))

    def to_text(self) -> str:
        """A line for each thing, for people."""
        lines = [f"quarantined as {name}" for name in self.quarantined] + self.mended
        if self.recomputed:
            lines.append(f"computed {self.recomputed:,} documents again")
        if self.misses:
            lines.append(f"{len(self.misses):,} documents became misses, by key:")
            lines += self.misses[:SHOWN]
            if len(self.misses) > SHOWN:
                lines.append(f"and {len(self.misses) - SHOWN:,} more; --json names all")
        if self.unnamed:
            lines.append(f"{self.unnamed:,} quarantined shard(s) do not tell which documents they held")
        if self.misses or self.unnamed:
            lines.append("to compute them, type --repair --teacher T --dataset D, or the build command again")
        return "".join(f"{line}\n" for line in lines)


def repair(
    path: Path,
    teacher: RepairTeacher | None = None,
    *,
    dataset: str | None = None,
    split: str = "train",
    max_seq_length: int = 2048,
    batch_tokens: int = 2048,
    quiet: bool = False,
) -> RepairReport:
    """Make a store whole again, as far as that goes.

    Args:
        teacher: the one that built the store; without it, documents of damaged shards become misses.
        dataset: whence documents are taken that the damaged shards only name by their keys. Of shards that do not even
            do that, every document of it that the store lacks.

    Raises:
        ConfigError: no folder.
        CorruptStoreError: the root is damaged, which says what the store is.
        IncompatibleStoreError: another teacher.
        StoreWriteError: full disk or no permission.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder, and only folders can be repaired; restore the file, or build it again")
    root = read_root(LocalFiles(path), path)
    problems = verify(path, quiet=quiet).problems
    for problem in problems:
        if problem.file in root.files:
            raise CorruptStoreError(
                f"{path}/{problem.file} {problem.fault}: it says what the store is, and cannot be repaired; restore "
                "the file, or build the store again"
            )
    if teacher is not None:
        root.manifest.require_teacher(teacher.manifest(root.manifest.recipe), path)
    report = RepairReport()
    try:
        _clear_away(path, problems, report)
    except OSError as error:
        raise cannot_write(path, error) from error
    store = open_store(path)
    assert isinstance(store, ZarrStore)
    lost = Lost(store)
    if teacher is None or not (lost.keys or lost.unnamed):
        commit_leftovers(store, WRITER)  # what an interrupted repair has left
    else:
        _recompute(store, lost, teacher, dataset, split, max_seq_length, batch_tokens, report, quiet=quiet)
    store.save_index()
    report.misses = [key.hex() for key in lost.keys if key not in store]
    report.unnamed = lost.unnamed
    return report


def _clear_away(path: Path, problems: list[Problem], report: RepairReport) -> None:
    """Move and remove what is damaged: the index first, which names the shards."""
    faults: dict[str, set[str]] = {}
    strays: list[str] = []
    maps: set[str] = set()
    index = gone = False
    for problem in problems:
        match problem.file.split("/"):
            case ["shards", name, _, *_] if problem.fault == STRAY:
                strays.append(problem.file)
            case ["shards", name, *_] if not problem.fault.startswith(GONE) and problem.fault != STRAY:
                faults.setdefault(name, set()).add(problem.fault)
            case ["shards", name] if problem.fault.startswith(GONE):
                report.mended.append(
                    f"{problem.file} is gone: its documents are misses, or their shard must be restored"
                )
                gone = True
            case [folder, *_] if folder == FOLDER and problem.fault != STRAY:
                index = True
            case ["fidelity", *_] if problem.fault != STRAY:
                (path / problem.file).unlink(missing_ok=True)
                report.mended.append(
                    "the measured fidelity was damaged and is removed; `logitstore build` measures again"
                )
            case [folder, *_] if is_map_folder(folder) and problem.fault != STRAY:
                maps.add(folder)
    for folder in sorted(maps):
        remove_map(path, folder)
        report.mended.append(f"{folder} was damaged and is removed; `logitstore vocab-map` computes it again")
    if index or gone or faults:
        remove_index(path)
    if index:
        report.mended.append("the index was damaged and is written again")
    for name in sorted(faults):
        report.quarantined.append(put_aside(path, f"shards/{name}"))
    for file in sorted(strays):
        if (path / file).exists() and file.split("/")[1] not in faults:
            moved = put_aside(path, file, "shards", file.replace("/", "-").removeprefix("shards-"))
            report.mended.append(f"{file} is no part of its shard, and lies in {moved} now")


def _recompute(
    store: Store,
    lost: Lost,
    teacher: RepairTeacher,
    dataset: str | None,
    split: str,
    max_seq_length: int,
    batch_tokens: int,
    report: RepairReport,
    *,
    quiet: bool,
) -> None:
    recipe, before = store.manifest.recipe, len(store)
    given: Iterator[TokenSequence] = iter(())
    if dataset is not None:
        rows = prompted(read_documents(dataset, split=split), store.manifest.prompt_template)
        given = tokenize(rows, teacher.tokenizer, max_seq_length)

    def checked() -> Iterator[TokenSequence]:
        for sequence in chain(lost.sequences(), given):
            require_ids_below(teacher.vocab_size, [sequence], "teacher")
            yield sequence

    def wanted(key: bytes) -> bool:
        return key not in store and (key in lost.keys or lost.unnamed > 0)

    with (
        store.writer(WRITER) as writer,
        tqdm(total=lost.positions, unit="tok", desc="teacher", disable=quiet) as bar,
    ):
        fill(windows(checked(), wanted, shard_positions(recipe)), teacher, recipe, writer, batch_tokens, bar.update)
        writer.commit(list(writer.pending))
    report.recomputed = len(store) - before
