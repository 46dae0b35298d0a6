"""What a power loss leaves is the store as before or as after, and every document that was acknowledged.

`Disk` looks at a folder before and after each call that orders writes. Of a file it knows what has been flushed and
what has been written since, of a folder which names; after a power loss any of these may be what is left, a file also
cut short or filled with zeros. FORMAT.md, "Order of writing", says why that does no harm.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from threading import RLock
from typing import Any

import pytest

from logitstore.journal import ShardWriter
from logitstore.recipe import DocumentRecord
from logitstore.saved_maps import save_vocabulary_map, saved_vocabulary_map
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import map_vocabularies
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, manifest, records

BATCHES = [records([7, 40], seed=1), records([3], seed=2), records([30, 2], seed=3)]
CALLS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "ftruncate", "fsync")
Names = dict[str, int]


class Disk:
    """A folder, of which each thing is known as it was flushed and in each state since."""

    def __init__(self, root: Path) -> None:
        self.root, self.states = root, list[dict[str, bytes | None]]()
        self.acknowledged: list[DocumentRecord] = []
        self.lost: list[tuple[dict[str, bytes | None], list[DocumentRecord]]] = []
        """What power losses may leave, and what had been acknowledged before."""
        self._handles: dict[int, int] = {}
        """Kept open, so that no inode is used again."""
        self._files: dict[int, list[bytes]] = {}
        self._folders: dict[int, list[Names]] = {}
        self._seen: set[bytes] = set()
        self._random = random.Random(0)
        self.look(flushed=True)

    def look(self, *, flushed: bool = False) -> None:
        """Take note of what has changed."""
        for parent, folders, files in os.walk(self.root):
            names = {name: self._number(Path(parent) / name) for name in (*folders, *files)}
            versions = self._folders.setdefault(self._number(Path(parent)), [names if flushed else {}])
            if versions[-1] != names:
                versions.append(names)
            for name in files:
                data = (Path(parent) / name).read_bytes()
                contents = self._files.setdefault(names[name], [data if flushed else b""])
                if contents[-1] != data:
                    contents.append(data)

    def flush(self, handle: int) -> None:
        """A file, or a folder's names, are on the medium."""
        number = os.fstat(handle).st_ino
        for versions in (self._files.get(number), self._folders.get(number)):
            if versions:
                del versions[:-1]

    def lose_power(self) -> None:
        """Note what may be left now: least, most, names without contents, contents without names, and at random."""
        pick = self._random.choice
        first, last = lambda versions: versions[0], lambda versions: versions[-1]
        for folders, files in (
            (first, first),
            (last, last),
            (last, first),
            (first, last),
            *[(pick, lambda versions: self._torn(versions[0], pick(versions)))] * 3,
        ):
            left = dict(self._left(self._number(self.root), "", folders, files))
            private = {name for name in left if "/.partial" in f"/{name}"}  # what is in it nobody reads
            shown = {name: data for name, data in left.items() if name not in private}
            told = sorted(shown.items()), sorted(private)[:1], len(self.acknowledged)
            name = blake2b(repr(told).encode()).digest()
            if name not in self._seen:
                self._seen.add(name)
                self.lost.append((left, list(self.acknowledged)))

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def _torn(self, flushed: bytes, data: bytes) -> bytes:
        """Some of what was written; what has been flushed, and not been written over, stays."""
        same = next((at for at, (a, b) in enumerate(zip(flushed, data, strict=False)) if a != b), len(flushed))
        at = self._random.randint(min(same, len(data)), len(data))
        return self._random.choice([data, data[:at], data[:at] + bytes(len(data) - at)])

    def _left(
        self, number: int, prefix: str, folders: Callable[[Any], Names], files: Callable[[Any], bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, inner in folders(self._folders[number]).items():
            if inner in self._folders:
                yield prefix + name, None
                yield from self._left(inner, f"{prefix}{name}/", folders, files)
            else:
                yield prefix + name, files(self._files[inner])

    def _number(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self._handles:
            self._handles[number] = os.open(path, os.O_RDONLY)
        return number


@contextmanager
def watched(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Lose power before and after every call that orders writes; one call at a time, as zarr writes from threads."""
    disk, one_call = Disk(root), RLock()

    def around(name: str) -> Callable[..., object]:
        call = getattr(os, name)

        def watch(*args: Any, **kwargs: Any) -> object:
            with one_call:
                disk.look()
                disk.lose_power()
                result = call(*args, **kwargs)
                disk.look()
                if name == "fsync":
                    disk.flush(args[0])
                disk.lose_power()
                return result

        return watch

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, around(name))
        yield disk
    disk.look()
    disk.lose_power()
    disk.close()


def require_whole(disk: Disk, before: Sequence[DocumentRecord], path: Path, writer: str = "build") -> set[int]:
    """Read what every power loss left: how many documents readers find."""
    counts = set()
    for left, acknowledged in disk.lost:
        shutil.rmtree(path, ignore_errors=True)
        for name, data in left.items():
            place = path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir(exist_ok=True) if data is None else place.write_bytes(data)
        assert verify(path, quiet=True).problems == []
        store = open_store(path)
        counts.add(len(store))
        recipe = store.manifest.recipe
        for document in before:
            found = store.get(document.token_ids)
            assert found is not None and (found.weights == recipe.read(document.records).weights).all()
        with store.writer(writer) as taking_over:
            assert all(document.key in taking_over for document in acknowledged)
            taking_over.commit(list(taking_over.pending))
        for document in acknowledged:
            found = store.get(document.token_ids)
            assert found is not None and (found.weights == recipe.read(document.records).weights).all()
        assert verify(path, quiet=True).problems == [] and not list(path.glob(".[jp]*"))
    return counts


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    made.write_documents(BATCHES[0])
    made.save_index()
    return made


def test_a_batch_that_was_acknowledged_is_in_the_journal(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(store.folder, monkeypatch) as disk, pytest.raises(RuntimeError), store.writer("build") as writer:
        for batch in BATCHES[1:]:
            writer.append(batch)
            disk.acknowledged += batch
        raise RuntimeError
    assert require_whole(disk, BATCHES[0], tmp_path / "left") == {2} and len(disk.lost) >= 4


def test_a_shard_is_there_whole_or_not_at_all_and_the_journal_goes_after_it(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(store, "build")
    for batch in BATCHES[1:]:
        writer.append(batch)
    with watched(store.folder, monkeypatch) as disk:
        disk.acknowledged += [document for batch in BATCHES[1:] for document in batch]
        writer.commit(list(writer.pending))
    writer.__exit__(None, None, None)
    assert require_whole(disk, BATCHES[0], tmp_path / "left") == {2, 5} and len(disk.lost) >= 4


def test_an_index_is_the_old_one_the_new_one_or_none(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_documents(BATCHES[2])
    with watched(store.folder, monkeypatch) as disk:
        store.save_index()
    assert require_whole(disk, BATCHES[0] + BATCHES[2], tmp_path / "left") == {4} and len(disk.lost) >= 4


def test_a_vocabulary_map_is_there_whole_or_not_at_all(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = map_vocabularies(VOCABULARY, Vocabulary((b"<7>", b"<", b"1", b">"), frozenset(), None, None))
    with watched(store.folder, monkeypatch) as disk:
        save_vocabulary_map(store, made)
    assert require_whole(disk, BATCHES[0], tmp_path / "left") == {2} and len(disk.lost) >= 3
    assert saved_vocabulary_map(open_store(tmp_path / "left"), made.student_fingerprint) is not None


def test_what_was_measured_is_what_it_was_or_what_it_is(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_fidelity({"kl": 0.5})
    with watched(store.folder, monkeypatch) as disk:
        store.save_fidelity({"kl": 0.25})
    assert require_whole(disk, BATCHES[0], tmp_path / "left") == {2}
