"""Writes into a store in an LMDB file: each batch in one transaction, flushed before it is acknowledged."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.durable import cannot_write
from logitstore.errors import StoreWriteError
from logitstore.index import block_hashes
from logitstore.journal import open_locked
from logitstore.lmdb_records import (
    BUNDLE,
    BUNDLE_BYTES,
    FIT_GROWTH,
    KEY,
    LAST_FIT,
    MOST_DOCUMENTS,
    NUMBER,
    PLACE,
    RANKS,
    Counts,
    Place,
    encode,
    table_to_bytes,
    used_ids,
)
from logitstore.lmdb_store import LmdbStore, block_key
from logitstore.recipe import DocumentRecord
from logitstore.streams import Ranks


class LmdbWriter:
    """Writes documents into a store: each `append` is one transaction, and the store's readers see it at once.

    One process at a time may hold a writer of a given name; writers of different names wait for each other's
    transactions.

    Raises:
        StoreWriteError: another process holds it, or the store cannot be written.
    """

    pending: Mapping[bytes, DocumentRecord] = {}
    """Nothing: what is kept is seen."""

    def __init__(self, store: LmdbStore, name: str) -> None:
        self.store = store
        self.path = store.path.with_name(f".{store.path.name}-{name}")
        """Held while the writer lives."""
        self._used = np.zeros(store.manifest.recipe.vocab_size, np.int64)
        self._used_positions = 0
        self._rank_of: tuple[int, npt.NDArray[np.uint32]] | None = None
        if not os.access(store.path, os.W_OK):
            raise cannot_write(store.path, PermissionError(13, "Permission denied"))
        try:
            self._file = open_locked(self.path)
        except BlockingIOError as error:
            raise StoreWriteError(
                f"another process is writing {name} into {store.path}; wait for it, or end it"
            ) from error
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def __enter__(self) -> "LmdbWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self._file.close()

    def __contains__(self, key: object) -> bool:
        return key in self.store

    def append(self, documents: Sequence[DocumentRecord]) -> None:
        """Keep a batch of documents; when this returns they are on disk. Those that are there already stay as they are.

        Raises:
            StoreWriteError: full disk, or a document too long for a record; nothing of the batch is kept.
        """
        fresh = {document.key: document for document in reversed(documents) if document.key not in self.store}
        if not fresh:
            return
        recipe, rows = self.store.manifest.recipe, list(reversed(fresh.items()))
        table, rank_of = self._table_for([document for _, document in rows])
        try:
            encoded = [encode(document, recipe, table, rank_of) for _, document in rows]
        except ValueError as error:
            raise StoreWriteError(
                f"{self.store.path} cannot hold this: {error}; type a path that ends in .zarr, or a smaller "
                "--max-seq-length"
            ) from error

        def put(txn: Any, counts: Counts) -> Counts:
            bundle = bytearray()
            for (key, document), data in zip(rows, encoded, strict=True):
                number = counts.documents
                if number >= MOST_DOCUMENTS:
                    raise StoreWriteError(f"{self.store.path} is full: {number:,} documents; begin another store")
                if txn.get(KEY + key) is not None:
                    continue  # another writer was first
                if bundle and len(bundle) + len(data) > BUNDLE_BYTES:
                    counts = put_bundle(txn, counts, bundle)
                    bundle = bytearray()
                place = Place.of(data, counts.bundles, len(bundle))
                blocks = [block_key(value, number) for value in block_hashes(document.token_ids)]
                entries = {KEY + key: NUMBER.pack(number), PLACE + NUMBER.pack(number): place.to_bytes()}
                entries |= dict.fromkeys(blocks, b"")
                for entry in entries.items():
                    txn.put(*entry)
                bundle += data
                counts = counts.plus(entries, documents=1, positions=len(document.records), blocks=len(blocks))
            return put_bundle(txn, counts, bundle) if bundle else counts

        self.store.change(put)

    def commit(self, keys: Iterable[bytes]) -> None:
        """See `contract.Writer`. There is nothing to do."""

    def _table_for(self, documents: Sequence[DocumentRecord]) -> tuple[int, npt.NDArray[np.uint32]]:
        """The store's newest table of ranks, by number; a new one where four times as many positions are known."""
        newest = self.store.counts().tables - 1
        fitted = self.store.table(newest)[1] if newest >= 0 else 0
        if fitted < LAST_FIT:
            for document in documents:
                self._used += used_ids(document, self.store.manifest.recipe)
                self._used_positions += len(document.records)
            if self._used_positions >= FIT_GROWTH * fitted:
                newest = self._add_table()
        if self._rank_of is None or self._rank_of[0] != newest:
            self._rank_of = newest, self.store.table(newest)[0].table()
        return self._rank_of

    def _add_table(self) -> int:
        data = table_to_bytes(Ranks.fit(self._used), self._used_positions)
        number = -1

        def put(txn: Any, counts: Counts) -> Counts:
            nonlocal number
            number = counts.tables
            txn.put(RANKS + NUMBER.pack(number), data)
            return replace(counts, tables=number + 1)

        self.store.change(put)
        return number


def put_bundle(txn: Any, counts: Counts, bundle: bytearray) -> Counts:
    """Add a bundle of records."""
    txn.put(BUNDLE + NUMBER.pack(counts.bundles), bytes(bundle), append=True)
    return replace(counts, bundles=counts.bundles + 1)
