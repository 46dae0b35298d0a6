"""Damaged shards out of the way: moved to `shards/.quarantine-NAME`, never deleted, and asked what they held.

A document of such a shard can still be told where its key can be read, and its tokens where they have the hash that
they are stored under.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.chunks import unpack
from logitstore.durable import cannot_write, sync
from logitstore.entries import read_root
from logitstore.errors import CorruptStoreError
from logitstore.files import LocalFiles
from logitstore.gc import QUARANTINE, remove_index
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.sealed import GROUP, seal_group
from logitstore.sequences import TokenSequence
from logitstore.shard import DOCUMENT_BYTES, Shard
from logitstore.zarr_store import ZarrStore


def put_aside(path: Path, file: str, folder: str = "shards", name: str = "") -> str:
    """Move a shard, or a file out of one, to a name that no reader looks at; where it lies then, from the store."""
    name = f"{folder}/{QUARANTINE}{name or Path(file).name}"
    count, free = 1, name
    while (path / free).exists():
        count += 1
        free = f"{name}-{count}"
    (path / file).rename(path / free)
    sync(path / folder)
    return free


def put_shards_aside(path: Path, token_ids: npt.NDArray[np.integer]) -> list[str]:
    """Move what keeps a store from answering a document out of the way: shards that do not tell what they hold, and
    damaged ones that hold it, or one that begins like it. The index is written again. Where the shards lie then.

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
                moved.append(put_aside(path, f"shards/{name}"))
        while True:
            store = ZarrStore(LocalFiles(path), path)
            try:
                store.answer(token_ids)
            except CorruptStoreError:
                names = _unreadable(store, token_ids)
                if not names:
                    raise
                moved += [put_aside(path, f"shards/{name}") for name in names]
            else:
                store.save_index()
                return moved
    except OSError as error:
        raise cannot_write(path, error) from error


def _unreadable(store: ZarrStore, token_ids: npt.NDArray[np.integer]) -> list[str]:
    """The shards of which a document cannot be read that answers this one, or is held against it."""
    names: dict[str, None] = {}
    for shard, document in store.catalog.alike(token_ids):
        try:
            if shard.name not in names:
                shard.document(document)
        except CorruptStoreError:
            names[shard.name] = None
    return list(names)


class Lost:
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
