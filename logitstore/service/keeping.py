"""What the desk's teacher answers, on its way into stores: a journal first, and shards when there is enough of it."""

from collections.abc import Callable

from logitstore.durable import alone_in
from logitstore.errors import CorruptStoreError, StoreError, StoreNotFoundError, StoreWriteError, first_line
from logitstore.files import LocalFiles
from logitstore.journal import ShardWriter
from logitstore.recipe import DocumentRecord
from logitstore.service.shelf import Served
from logitstore.zarr_store import ZarrStore

INDEX_SHARE = 16
"""The index is written again when one in so many shards is not in it: that reads the documents of all."""
WRITERS = 16
"""So many services at once may keep answers in one store."""


class Keeping:
    """The stores that were taught, with a writer each. All but `pending` belongs to the teacher's thread.

    Args:
        say: takes a line of text for the log.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._writers: dict[Served, ShardWriter] = {}

    def pending(self, served: Served, key: bytes) -> DocumentRecord | None:
        """An answer that is on disk and not yet in a shard."""
        writer = self._writers.get(served)
        return None if writer is None else writer.pending.get(key)

    def writer(self, served: Served) -> ShardWriter:
        """The writer that keeps answers in a store, and takes over what a killed service had kept.

        Raises:
            StoreError: it cannot be written, or what lies there is another store by now.
        """
        if served in self._writers:
            return self._writers[served]
        own = ZarrStore(LocalFiles(served.path), served.path)
        own.manifest.require_compatible(served.store.manifest, served.path)
        for number in range(WRITERS):
            try:
                writer = ShardWriter(own, f"service-{number}")
            except StoreWriteError:
                if number == WRITERS - 1:
                    raise
                continue  # another service on this store
            self._writers[served] = writer
            return writer
        raise AssertionError("the last one is returned or raises")

    def commit(self) -> None:
        """Make shards of what is kept, and an index of them."""
        for served, writer in list(self._writers.items()):
            if not served.is_there():  # what lies in its place may be another's
                self._say(f"{served.name}: the store is gone, and what was taught since its last shard with it")
                self._close(served)
                continue
            if not writer.pending:
                continue
            try:
                with alone_in(served.path):  # so that two services do not write the same documents
                    writer.commit(list(writer.pending))
                index, shards = writer.store.catalog.index, writer.store.shard_count
                if INDEX_SHARE * (shards - (len(index.shards) if index else 0)) >= shards:
                    writer.store.save_index()
            except Exception as error:  # a disk's fault or our own: it stays in the journal, and the next is answered
                self._say(f"{served.name}: {first_line(error)}")
                if isinstance(error, CorruptStoreError):  # seen through files that were open before it was mended
                    self._close(served)

    def close(self) -> None:
        """Let go of all stores."""
        for served in list(self._writers):
            self._close(served)

    def _close(self, served: Served) -> None:
        """Let go of a store; what it has been taught and is in no shard stays in its journal."""
        writer = self._writers.pop(served, None)
        if writer is not None:
            try:
                writer.__exit__(None if served.is_there() else StoreError, None, None)
            except StoreError as error:
                self._say(f"{served.name}: {error}")


def require_there(served: Served) -> None:
    """Raise StoreNotFoundError where a store was deleted or replaced: what is written now goes nowhere."""
    if not served.is_there():
        raise StoreNotFoundError(f"{served.name} is gone; open the store again")
