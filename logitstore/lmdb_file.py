"""One LMDB file: opened only where its pages hold, read and written in transactions, grown as it fills.

The only module that speaks to LMDB. LMDB maps the file and trusts what it finds there, so that a flipped byte in a page
of its tree can end the process; therefore every page of the tree is held against what LMDB writes (`lmdb_pages`), and
every entry that finds a document against a checksum, before the first search. A process opens a file once, however many
stores look at it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from logitstore.durable import cannot_write
from logitstore.errors import CorruptStoreError, first_line
from logitstore.files import CannotReach, require_damage
from logitstore.lmdb_pages import Nodes, PageError, Snapshot, read_metas
from logitstore.lmdb_records import BLOCK, BUNDLE, COUNTS, KEY, PLACE, Counts, row_sum

T = TypeVar("T")

LOCK_SUFFIX = "-lock"
"""LMDB's own, of the file beside the store that its readers and writers meet in."""

_READERS = 510
_PASSING = (lmdb.ReadersFullError, lmdb.TlsFullError, lmdb.LockError)
_FORKED = "it was open where this process was forked from; open it after the fork, or let processes be spawned"
"""LMDB opens a file once a process, and a fork inherits that without being allowed to use it."""
_FIRST_MAP, _MOST_GROWTH = 64 << 20, 1 << 30
_TRIES, _PAUSE_S = 50, 0.01
_MOST_PAGE = 1 << 16


class LmdbFile:
    """A file of LMDB's. Safe for several threads, one of which at a time is in a transaction."""

    _opened: ClassVar["WeakValueDictionary[tuple[int, int, int], LmdbFile]"] = WeakValueDictionary()
    _opening: ClassVar = threading.Lock()

    @classmethod
    def at(cls, path: Path) -> "LmdbFile":
        """The file at a path: LMDB allows a process to open it once.

        Raises:
            OSError: there is none.
            CorruptStoreError: its bytes are not those that were written.
        """
        with cls._opening:
            found = path.stat()
            name = (os.getpid(), found.st_dev, found.st_ino)
            file = cls._opened.get(name)
            if file is None:
                file = cls._opened[name] = cls(path)
            return file

    _handle = -1

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_CREAT if new else 0), 0o644)
        try:
            self._seen_bytes = os.fstat(self._handle).st_size
            if not new:
                self._retrying(lambda: read_metas(self._handle))
            with self._reading_errors():
                self._env = self._environment(new)
                self._env.reader_check()  # else the pages that a killed reader held are never used again
            if not new:
                self._retrying(self._check)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it; no transaction may be running."""
        env, self._env = getattr(self, "_env", None), None
        if env is not None:
            env.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._handle).st_size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return int(self._env.stat()["psize"])

    def stat(self) -> dict[str, int]:
        """Pages of the tree and of long data, as LMDB counts them."""
        with self.reading() as txn:
            return dict(txn.stat(self._env.open_db(None, txn=txn)))

    @contextmanager
    def reading(self, *, buffers: bool = False) -> Iterator[Any]:
        """A transaction that reads the newest state; with `buffers` its data hold for as long as it lasts.

        Raises:
            CorruptStoreError: the file has been cut short, or is not as LMDB writes it.
            StoreLostError: it cannot be read now.
        """
        with self._lock, self._reading_errors():
            if self.size < self._seen_bytes:
                raise self._damaged(f"it was cut from {self._seen_bytes:,} bytes to {self.size:,}")
            self._seen_bytes = self.size
            with self._begin(write=False, buffers=buffers) as txn:
                yield txn

    def get(self, key: bytes) -> bytes | None:
        """The data of a key."""
        with self.reading() as txn:
            data: bytes | None = txn.get(key)
            return data

    def write(self, change: Callable[[Any], T]) -> T:
        """Change it in one transaction, on disk when this returns; `change` is begun anew where space is short.

        Raises:
            StoreWriteError: full disk or no permission; nothing has changed.
        """
        with self._lock:
            while True:
                try:
                    with self._begin(write=True) as txn:
                        return change(txn)
                except lmdb.MapFullError:
                    size = self._env.info()["map_size"]
                    self._env.set_mapsize(size + min(max(size, _FIRST_MAP), _MOST_GROWTH))
                except (lmdb.Error, lmdb.MemoryError) as error:
                    raise cannot_write(self.path, OSError(first_line(error))) from error

    def _environment(self, new: bool) -> Any:
        writable = new or os.access(self.path, os.W_OK)
        lock_is_writable = os.access(self.path.parent, os.W_OK) or os.access(f"{self.path}{LOCK_SUFFIX}", os.W_OK)
        return lmdb.open(
            os.fsencode(os.path.realpath(self.path)),  # so that the lock's file is the same for everybody
            subdir=False,
            create=new,
            readonly=not writable,
            lock=lock_is_writable,  # where even that cannot be written, there is no writer to be kept from
            readahead=False,
            map_size=self._seen_bytes + _FIRST_MAP,
            max_readers=_READERS,
        )

    def _begin(self, *, write: bool, buffers: bool = False) -> Any:
        try:
            return self._env.begin(write=write, buffers=buffers)
        except lmdb.MapResizedError:  # another process has grown it
            self._env.set_mapsize(0)
            return self._env.begin(write=write, buffers=buffers)

    def _retrying(self, check: Callable[[], object]) -> None:
        """Check, and again where what seems to be wrong may be another process that has committed meanwhile."""
        before = b""
        for tries_left in reversed(range(_TRIES)):
            try:
                check()
                return
            except ValueError as error:
                now = os.pread(self._handle, 2 * _MOST_PAGE, 0)
                if now == before or not tries_left:
                    raise self._damaged(str(error)) from error
                before = now
                time.sleep(_PAUSE_S)

    def _check(self) -> None:
        with self.reading() as txn:
            metas = {meta.transaction: meta for meta in read_metas(self._handle)}
            newest = metas.pop(txn.id(), None)
            if newest is None:
                raise PageError("its newest state is not the one that LMDB takes")
            # Were the newest one's number damaged, the other would pass for the newest: so both must be what they say.
            # It is the one before, or, where a commit is under way, the one after; our slot keeps the pages of both.
            for number, other in metas.items():
                if number and Counts.from_bytes(Snapshot(self._handle, other).first_data()).transaction != number:
                    raise PageError("its two meta pages do not fit each other")
            tally = _Tally()
            Snapshot(self._handle, newest).check(tally)
            tally.require(Counts.from_bytes(txn.get(COUNTS) or b""), newest.transaction)

    @contextmanager
    def _reading_errors(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.Error, lmdb.MemoryError) as error:
            why, passing = first_line(error), isinstance(error, _PASSING)
            if "already open in this process" in why:
                why, passing = _FORKED, True
            require_damage(CannotReach(why) if passing else OSError(getattr(error, "code", None), why), self.path)
            raise self._damaged(why) from error

    def _damaged(self, fault: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self.path} cannot be read: {fault}; restore the file from a copy, or delete it and build it again"
        )


class _Tally:
    """Counts what a walk meets, and holds it against what the store says that it holds."""

    def __init__(self) -> None:
        self.found = dict.fromkeys((KEY, BLOCK, PLACE, BUNDLE), 0)
        self.checksum = 0

    def __call__(self, nodes: Nodes) -> None:
        kind = nodes.rows[:, 0]
        wrong = (nodes.key_bytes < 1) | (kind > BUNDLE[0])
        for prefix, key_bytes, data_bytes in ((KEY, 17, 4), (BLOCK, 13, 0), (PLACE, 5, 16), (BUNDLE, 5, None)):
            these = kind == prefix[0]
            wrong |= these & (nodes.key_bytes != key_bytes)
            if data_bytes is not None:
                wrong |= these & (nodes.is_big | (nodes.data_bytes != data_bytes))
                self.checksum += row_sum(nodes.rows[these])
            if key_bytes == 5:
                numbers = np.ascontiguousarray(nodes.rows[these, 1:5]).view(">u4")[:, 0]
                wrong[these] |= numbers != np.arange(self.found[prefix], self.found[prefix] + len(numbers))
            self.found[prefix] += int(these.sum())
        if wrong.any():
            raise PageError("an entry has another form than those that are written")

    def require(self, counts: Counts, transaction: int) -> None:
        """Raise PageError where the counts are others."""
        if counts.transaction != transaction:
            raise PageError("its counts are those of another state")
        found = (*self.found.values(), self.checksum % (1 << 64))
        if found != (counts.documents, counts.blocks, counts.documents, counts.bundles, counts.checksum):
            raise PageError("the entries that find documents are not those that were written")


def create_file(partial: Path, final: Path, entries: dict[bytes, bytes]) -> None:
    """Write a file with these entries below one name and give it another, where it appears whole; one that is there
    stays.

    Raises:
        StoreWriteError, OSError: it cannot be written.
    """
    try:
        file = LmdbFile(partial, new=True)
        try:

            def fill(txn: Any) -> None:
                for key, data in entries.items():
                    txn.put(key, data)
                txn.put(COUNTS, Counts(txn.id()).to_bytes())

            file.write(fill)
        finally:
            file.close()
        try:
            os.link(partial, final)
        except FileExistsError:
            pass
        except OSError:  # exFAT and some network file systems have no hard links
            if not final.exists():
                partial.rename(final)
    finally:
        for left in (partial, Path(f"{partial}{LOCK_SUFFIX}")):
            left.unlink(missing_ok=True)
