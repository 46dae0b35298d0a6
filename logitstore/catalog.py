"""Which shards a store has, and which document has which number: found by the index, and by what it does not know yet.

Documents are numbered through the index's shards in their order, then through the shards that were finished since.
Stands between the files of a `ZarrStore` and whoever asks it for a document. A look at the shards is taken whole or not
at all, so that one thread may refresh while another looks documents up.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.alike import MOST_ORDERED, Alike
from logitstore.entries import ShardEntry, unreadable
from logitstore.errors import CorruptStoreError, IncompatibleStoreError, StoreFormatError
from logitstore.files import CannotList, Files, LocalFiles, ZipFiles
from logitstore.index import (
    EMPTY,
    MOST_ALIKE,
    Table,
    block_counts,
    block_ends,
    block_hashes,
    find,
    key_hash,
    key_hashes,
)
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.shard import Shard
from logitstore.stored_index import StoredIndex, read_index, write_index

MOST_OPEN = 256
"""Shards of which tables are kept in memory, the last used ones."""


@dataclass(frozen=True, eq=False)
class _View:
    """The shards that were there at one look, and the numbers of their documents."""

    index: StoredIndex | None
    names: list[str]
    starts: list[int]
    """[S + 1]; the number of each shard's first document, and how many there are."""
    counts: npt.NDArray[np.int64]
    """[S, 2]; documents and positions of each shard."""
    fresh_keys: Table
    """Of the shards that the index does not know."""
    twice: list[int]
    """Documents that an earlier shard, or the same one before them, holds too."""

    @property
    def indexed(self) -> int:
        """How many shards the index knows."""
        return len(self.index.shards) if self.index else 0

    @property
    def key_tables(self) -> list[Table]:
        """Hashes of whole documents."""
        return [*([self.index.keys] if self.index else []), self.fresh_keys]


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
        self._view = _View(None, [], [0], np.empty((0, 2), np.int64), EMPTY, [])
        self._fresh_blocks = self._view, EMPTY
        self._alike = self._view, Alike()
        near = isinstance(files, LocalFiles | ZipFiles)
        self._most_alike = MOST_ORDERED if near else MOST_ALIKE  # of a place far away all of their shards are fetched
        self.refresh()

    @property
    def index(self) -> StoredIndex | None:
        """The index, where there is one that fits the shards."""
        return self._view.index

    @property
    def names(self) -> list[str]:
        """Shards, in the order in which documents are numbered."""
        return self._view.names

    def refresh(self) -> None:
        """See the shards that were finished since the store was opened.

        Raises:
            CorruptStoreError: the index, a shard's entry or its documents are not what was written.
            IncompatibleStoreError: a shard belongs to another store.
        """
        self._look(self.index)

    def _look(self, index: StoredIndex | None) -> None:
        """See what there is now, by this index or by the one that is read; again where a shard goes meanwhile."""
        while True:
            found = index or read_index(self._files, self._path)
            there = self._listed(found)
            try:
                self._take(found, there)
                return
            except CorruptStoreError:
                if there <= self._listed(found):
                    raise

    def _take(self, index: StoredIndex | None, there: set[str]) -> None:
        """Number the documents of the shards that are there."""
        before = self._view
        if not there.issuperset(before.names):  # one that was taken away may come back, computed again
            self._open.clear()
            self._checked.clear()
            if isinstance(self._files, LocalFiles):
                self._files.close()
        if index is not None and not index.known <= there:
            index = None  # a shard was taken away: what the index says of the others may be read from them
        indexed = index.shards if index else []
        fresh = sorted(there - index.known if index else there)
        if index is before.index and indexed + fresh == before.names:
            return
        shards = [self.shard(name) for name in fresh]
        counts = np.array([(s.entry.documents, s.entry.positions) for s in shards], np.int64).reshape(-1, 2)
        if index:
            counts = np.concatenate([index.counts, counts])
        starts = [0, *np.cumsum(counts[:, 0]).tolist()]
        first = starts[len(indexed)]
        view = _View(index, indexed + fresh, starts, counts, _keys_of(shards, first), [])
        twice = [*(index.duplicates if index else []), *self._held_twice(view, first)]
        self._view = replace(view, twice=sorted(twice))

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
        view = self._view
        return view.starts[-1] - len(view.twice)

    @property
    def positions(self) -> int:
        """How many positions the different documents have; looks into the shards that hold one a second time."""
        view = self._view
        again = (self._place(view, number) for number in view.twice)
        return int(view.counts[:, 1].sum()) - sum(int(shard.lengths[document]) - 1 for shard, document in again)

    def forget_index(self) -> None:
        """Read the index again: it has been replaced."""
        self._look(None)

    def write_index(self, folder: Path, names: list[str]) -> None:
        """Write an index of these shards, in this order, into a folder that is there."""
        shards = [self.shard(name) for name in names]
        documents = np.array([shard.entry.documents for shard in shards], np.int64)
        counts = np.stack([documents, [shard.entry.positions for shard in shards]], axis=1).reshape(-1, 2)
        keys = _keys_of(shards, 0)
        twice = [number for number in _same_hash(keys) if self._is_second(keys, number, shards, documents)]
        write_index(folder, names, counts, keys, _blocks_of(shards, 0), twice)

    def locate(self, token_ids: npt.NDArray[np.integer]) -> tuple[Shard, int, int] | None:
        """Where a document's targets lie: a shard, a document in it, and how many of its positions are answered.

        Raises:
            CorruptStoreError, ValueError: as for `get`.
        """
        view = self._view
        number = self._number_of(view, document_key(token_ids))
        if number is not None:
            return *self._place(view, number), len(token_ids) - 1
        alike, read = self._alike_in(view), partial(self._tokens_of, view)
        for end in reversed(block_ends(len(token_ids))):
            numbers = find(self._block_tables(view), key_hash(document_key(token_ids[:end])), self._most_alike)
            nearest = alike.nearest(numbers, token_ids, end, read)
            if nearest is not None:
                return *self._place(view, nearest[0]), nearest[1] - 1
        return None

    def alike(self, token_ids: npt.NDArray[np.integer]) -> list[tuple[Shard, int]]:
        """Where the document lies, or else all that begin like it, which `locate` may read."""
        view = self._view
        number = self._number_of(view, document_key(token_ids))
        tables = self._block_tables(view)
        begun = {n for value in block_hashes(token_ids) for n in find(tables, value, self._most_alike)}
        return [self._place(view, n) for n in (sorted(begun) if number is None else [number])]

    def _alike_in(self, view: _View) -> Alike:
        """What is known of documents that begin alike, as long as none gets another number."""
        of, alike = self._alike
        if of is not view:
            alike = alike if view.names[: len(of.names)] == of.names else Alike()
            self._alike = view, alike
        return alike

    def _tokens_of(self, view: _View, number: int) -> npt.NDArray[np.int32]:
        shard, document = self._place(view, number)
        return shard.token_ids(document)

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
            raise unreadable(f"{self._path}/shards", error) from error

    def place(self, number: int) -> tuple[Shard, int]:
        """The shard of a document, by its number among all, and its number there."""
        return self._place(self._view, number)

    def _place(self, view: _View, number: int) -> tuple[Shard, int]:
        at = bisect_right(view.starts, number) - 1
        shard = self.shard(view.names[at]) if at < len(view.names) else None
        if shard is None or number - view.starts[at] >= shard.entry.documents:
            assert view.index is not None, "a table of shards names their own documents"
            raise view.index.damaged("keys", "names a document that no shard holds")
        return shard, number - view.starts[at]

    def number_of(self, key: bytes) -> int | None:
        """The number of the document with this key."""
        return self._number_of(self._view, key)

    def _number_of(self, view: _View, key: bytes) -> int | None:
        for number in find(view.key_tables, key_hash(key)):
            shard, document = self._place(view, number)
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
        twice = self._view.twice
        return number + bisect_right(range(len(twice)), number, key=lambda i: twice[i] - i)

    def visible(self, number: int) -> int:
        """The reverse of `unhidden`."""
        return number - bisect_left(self._view.twice, number)

    def numbers(self) -> dict[str, npt.NDArray[np.int64]]:
        """For each shard the numbers of its documents among the different ones; -1 where an earlier one is the same."""
        view = self._view
        every = np.arange(view.starts[-1])
        numbers = every - np.searchsorted(np.array(view.twice, np.int64), every)
        numbers[view.twice] = -1
        return dict(zip(view.names, np.split(numbers, view.starts[1:-1]), strict=True)) if view.names else {}

    def _block_tables(self, view: _View) -> list[Table]:
        """Hashes of how documents begin."""
        of, blocks = self._fresh_blocks
        if of is not view:
            fresh = [self.shard(name) for name in view.names[view.indexed :]]
            blocks = _blocks_of(fresh, view.starts[view.indexed])
            self._fresh_blocks = view, blocks
        return [*([view.index.blocks] if view.index else []), blocks]

    def _held_twice(self, view: _View, first: int) -> list[int]:
        """Documents from number `first` on that are held by an earlier shard, or earlier in their own, too."""
        fresh = view.fresh_keys
        suspects = _same_hash(fresh)
        for earlier in view.key_tables[:-1] if len(fresh.hashes) else ():
            at = np.searchsorted(earlier.hashes, fresh.hashes)
            inside = at < len(earlier.hashes)
            same = earlier.hashes[at[inside]] == fresh.hashes[inside]
            suspects += fresh.documents[inside][same].tolist()
        found = []
        for number in sorted(set(suspects)):
            shard, document = self._place(view, number)
            if self._number_of(view, shard.keys[document].tobytes()) != number:
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


def _same_hash(table: Table) -> list[int]:
    """Documents of a table that have the hash of the one before."""
    return [int(number) for number in table.documents[1:][table.hashes[1:] == table.hashes[:-1]]]
