"""The files of a store behind a service, read through a folder: a shard is fetched when something of it is first read.

What lies in the folder is a store like any other, and is all there is while the service is away. Where a shard's
documents are looked up, which takes little, it is not fetched.
"""

import shutil
import threading
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from logitstore.durable import cannot_write, publish
from logitstore.entries import damaged, read_entry, read_root
from logitstore.errors import IncompatibleStoreError
from logitstore.files import Files, LocalFiles
from logitstore.http_files import HttpFiles
from logitstore.overlay import INDEX, STORE, trim, used
from logitstore.sealed import GROUP, FileEntries, are_file_entries, file_digest, read_group, unseal_group

T = TypeVar("T")
AT_ONCE = 4
"""Files of a shard that are fetched at the same time."""
TRIES = 2
"""A file that is not what its store names is fetched again so often, before that is the service's damage."""
LOOKED_UP = (GROUP, "documents", "blocks")
"""Of a shard, what tells which documents it holds."""


class Mirror:
    """Files, see `files.Files`: from the folder, from the service where that has more. Safe for several threads.

    Args:
        remote: None where the service does not answer.
        folder: of this URL in the overlay.
        most_bytes: the whole overlay takes no more.

    Raises:
        IncompatibleStoreError: the folder is of another store that was served there.
        ServiceError: as its name says.
        StoreError: what is served is none.
    """

    def __init__(self, remote: HttpFiles | None, folder: Path, most_bytes: int) -> None:
        self.remote = remote
        self.folder = folder
        self.fetched_bytes = 0
        """That came over the network."""
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        if remote is not None:
            self._fetch_root(remote)
        self._local = LocalFiles(folder / STORE)
        self._beside = LocalFiles(folder)

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
        return there if self.remote is None else there | self.remote.folders(folder, known)

    def _asking(self, name: str, question: Callable[[Files], T]) -> T:
        files = self._place(name)
        try:
            return question(files)
        except FileNotFoundError:
            again = self._place(name)  # another process may have trimmed the overlay since
            if self.remote is None or again is self.remote is files:
                raise
            return question(again)

    def _place(self, name: str) -> Files:
        """Who has a file, after it was fetched if need be."""
        match name.split("/"):
            case ["shards", shard, part, *_]:
                folder = self.folder / STORE / "shards" / shard
                if (folder / GROUP).exists():
                    used(folder)
                elif self.remote is not None:
                    if part in LOOKED_UP:
                        return self.remote
                    self._fetch_shard(self.remote, shard)
                return self._local
            case [part, *_] if part == INDEX:
                if self.remote is None:
                    raise FileNotFoundError(2, "there is no index of what was fetched", name)
                if name == f"{INDEX}/{GROUP}":
                    self._fetch_index(self.remote)
                return self._beside
            case [part, *_] if part in (GROUP, "vocabulary", "shards"):
                return self._local
        return self.remote or self._local

    def _fetch_root(self, remote: HttpFiles) -> None:
        final, served = self.folder / STORE, read_group(remote)
        if not final.exists():
            files = read_root(remote, remote.client.url).files
            self._fetch(remote, "", served, files, final)
        kept = (final / GROUP).read_bytes()
        if kept != served:
            raise IncompatibleStoreError(
                f"{remote.client.url} is another store than the one that was fetched into {self.folder}; delete that "
                "folder, or type another --overlay"
            )

    def _fetch_index(self, remote: HttpFiles) -> None:
        """Have the index that the service has now."""
        with self._lock:
            served, final = read_group(remote, INDEX), self.folder / INDEX
            with suppress(FileNotFoundError):
                if (final / GROUP).read_bytes() == served:
                    return
            files = unseal_group(served, f"{remote.client.url}/{INDEX}").get("files")
            if not are_file_entries(files):
                raise damaged(f"{remote.client.url}/{INDEX}/{GROUP}", "says what no logitstore writes")
            with suppress(FileNotFoundError):
                shutil.rmtree(final.rename(final.with_name(f".partial-removed-{uuid4().hex}")))
            self._fetch(remote, INDEX, served, files, final)

    def _fetch_shard(self, remote: HttpFiles, shard: str) -> None:
        where, final = f"shards/{shard}", self.folder / STORE / "shards" / shard
        with self._lock:
            if not (final / GROUP).exists():
                entry = read_entry(remote, where)
                self._fetch(remote, where, read_group(remote, where), entry.files, final)
                trim(self.folder.parent, self._most_bytes, keep=final)

    def _fetch(self, remote: HttpFiles, where: str, group: bytes, files: FileEntries, final: Path) -> None:
        """Make a folder of the files that a group names, whole and checked, or none."""
        partial = final.with_name(f".partial-{uuid4().hex}")

        def fetch(name: str) -> None:
            full = f"{where}/{name}".lstrip("/")
            looked_up = where.startswith("shards/") and name.split("/")[0] in LOOKED_UP  # so it is in memory
            for _ in range(TRIES):
                data = remote.read(full) if looked_up else remote.client.read(full)
                if (len(data), file_digest(data)) == (files[name]["bytes"], files[name]["digest"]):
                    break
                looked_up = False
            else:
                raise damaged(f"{remote.client.url}/{full}", "its bytes are not those that its store names")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
            self.fetched_bytes += len(data)

        try:
            partial.mkdir(parents=True)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(fetch, files))
            (partial / GROUP).write_bytes(group)
            publish(partial, final)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
