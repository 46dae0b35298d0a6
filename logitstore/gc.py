"""Remove what no reader of a store needs: what killed writers left, and shards whose documents are all elsewhere too.

What a running writer holds is known by its lock, and left alone. Never removed: documents that are not in a shard yet
(the writer's own command goes on with them), quarantined shards, and files that are no part of the store, which
`verify` names.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path

from logitstore.contract import Store
from logitstore.durable import alone_in, begun_beside, cannot_write
from logitstore.errors import ConfigError
from logitstore.incoming import FOLDER as INCOMING
from logitstore.incoming import LOCK, age_s
from logitstore.journal import journals, leftovers, open_locked
from logitstore.sealed import file_problems
from logitstore.store import open_store
from logitstore.stored_index import FOLDER
from logitstore.target_store import unzipped
from logitstore.zarr_store import ZarrStore
from logitstore.zip_store import ZIP_SUFFIX

QUARANTINE = ".quarantine-"
"""How the name of a shard begins that `repair` has moved out of the way."""
SETTLED_S = 60.0
"""A file that is written in a moment, and under no lock, is left over when it is older."""


@dataclass(frozen=True)
class Leftover:
    """Something that may go, or must stay."""

    path: Path
    size_bytes: int
    why: str


@dataclass(frozen=True)
class GcReport:
    """What was removed, or would be; and what was left alone though it is no part of the store."""

    removed: list[Leftover]
    kept: list[Leftover]

    @property
    def freed_bytes(self) -> int:
        """Bytes of what was removed."""
        return sum(leftover.size_bytes for leftover in self.removed)


def gc(path: Path, *, dry_run: bool = False) -> GcReport:
    """Remove what no reader of a store needs; with `dry_run`, only tell.

    Raises:
        ConfigError: a store behind a URL.
        StoreError: there is no store, or a damaged one: `verify --repair` comes first.
        StoreWriteError: no permission.
    """
    store = open_store(path)
    if not isinstance(store.path, Path):
        raise ConfigError(f"{path} can only be read; type the path of a folder or a file")
    report = GcReport([], [])

    def take(found: Path, why: str, lock: Path | None = None, keep: Callable[[], str] = lambda: "") -> None:
        """Remove something, unless its owner lives, or `keep` gives a reason to leave it."""
        try:
            size_bytes = _size(found)
        except FileNotFoundError:
            return  # its owner has finished meanwhile
        with _held(lock, dry_run=dry_run) as mine:
            kept = keep() if mine else "a running writer holds it"
            if not kept and not dry_run:
                _remove(found)
        (report.kept if kept else report.removed).append(Leftover(found, size_bytes, kept or why))

    try:
        if isinstance(store, ZarrStore) and path.is_dir():
            _folder(store, store.folder, take)
            _repeated(store, store.folder, take, dry_run=dry_run)
        _beside(store.path, take)
    except OSError as error:
        raise cannot_write(path, error) from error
    return report


Take = Callable[..., None]


def _folder(store: ZarrStore, folder: Path, take: Take) -> None:
    """What writers have left inside a store's folder."""
    with alone_in(folder / "shards"):  # so none is being removed by another `gc`
        for left in sorted((folder / "shards").glob(".partial-*")):
            writer = left.name.removeprefix(".partial-")
            take(left, "a shard that a killed writer had not finished", folder / f".journal-{writer}")
    for quarantined in sorted((folder / "shards").glob(f"{QUARANTINE}*")):
        take(quarantined, "", keep=lambda: "a damaged shard, quarantined; delete it by hand when it is not needed")
    for journal in journals(folder):
        take(journal, "a journal of documents that are all in shards", journal, partial(_why_pending, journal, store))
    with alone_in(folder):  # so no index is being written
        for left in sorted(folder.glob(".partial-*")):
            take(left, "an index or a vocabulary map that a killed writer had not finished")
    incoming = folder / INCOMING
    if incoming.exists():
        moving = lambda: "" if age_s(incoming) > SETTLED_S else "a store is being moved here"  # noqa: E731
        take(incoming, "parts that a stopped pull or upload has left", incoming / LOCK, moving)
    for left in sorted((folder / "fidelity").glob(".partial-*")):
        with suppress(FileNotFoundError):  # it is finished by now
            if time.time() - left.stat().st_mtime > SETTLED_S:
                take(left, "a measurement that a killed writer had not finished")


def _repeated(store: ZarrStore, folder: Path, take: Take, *, dry_run: bool) -> None:
    """Shards that hold nothing that an earlier one does not hold: no reader looks into them, but one that was opened
    before the index was last written, for which another was the earlier; that looks again.

    The index names them, so it goes first and is written again last: in between the store is read shard by shard, in
    another order, so that only one process at a time may tell which of two shards is the earlier.
    """
    with alone_in(folder / "shards"):
        store.refresh()
        holders = {name: _holders(store, name) for name in store.shard_names}
        damaged = {name for name in set().union(*holders.values()) if _is_damaged(store, name)}
        goes = [name for name, others in holders.items() if others and not others & damaged]
        mend = f"what else holds its documents is damaged; type `logitstore verify --repair {folder}`"
        with without_index(folder) if goes and not dry_run else nullcontext():
            for name in (name for name, others in holders.items() if others):
                why_not = partial(str, "" if name in goes else mend)
                take(folder / "shards" / name, "all of its documents are in other shards too", keep=why_not)
        if goes and not dry_run:
            store = ZarrStore(store.files, folder)
            store.save_index()


def _holders(store: ZarrStore, name: str) -> set[str]:
    """The earlier shards that hold a shard's documents; none where it has one of its own."""
    shard, catalog = store.shard(name), store.catalog
    holders = set()
    for document, key in enumerate(shard.keys):
        number = catalog.number_of(key.tobytes())
        assert number is not None, "the catalog numbers every document of its shards"
        first, place = catalog.place(number)
        if first.name == name and place <= document:
            return set()
        holders.add(first.name)
    return holders


def _is_damaged(store: ZarrStore, name: str) -> bool:
    shard = store.shard(name)
    return any(file_problems(store.files, shard.where, shard.entry.files))


def _beside(path: Path, take: Take) -> None:
    """What writers have left beside a store: stores that were being begun, locks, and what was to become a zip file."""
    with alone_in(path.parent):  # so no store is being begun
        for left in begun_beside(path):
            take(left, "a store that a killed process had not begun")
    if path.is_file():
        for lock in sorted(path.parent.glob(f".{escape(path.name)}-*")):
            with suppress(FileNotFoundError):  # its owner has finished meanwhile
                if lock.is_file() and not lock.stat().st_size:  # nothing is written into one
                    take(lock, "the lock of a writer that was killed", lock)
    if path.suffix == ZIP_SUFFIX:
        lock = path.with_name(f".partial-{path.name}")
        for left in (unzipped(path), lock):
            if left.exists():
                take(left, "what a killed conversion has left", lock)


def remove_index(folder: Path) -> None:
    """Take a store's index away; it is then read shard by shard until an index is written again."""
    with without_index(folder):
        pass


@contextmanager
def without_index(folder: Path) -> Iterator[None]:
    """The same; and nobody writes one within this block, which would name shards that are taken away there."""
    old = folder / ".partial-removed-index"
    with alone_in(folder):
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            (folder / FOLDER).rename(old)
        shutil.rmtree(old, ignore_errors=True)
        yield


def _why_pending(journal: Path, store: Store) -> str:
    """Why a journal must stay: it holds documents that are in no shard."""
    pending = sum(1 for _ in leftovers(journal, store))
    return f"holds {pending:,} documents that are in no shard yet; type its command again to go on" if pending else ""


@contextmanager
def _held(lock: Path | None, *, dry_run: bool) -> Iterator[bool]:
    """Hold a lock, so that its owner does not begin to write meanwhile; False where another process does."""
    if lock is None or (dry_run and not lock.exists()):
        yield True
        return
    there = lock.exists()
    try:
        file = open_locked(lock)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if not there:
            lock.unlink(missing_ok=True)
        file.close()


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if path.name.startswith(".") else path.with_name(f".partial-removed-{path.name}")
    if hidden != path:
        path.rename(hidden)  # at once, so that no reader finds half of it
    shutil.rmtree(hidden)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
