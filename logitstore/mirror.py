"""The files of a store behind a service, read through a folder: a shard is fetched when something of it is first read.

What lies in the folder is a store like any other, and is all there is while the service is away. Where a shard's
documents are looked up, which takes little, it is not fetched.
"""

import shutil
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from logitstore.durable import cannot_write, publish
from logitstore.entries import damaged, read_entry, read_root, root_of
from logitstore.errors import (
    CorruptStoreError,
    IncompatibleStoreError,
    ServiceError,
    StoreFormatError,
    StoreWriteError,
)
from logitstore.files import Files, LocalFiles
from logitstore.http_files import HttpFiles
from logitstore.overlay import INDEX, PARTIAL, SHARDS, STORE, remove, trim, used
from logitstore.sealed import (
    GROUP,
    FileEntries,
    are_file_entries,
    file_problems,
    pieces_digest,
    read_group,
    unseal_group,
)

T = TypeVar("T")
AT_ONCE = 8
"""Files that are fetched at the same time."""
TRIES = 2
"""A file that is not what its store names is fetched again so often, before that is the service's damage."""
LOOKED_UP = (GROUP, "documents", "blocks")
"""Of a shard, what tells which documents it holds."""
AHEAD, DOCUMENTS = 16, (GROUP, f"documents/{GROUP}", "documents/c/0/0")
"""So many shards are looked into together, at these files: a round trip for each would be felt."""
INDEX_S = 1.0
"""The service is asked for its index no more often than this."""


class Mirror:
    """Files, see `files.Files`: from the folder, from the service where that has more. Safe for several threads.

    Args:
        remote: None where the service does not answer.
        folder: of this URL in the overlay.
        most_bytes: the whole overlay takes no more.

    Raises:
        IncompatibleStoreError: the folder is of another store that was served there.
        ServiceError: as its name says.
        StoreError: what is served is none, or what was fetched of it is damaged.
    """

    def __init__(self, remote: HttpFiles | None, folder: Path, most_bytes: int) -> None:
        self.remote: HttpFiles | None = None
        self.folder = folder
        self.fetched_bytes = 0
        """That came over the network."""
        self.trimmed = 0
        """Shards of this URL that went to make room."""
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._looked = -INDEX_S
        self._shards: list[str] = []
        self._local = LocalFiles(folder / STORE)
        self._beside = LocalFiles(folder)
        if remote is not None:
            self.attach(remote)
        else:
            self._require_whole()

    def attach(self, remote: HttpFiles) -> None:
        """Ask a service from now on.

        Raises:
            IncompatibleStoreError, ServiceError, StoreError: as for all.
        """
        final = self.folder / STORE
        try:
            served = read_group(remote)
        except FileNotFoundError:
            raise ServiceError(f"there is no store at {remote.client.url}") from None
        if not final.exists():
            self._fetch(remote, "", served, read_root(remote, remote.client.url).files, final)
        if (final / GROUP).read_bytes() != served:
            raise IncompatibleStoreError(
                f"{remote.client.url} is another store than the one that was fetched into {self.folder}; delete that "
                "folder, or type another --overlay"
            )
        self._require_whole()
        self.remote = remote

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `files.Files`."""
        return self._asking(name, lambda files: files.read(name, start, stop))

    def size(self, name: str) -> int:
        """See `files.Files`."""
        return self._asking(name, lambda files: files.size(name))

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """See `files.Files`."""
        return self._asking(name, lambda files: files.mapped(name))

    def names(self, folder: str = "") -> list[str]:
        """See `files.Files`; those in the folder."""
        return self._local.names(folder)

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `files.Files`; with those that can be fetched."""
        there = self._local.folders(folder, known)
        if self.remote is None:
            return there
        self._shards = sorted(known)
        there |= self.remote.folders(folder, known)
        self._shards = sorted(there)
        return there

    def mend(self) -> list[str]:
        """Remove what is damaged in the folder, to be fetched again: all of its bytes are read. What went.

        Raises:
            StoreWriteError: no permission.
        """
        gone = []
        for name in sorted(self._local.folders(SHARDS)):
            if not self._is_good(self._local, f"{SHARDS}/{name}") and remove(self.folder / STORE / SHARDS / name):
                gone.append(name)
        if (self.folder / INDEX).exists() and not self._is_good(self._beside, INDEX) and remove(self.folder / INDEX):
            gone.append(INDEX)
        self._looked = -INDEX_S
        self._local.close()  # handles of what is gone
        return gone

    def _is_good(self, files: Files, where: str) -> bool:
        try:
            entries = unseal_group(read_group(files, where), where).get("files")
            return are_file_entries(entries) and not any(file_problems(files, where, entries))
        except (CorruptStoreError, OSError):
            return False

    def _require_whole(self) -> None:
        """Hold what every reader needs against its digests."""
        final = self.folder / STORE
        try:
            root = root_of((final / GROUP).read_bytes(), final / GROUP, final)
            problem = next(iter(file_problems(self._local, "", root.files)), None)
        except (CorruptStoreError, StoreFormatError, OSError) as error:
            raise CorruptStoreError(
                f"{final} cannot be read: {error}; delete {self.folder}, and it is fetched again"
            ) from error
        if problem is not None:
            raise CorruptStoreError(
                f"{final}/{problem.file}: {problem.fault}; delete {self.folder}, and it is fetched again"
            )
        self._fingerprint = root.manifest.fingerprint

    def _asking(self, name: str, question: Callable[[Files], T]) -> T:
        files = self._place(name)
        try:
            return question(files)
        except FileNotFoundError:
            again = self._place(name)  # another process may have trimmed the overlay since
            if again is self.remote is files:
                raise
            return question(again)

    def _place(self, name: str) -> Files:
        """Who has a file, after it was fetched if need be."""
        remote = self.remote
        match name.split("/"):
            case ["shards", shard, part, *_]:
                folder = self.folder / STORE / SHARDS / shard
                if (folder / GROUP).exists():
                    used(folder)
                elif remote is not None:
                    if part in LOOKED_UP:
                        self._look_ahead(remote, shard)
                        return remote
                    self._fetch_shard(remote, shard)
                return self._local
            case [part, *_] if part == INDEX:
                if remote is None:
                    raise FileNotFoundError(2, "there is no index of what was fetched", name)
                if name == f"{INDEX}/{GROUP}" or not (self.folder / INDEX / GROUP).exists():
                    self._fetch_index(remote)
                return self._beside
            case [part, *_] if part in (GROUP, "vocabulary", "shards"):
                return self._local
        return remote or self._local

    def _look_ahead(self, remote: HttpFiles, shard: str) -> None:
        """Look into a shard, and into those after it, that nobody has looked into."""
        if remote.keeps(f"{SHARDS}/{shard}/{GROUP}"):
            return
        at = bisect_left(self._shards, shard)
        some = [name for name in self._shards[at : at + AHEAD] if not (self.folder / STORE / SHARDS / name).exists()]
        wanted = (f"{SHARDS}/{name}/{file}" for name in some for file in DOCUMENTS)

        def read(name: str) -> None:
            with suppress(FileNotFoundError):  # told to who asks for it
                remote.read(name)

        together(read, [name for name in wanted if not remote.keeps(name)])

    def _fetch_index(self, remote: HttpFiles) -> None:
        """Have the index that the service has now."""
        with self._lock:
            final = self.folder / INDEX
            if final.exists() and time.monotonic() - self._looked < INDEX_S:
                return
            while not self._fetched_index(remote, read_group(remote, INDEX), final):
                pass  # the service has replaced it meanwhile

    def _fetched_index(self, remote: HttpFiles, served: bytes, final: Path) -> bool:
        """Fetch the index of which this is the `zarr.json`; False where the service has another one by now."""
        self._looked = time.monotonic()
        with suppress(FileNotFoundError):
            if (final / GROUP).read_bytes() == served:
                used(final)
                return True
        files = unseal_group(served, f"{remote.client.url}/{INDEX}").get("files")
        if not are_file_entries(files):
            raise damaged(f"{remote.client.url}/{INDEX}/{GROUP}", "says what no logitstore writes")
        remove(final)
        try:
            self._fetch(remote, INDEX, served, files, final)
        except (CorruptStoreError, FileNotFoundError):
            if read_group(remote, INDEX) == served:
                raise
            return False
        return True

    def _fetch_shard(self, remote: HttpFiles, shard: str) -> None:
        where, final = f"{SHARDS}/{shard}", self.folder / STORE / SHARDS / shard
        with self._lock:
            for last in (False, True):
                if (final / GROUP).exists():
                    return
                try:
                    entry = read_entry(remote, where)
                    if entry.fingerprint != self._fingerprint:
                        raise IncompatibleStoreError(
                            f"{remote.client.url} is another store by now than it was; type the command again"
                        )
                    self._fetch(remote, where, read_group(remote, where), entry.files, final)
                    break
                except CorruptStoreError:
                    remote.forget(where)  # the service has mended the shard since it was looked into, or it is damaged
                    if last:
                        raise
            gone = trim(self.folder.parent, self._most_bytes, keep=final)
            self.trimmed += sum(each.path.parent == final.parent for each in gone)

    def _fetch(self, remote: HttpFiles, where: str, group: bytes, files: FileEntries, final: Path) -> None:
        """Make a folder of the files that a group names, whole and checked, or none."""
        whole = sum(max(entry["bytes"], 0) for entry in files.values())
        if whole > self._most_bytes:
            raise StoreWriteError(
                f"{remote.client.url}/{where} has {whole:,} bytes, and the overlay may take {self._most_bytes:,}; type "
                "--overlay-gb with more"
            )
        partial = final.with_name(f"{PARTIAL}{uuid4().hex}")

        def fetch(name: str) -> None:
            path, full, entry = partial / name, f"{where}/{name}".lstrip("/"), files[name]
            for number in range(TRIES):
                if _write(path, self._pieces(remote, full, entry["bytes"], fresh=number > 0)) == entry["digest"]:
                    return
            raise damaged(f"{remote.client.url}/{full}", "its bytes are not those that its store names")

        try:
            for folder in {(partial / name).parent for name in files} | {partial}:
                folder.mkdir(parents=True, exist_ok=True)
            together(fetch, files)
            (partial / GROUP).write_bytes(group)
            publish(partial, final)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _pieces(self, remote: HttpFiles, name: str, size: int, *, fresh: bool) -> Iterable[bytes]:
        """A file's bytes, and a byte more where it is longer than it should be."""
        try:
            if remote.keeps(name) and not fresh:
                yield remote.read(name)
                return
            for piece in remote.client.stream(name, 0, size + 1):
                self.fetched_bytes += len(piece)
                yield piece
        except FileNotFoundError as error:
            raise damaged(f"{remote.client.url}/{name}", "the service has no such file") from error


def together(each: Callable[[str], object], names: Iterable[str]) -> None:
    """Do something for all names, for some at a time; after the first that fails none is begun."""
    failed = threading.Event()

    def one(name: str) -> None:
        if failed.is_set():
            return
        try:
            each(name)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            list(pool.map(one, names))
        except BaseException:  # Ctrl-C too
            failed.set()
            raise


def _write(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file, and give its `sealed.file_digest`."""
    with path.open("wb") as file:

        def written() -> Iterator[bytes]:
            for piece in pieces:
                file.write(piece)
                yield piece

        return pieces_digest(written())
