"""Repair a store in a folder: what is damaged goes out of the way, and its documents are computed again, or named.

A damaged shard is moved to `shards/.quarantine-NAME`, never deleted. Its documents that can still be told, by tokens
that have the hash they are stored under, are asked of the teacher again. What comes next is read from the disk each
time, so a kill at any moment loses nothing: the same command goes on, and one with a teacher goes on where one without
has stopped.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.chunks import unpack
from logitstore.contract import Store
from logitstore.documents import read_documents
from logitstore.durable import cannot_write, sync
from logitstore.entries import read_root
from logitstore.errors import ConfigError, CorruptStoreError
from logitstore.files import LocalFiles
from logitstore.fill import Answering, fill
from logitstore.gc import QUARANTINE, remove_index
from logitstore.journal import commit_leftovers
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.plan import shard_positions, windows
from logitstore.prompts import prompted
from logitstore.recipe import Recipe
from logitstore.saved_maps import is_map_folder, remove_map
from logitstore.sealed import GROUP, Problem, seal_group
from logitstore.sequences import TokenSequence, require_ids_below, tokenize
from logitstore.shard import DOCUMENT_BYTES, Shard
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
        _put_aside(path, problems, report)
    except OSError as error:
        raise cannot_write(path, error) from error
    store = open_store(path)
    assert isinstance(store, ZarrStore)
    lost = _Lost(store)
    if teacher is None or not (lost.keys or lost.unnamed):
        commit_leftovers(store, WRITER)  # what an interrupted repair has left
    else:
        _recompute(store, lost, teacher, dataset, split, max_seq_length, batch_tokens, report, quiet=quiet)
    store.save_index()
    report.misses = [key.hex() for key in lost.keys if key not in store]
    report.unnamed = lost.unnamed
    return report


def _put_aside(path: Path, problems: list[Problem], report: RepairReport) -> None:
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
        report.quarantined.append(_quarantine(path, f"shards/{name}"))
    for file in sorted(strays):
        if (path / file).exists() and file.split("/")[1] not in faults:
            moved = _quarantine(path, file, "shards", file.replace("/", "-").removeprefix("shards-"))
            report.mended.append(f"{file} is no part of its shard, and lies in {moved} now")


def put_shards_aside(path: Path, token_ids: npt.NDArray[np.integer]) -> list[str]:
    """Move what keeps a store from answering a document out of the way: shards that do not tell what they hold, and
    damaged ones that hold it. The index is written again. Where the shards lie then.

    Raises:
        CorruptStoreError: the root or the vocabulary is damaged.
        StoreWriteError: no permission.
    """
    files, moved = LocalFiles(path), []
    recipe = read_root(files, path).manifest.recipe
    try:
        remove_index(path)
        for name in sorted(files.folders("shards")):
            try:
                _ = Shard(files, name, recipe).blocks  # and what they are counted by
            except CorruptStoreError:
                moved.append(_quarantine(path, f"shards/{name}"))
        while True:
            store = ZarrStore(LocalFiles(path), path)
            try:
                store.answer(token_ids)
            except CorruptStoreError:
                place = store.catalog.locate(token_ids)
                if place is None:
                    raise
                moved.append(_quarantine(path, f"shards/{place[0].name}"))
            else:
                store.save_index()
                return moved
    except OSError as error:
        raise cannot_write(path, error) from error


def _quarantine(path: Path, file: str, folder: str = "shards", name: str = "") -> str:
    """Move a shard, or a file out of one, to a name that no reader looks at; where it lies then, from the store."""
    name = f"{folder}/{QUARANTINE}{name or Path(file).name}"
    count, free = 1, name
    while (path / free).exists():
        count += 1
        free = f"{name}-{count}"
    (path / file).rename(path / free)
    sync(path / folder)
    return free


class _Lost:
    """Documents of quarantined shards that the store lacks."""

    def __init__(self, store: ZarrStore) -> None:
        self._store = store
        self._folder = store.folder
        self.keys: dict[bytes, None] = {}
        """In the order of the shards."""
        self.positions = 0
        """Of those of which the tokens can be read."""
        self.unnamed = 0
        for shard in self._shards():
            if shard is None:
                self.unnamed += 1
                continue
            for number, key in enumerate(shard.keys):
                if key.tobytes() not in store:
                    self.keys[key.tobytes()] = None
                    self.positions += int(shard.lengths[number]) - 1

    def sequences(self) -> Iterator[TokenSequence]:
        """Those whose tokens can be read: they have the hash that they are stored under."""
        for shard in self._shards():
            for number, key in enumerate(() if shard is None else shard.keys):
                if key.tobytes() not in self.keys:
                    continue
                assert shard is not None
                with suppress(CorruptStoreError):
                    token_ids = shard.token_ids(number)
                    if document_key(token_ids) == key.tobytes():
                        yield TokenSequence(token_ids, np.ones(len(token_ids) - 1, np.bool_), shard.where, 0)

    def _shards(self) -> Iterator[Shard | None]:
        """Quarantined shards; None for one whose documents cannot be told."""
        for folder in sorted((self._folder / "shards").glob(f"{QUARANTINE}*")):
            if not folder.is_dir() or _belongs_elsewhere(folder, self._store.manifest):
                continue
            try:
                files = _Readable(self._folder, f"shards/{folder.name}", self._store.manifest.fingerprint)
                shard = Shard(files, folder.name, self._store.manifest.recipe, checked=True)
                _ = shard.lengths
                yield shard
            except (OSError, ValueError, CorruptStoreError):
                yield None


class _Readable(LocalFiles):
    """A damaged shard's files, with an entry that says what its documents say: what of them is true, the keys tell."""

    def __init__(self, root: Path, where: str, fingerprint: str) -> None:
        super().__init__(root)
        file = f"{where}/documents/c/0/0"
        rows = unpack(self.read(file), 2 * self.size(file), at_most=True).reshape(-1, DOCUMENT_BYTES)
        lengths = np.ascontiguousarray(rows[:, -8:-4]).view("<u4").astype(np.int64)
        entry = {"documents": len(rows), "positions": int((lengths - 1).sum()), "fingerprint": fingerprint, "files": {}}
        self._entry, self._sealed = f"{where}/{GROUP}", seal_group(entry)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Files`."""
        return self._sealed if name == getattr(self, "_entry", None) else super().read(name, start, stop)


def _belongs_elsewhere(shard: Path, manifest: Manifest) -> bool:
    """Whether a shard says that it is another store's: its documents were never here."""
    try:
        found = json.loads((shard / GROUP).read_bytes())["attributes"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(found != manifest.fingerprint)


def _recompute(
    store: Store,
    lost: _Lost,
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
