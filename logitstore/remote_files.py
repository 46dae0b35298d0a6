"""A store in an object store: s3://, gs://, az:// through `obstore`, the only file that speaks to it. Read only.

A file is fetched whole, once, and kept while there is room: its digest is held against all of it before a value is
used, so a part of a file is never enough.
"""

import threading
from collections import OrderedDict
from collections.abc import Set
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import StoreFormatError, first_line
from logitstore.files import CannotList

KEPT_BYTES = 512 << 20
TIMEOUT_S = 30
RETRIES = 4


class RemoteFiles:
    """The files below a URL. Safe for several threads.

    Raises:
        StoreFormatError: `obstore` is not installed, or knows no such URL.
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import HTTPStore, from_url
        except ImportError as error:
            raise StoreFormatError(f"{url} needs obstore; type `pip install 'logitstore[remote]'`") from error
        self.url = url
        self._obstore: Any = obstore
        try:
            self._store: Any = from_url(
                url,
                client_options={"timeout": timedelta(seconds=TIMEOUT_S), "allow_http": True},
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=2 * TIMEOUT_S)},
            )
        except Exception as error:  # obstore raises what its parsers raise
            raise StoreFormatError(f"{url} is no URL that obstore knows ({first_line(error)})") from error
        self._lists = not isinstance(self._store, HTTPStore)
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `files.Files`."""
        with self._lock:
            data = self._kept.pop(name, None)
            if data is None:
                data = self._ask(lambda: bytes(self._obstore.get(self._store, name).bytes()), name)
            self._kept[name] = data
            while sum(map(len, self._kept.values())) > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return data[start:stop]

    def size(self, name: str) -> int:
        """See `files.Files`."""
        kept = self._kept.get(name)
        if kept is not None:
            return len(kept)
        return int(self._ask(lambda: self._obstore.head(self._store, name)["size"], name))

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """See `files.Files`."""
        return np.frombuffer(self.read(name), np.uint8)

    def names(self, folder: str = "") -> list[str]:
        """See `files.Files`."""
        self._require_listing(folder)
        prefix = f"{folder}/" if folder else ""
        found = self._ask(lambda: [item["path"] for page in self._list(folder) for item in page], folder)
        below = (path.removeprefix(prefix) for path in found)
        return sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `files.Files`."""
        del known
        self._require_listing(folder)
        found = self._ask(lambda: self._obstore.list_with_delimiter(self._store, folder)["common_prefixes"], folder)
        names = (path.rstrip("/").split("/")[-1] for path in found)
        return {name for name in names if not name.startswith(".")}

    def _require_listing(self, folder: str) -> None:
        if not self._lists:
            raise CannotList(f"{self.url}/{folder} cannot be listed: plain HTTP has no folders")

    def _list(self, folder: str) -> Any:
        return self._obstore.list(self._store, prefix=folder or None)

    def _ask(self, question: Any, name: str) -> Any:
        try:
            return question()
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None
        except Exception as error:  # obstore raises what the network and its servers give
            raise OSError(f"{self.url}/{name} cannot be read ({first_line(error)})") from error
