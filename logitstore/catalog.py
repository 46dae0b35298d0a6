"""Which shards a store has, and which document has which number: found by the index, and by what it does not know yet.

Documents are numbered through the index's shards in their order, then through the shards that were finished since.
Stands between the files of a `ZarrStore` and whoever asks it for a document.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.entries import ShardEntry, damaged
from logitstore.errors import IncompatibleStoreError, StoreFormatError
from logitstore.files import CannotList, Files, LocalFiles
from logitstore.index import EMPTY, Table, block_counts, block_ends, common_length, find, key_hash, key_hashes
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.shard import Shard
from logitstore.stored_index import StoredIndex, read_index, write_index

MOST_OPEN = 256
"""Shards of which tables are kept in memory, the last used ones."""


class Catalog:
    """The documents of a store's shards."""

    def __init__(self, files: Files, path: Path | str, manifest: Manifest) -> None:
        """Read the index, and the documents of the shards that it lacks.

        Args:
            path: of the store, for messages.

        Raises:
            CorruptStoreError, IncompatibleStoreError: as `refresh`.
        """
        self._files, self._path, self._manifest = files, path, manifest
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._checked: set[str] = set()
        self.index: StoredIndex | None = None
        self._starts: list[int] = []
        self.names: list[str] = []
        """Shards, in the order in which documents are numbered."""
        self.refresh()

    def refresh(self) -> None:
        """See the shards that were finished since the store was opened.

        Raises:
            CorruptStoreError: the index, a shard's entry or its documents are not what was written.
            IncompatibleStoreError: a shard belongs to another store.
        """
        index = self.index or read_index(self._files, self._path)
        there = self._listed(index)
        if not there.issuperset(self.names):  # one that was taken away may come back, computed again
            self._open.clear()
            self._checked.clear()
            if isinstance(self._files, LocalFiles):
                self._files.close()
        if index is not None and not index.known <= there:
            index = None  # a shard was taken away: what the index says of the others may be read from them
        indexed = index.shards if index else []
        fresh = sorted(there - index.known if index else there)
        if self._starts and index is self.index and indexed + fresh == self.names:
            return
        self.index = index
        self.names = indexed + fresh
        shards = [self.shard(name) for name in fresh]
        counts = [(s.entry.documents, s.entry.positions) for s in shards]
        self._counts = np.concatenate(
            [index.counts if index else np.empty((0, 2), np.int64), np.array(counts, np.int64).reshape(-1, 2)]
        )
        self._starts = [0, *np.cumsum(self._counts[:, 0]).tolist()]
        first = self._starts[len(indexed)]
        self._fresh_keys = _keys_of(shards, first)
        self._fresh_blocks: Table | None = None
        self._twice = sorted([*(index.duplicates if index else []), *self._held_twice(first)])

    def shard(self, name: str) -> Shard:
        """One shard by its name.

        Raises:
            CorruptStoreError: its entry is not what was written.
            IncompatibleStoreError: it belongs to another store.
        """
        shard = self._open.pop(name, None)
        if shard is None:
            shard = Shard(self._files, name, self._manifest.recipe, checked=name in self._checked)
            self._require_own(shard.entry, name)
        self._open[name] = shard
        while len(self._open) > MOST_OPEN:
            closed = self._open.popitem(last=False)[1]
            if closed.checked:
                self._checked.add(closed.name)
        return shard

    def _require_own(self, entry: ShardEntry, name: str) -> None:
        """Raise IncompatibleStoreError where a shard was built as part of another store."""
        if entry.fingerprint != self._manifest.fingerprint:
            raise IncompatibleStoreError(
                f"{self._path}/shards/{name} was built as part of store {entry.fingerprint}, this one is "
                f"{self._manifest.fingerprint}; move that folder out of {self._path}"
            )

    def __len__(self) -> int:
        """How many different documents there are."""
        return self._starts[-1] - len(self._twice)

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return int(self._counts[:, 1].sum())

    def forget_index(self) -> None:
        """Read the index again: it has been replaced."""
        self.index = None
        self.refresh()

    def write_index(self, folder: Path, names: list[str]) -> None:
        """Write an index of these shards, in this order, into a folder that is there."""
        shards = [self.shard(name) for name in names]
        documents = np.array([shard.entry.documents for shard in shards], np.int64)
        counts = np.stack([documents, [shard.entry.positions for shard in shards]], axis=1).reshape(-1, 2)
        keys = _keys_of(shards, 0)
        twice = [number for number in _same_hash([keys]) if self._is_second(keys, number, shards, documents)]
        write_index(folder, names, counts, keys, _blocks_of(shards, 0), twice)

    def locate(self, token_ids: npt.NDArray[np.integer]) -> tuple[Shard, int, int] | None:
        """Where a document's targets lie: a shard, a document in it, and how many of its positions are answered.

        Raises:
            CorruptStoreError, ValueError: as for `get`.
        """
        number = self.number_of(document_key(token_ids))
        if number is not None:
            return *self.place(number), len(token_ids) - 1
        for end in reversed(block_ends(len(token_ids))):
            best, most = None, 0
            for number in find(self.block_tables(), key_hash(document_key(token_ids[:end]))):
                shard, document = self.place(number)
                common = common_length(shard.token_ids(document), token_ids)
                if common > most:
                    best, most = (shard, document, common - 1), common
                if most == len(token_ids):
                    break
            if most >= end:
                return best
        return None

    def _listed(self, index: StoredIndex | None) -> set[str]:
        try:
            return self._files.folders("shards", index.known if index else frozenset())
        except CannotList as error:
            if index is None:
                raise StoreFormatError(
                    f"{self._path} has no index, without which a plain web server does not tell what is there; type "
                    "its `logitstore build` command again where it was built, and copy what that adds"
                ) from error
            return set(index.known)
        except OSError as error:
            raise damaged(f"{self._path}/shards", f"cannot be read ({error})") from error

    def place(self, number: int) -> tuple[Shard, int]:
        """The shard of a document, by its number among all, and its number there."""
        at = bisect_right(self._starts, number) - 1
        shard = self.shard(self.names[at]) if at < len(self.names) else None
        if shard is None or number - self._starts[at] >= shard.entry.documents:
            assert self.index is not None, "a table of shards names their own documents"
            raise self.index.damaged("keys", "names a document that no shard holds")
        return shard, number - self._starts[at]

    def number_of(self, key: bytes) -> int | None:
        """The number of the document with this key."""
        for number in find(self._key_tables(), key_hash(key)):
            shard, document = self.place(number)
            if shard.keys[document].tobytes() == key:
                return number
        return None

    def unhidden(self, number: int) -> int:
        """The number of the N-th different document among all.

        Raises:
            IndexError: there are fewer.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        for twice in self._twice:
            if twice > number:
                break
            number += 1
        return number

    def visible(self, number: int) -> int:
        """The reverse of `unhidden`."""
        return number - bisect_left(self._twice, number)

    def numbers(self) -> dict[str, npt.NDArray[np.int64]]:
        """For each shard the numbers of its documents among the different ones; -1 where an earlier one is the same."""
        every = np.arange(self._starts[-1])
        numbers = every - np.searchsorted(np.array(self._twice, np.int64), every)
        numbers[self._twice] = -1
        return dict(zip(self.names, np.split(numbers, self._starts[1:-1]), strict=True)) if self.names else {}

    def _key_tables(self) -> list[Table]:
        """Hashes of whole documents."""
        return [*([self.index.keys] if self.index else []), self._fresh_keys]

    def block_tables(self) -> list[Table]:
        """Hashes of how documents begin."""
        if self._fresh_blocks is None:
            fresh = self.names[len(self.index.shards) if self.index else 0 :]
            first = self._starts[len(self.names) - len(fresh)]
            self._fresh_blocks = _blocks_of([self.shard(name) for name in fresh], first)
        return [*([self.index.blocks] if self.index else []), self._fresh_blocks]

    def _held_twice(self, first: int) -> list[int]:
        """Documents from number `first` on that are held by an earlier shard, or earlier in their own, too."""
        fresh = self._fresh_keys
        suspects = _same_hash([fresh])
        for earlier in self._key_tables()[:-1] if len(fresh.hashes) else ():
            at = np.searchsorted(earlier.hashes, fresh.hashes)
            inside = at < len(earlier.hashes)
            same = earlier.hashes[at[inside]] == fresh.hashes[inside]
            suspects += fresh.documents[inside][same].tolist()
        found = []
        for number in sorted(set(suspects)):
            shard, document = self.place(number)
            if self.number_of(shard.keys[document].tobytes()) != number:
                found.append(number)
        return [number for number in found if number >= first]

    def _is_second(self, keys: Table, number: int, shards: list[Shard], documents: npt.NDArray[np.int64]) -> bool:
        starts = [0, *np.cumsum(documents).tolist()]

        def key_of(number: int) -> bytes:
            at = bisect_right(starts, number) - 1
            return bytes(shards[at].keys[number - starts[at]])

        key = key_of(number)
        return any(other < number and key_of(other) == key for other in keys.find(key_hash(key)))


def _keys_of(shards: Sequence[Shard], first: int) -> Table:
    """The hashes of shards' documents, numbered from `first` on."""
    if not shards:
        return EMPTY
    hashes = np.concatenate([key_hashes(shard.keys) for shard in shards])
    return Table.of(hashes, np.arange(first, first + len(hashes)))


def _blocks_of(shards: Sequence[Shard], first: int) -> Table:
    """The hashes of how shards' documents begin."""
    if not shards:
        return EMPTY
    counts = np.concatenate([block_counts(shard.lengths) for shard in shards])
    return Table.of(
        np.concatenate([s.blocks for s in shards]), np.repeat(np.arange(first, first + len(counts)), counts)
    )


def _same_hash(tables: list[Table]) -> list[int]:
    """Documents of a table that have the hash of the one before."""
    return [n for t in tables for n in t.documents[1:][t.hashes[1:] == t.hashes[:-1]].tolist()]
