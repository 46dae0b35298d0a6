"""A store's files behind http(s)://: a `logitstore serve`, or any web server that gives files by their names.

Read only. A file is fetched whole, since its digest is held against all of it before a value is used. What is written
once is kept in memory while there is room; what may be replaced, as the index, is asked for each time.
"""

from collections.abc import Set

import numpy as np
import numpy.typing as npt

from logitstore.file_cache import FileCache
from logitstore.files import WRITE_ONCE, CannotList
from logitstore.sealed import GROUP, MOST_JSON_BYTES
from logitstore.service_client import ServiceClient

KEPT = (WRITE_ONCE, "vocabulary/")
MOST_FILE_BYTES = 8 << 30
"""A file that is held in memory is no longer."""


class HttpFiles:
    """The files below a URL. Safe for several threads. What the network or its server does raises `ServiceError`.

    Args:
        lists: it is a service, which tells what shards there are; else nothing is listed.
    """

    def __init__(self, client: ServiceClient, *, lists: bool) -> None:
        self.client = client
        self._lists = lists
        self._kept = FileCache()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `files.Files`."""
        if not name.startswith(KEPT):
            return self._fetched(name, start, stop)
        data = self._kept.get(name)
        if data is None:
            data = self._fetched(name)
            self._kept.put(name, data)
        return data[start:stop]

    def forget(self, folder: str) -> None:
        """Ask again for what is below a folder: it is not what it was."""
        self._kept.drop_below(folder)

    def _fetched(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        most = start + (MOST_JSON_BYTES + 1 if name.endswith(GROUP) else MOST_FILE_BYTES)
        return self.client.read(name, start, most if stop is None else min(stop, most))

    def keeps(self, name: str) -> bool:
        """Whether a file is in memory."""
        return name in self._kept

    def size(self, name: str) -> int:
        """See `files.Files`. Who asks it of a file that is written once reads that next."""
        return len(self.read(name)) if name.startswith(KEPT) else self.client.size(name)

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """See `files.Files`."""
        return np.frombuffer(self.read(name), np.uint8)

    def names(self, folder: str = "") -> list[str]:
        """See `files.Files`."""
        raise self._cannot_list(folder)

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `files.Files`."""
        del known
        if not self._lists or folder != "shards":
            raise self._cannot_list(folder)
        return set(self.client.shards())

    def _cannot_list(self, folder: str) -> CannotList:
        return CannotList(f"{self.client.url}/{folder} cannot be listed: HTTP has no folders")
