"""Finished documents on their way into a shard: an append-only file that survives a kill at any moment.

A frame is a 32-bit length, a blake2b-128 of the payload, and the payload: the documents of one teacher batch. Reading
stops at the first frame that is cut short or does not match, and appending goes on from there; a batch is there whole
or not at all. Private to the machine's builds: no reader of the store looks here.
"""

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np

from logitstore.contract import Store
from logitstore.durable import cannot_write, flush, read_whole, sync, write_whole
from logitstore.errors import StoreWriteError
from logitstore.files import LocalFiles
from logitstore.recipe import DocumentRecord
from logitstore.zarr_store import ZarrStore

FRAME = struct.Struct("<I16s")
DOCUMENT = struct.Struct("<I")
WRITE_BACK = "write-back"
"""Name of the writer that keeps what a live teacher answered in a training run."""


class ShardWriter:
    """Writes documents into a store: `append` keeps them at once, `commit` makes a shard of them.

    One process at a time may hold a writer of a given name. What an earlier writer of that name had appended and not
    committed is taken over.

    Args:
        name: which writer of the store this is, as in "build-1-of-2".

    Raises:
        StoreWriteError: another process holds it, or the store cannot be written.
    """

    def __init__(self, store: ZarrStore, name: str) -> None:
        self.store = store
        self.name = name
        self.path = journal_of(store, name)
        try:
            self._file = open_locked(self.path)
            sync(store.folder)  # a journal whose name is lost is lost, however often it is flushed
        except BlockingIOError as error:
            raise StoreWriteError(
                f"another process is writing {name} into {store.path}; wait for it, or end it"
            ) from error
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            store.refresh()
            self.pending = {d.key: d for d in self._recover() if d.key not in store}
            """Documents that are kept but not yet in a shard, by key, oldest first."""
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self.pending and kind is None:
                self.store.save_index()
                self.path.unlink(missing_ok=True)
        finally:
            self._file.close()

    def __contains__(self, key: object) -> bool:
        return key in self.pending or key in self.store

    def append(self, documents: Sequence[DocumentRecord]) -> None:
        """Keep a batch of documents; when this returns they are on disk.

        Raises:
            StoreWriteError: full disk; the batch is not kept, those before it are.
        """
        payload = b"".join(_pack(documents))
        frame = FRAME.pack(len(payload), blake2b(payload, digest_size=16).digest()) + payload
        whole = self._file.tell()
        try:
            write_whole(self._file, frame)
            flush(self._file.fileno())
        except BaseException as error:
            self._cut(whole)  # else the next frame would stand behind half a one, and never be read
            if isinstance(error, OSError):
                raise cannot_write(self.path, error) from error
            raise
        self.pending.update((document.key, document) for document in documents)

    def commit(self, keys: Iterable[bytes]) -> None:
        """Make one shard of pending documents, in this order.

        Raises:
            StoreWriteError: full disk; the documents stay pending.
        """
        keys = list(keys)
        self.store.refresh()  # what another writer has finished since need not be there twice
        documents = [self.pending[key] for key in keys if key not in self.store]
        if documents:
            self.store.write_documents(documents, self.name)
        for key in keys:
            self.pending.pop(key, None)  # one that came again while its shard was being written is in that
        if self.pending:
            return  # the journal still holds them; what is in a shard by now is passed over when it is read again
        try:
            self._cut(0)
            flush(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _recover(self) -> Iterator[DocumentRecord]:
        whole = 0
        for payload in payloads(self._file):
            yield from unpack_documents(payload, self.store.manifest.recipe.record_width)
            whole = self._file.tell()
        self._cut(whole)

    def _cut(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)


def open_locked(path: Path) -> FileIO:
    """Open a file for reading and writing, begun if need be, as the only process to hold it. Unbuffered.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder removed it between our two calls


def payloads(file: FileIO) -> Iterator[bytes]:
    """What a journal holds, up to the first frame that is cut short or does not match."""
    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(FRAME.size)) == FRAME.size:
        length, digest = FRAME.unpack(head)
        payload = read_whole(file, min(length, size))
        if len(payload) != length or blake2b(payload, digest_size=16).digest() != digest:
            return
        yield payload


def journals(store: Path) -> list[Path]:
    """Journals of builds that have not finished."""
    return sorted(store.glob(".journal-*"))


def leftovers(journal: Path, store: Store) -> Iterator[DocumentRecord]:
    """The documents of a journal that are in no shard of its store; none where there is no journal."""
    with suppress(FileNotFoundError), FileIO(journal) as file:
        for payload in payloads(file):
            documents = unpack_documents(payload, store.manifest.recipe.record_width)
            yield from (document for document in documents if document.key not in store)


def journal_of(store: ZarrStore, name: str) -> Path:
    """The journal of the writer of this name."""
    return store.folder / f".journal-{name}"


def left_by(name: str, store: Store | None) -> Iterator[DocumentRecord]:
    """The same of the writer of this name: what its command, typed again, goes on with."""
    if isinstance(store, ZarrStore) and isinstance(store.files, LocalFiles):  # other kinds of stores leave nothing
        yield from leftovers(journal_of(store, name), store)


def commit_leftovers(store: Store, name: str) -> None:
    """Show readers what an interrupted writer of this name has left; one that still runs is left alone."""
    if not isinstance(store, ZarrStore) or not journal_of(store, name).exists():
        return  # another kind of store leaves nothing
    try:
        writer = ShardWriter(store, name)
    except StoreWriteError:
        return  # it still runs
    with writer:
        writer.commit(list(writer.pending))


def _pack(documents: Sequence[DocumentRecord]) -> Iterator[bytes]:
    for document in documents:
        yield DOCUMENT.pack(len(document.token_ids))
        yield document.token_ids.astype("<i4").tobytes()
        yield document.records.tobytes()


def unpack_documents(payload: bytes, width: int) -> Iterator[DocumentRecord]:
    """The documents of a payload."""
    at = 0
    while at < len(payload):
        (length,) = DOCUMENT.unpack_from(payload, at)
        at += DOCUMENT.size
        token_ids = np.frombuffer(payload, "<i4", length, at).astype(np.int32)
        at += 4 * length
        records = np.frombuffer(payload, np.uint8, (length - 1) * width, at).reshape(length - 1, width)
        at += (length - 1) * width
        yield DocumentRecord(token_ids, records)
