"""A store in an object store: s3://, gs://, az:// through `obstore`, the only file that speaks to it.

A file is fetched whole, once, and kept while there is room: its digest is held against all of it before a value is
used, so a part of a file is never enough. Only `stream`, `digest` and `put`, for moving stores, go through a file once
and keep nothing.
"""

import queue
import re
import threading
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import StoreFormatError, first_line
from logitstore.file_cache import FileCache
from logitstore.files import CannotList, CannotReach
from logitstore.sealed import GROUP, MOST_JSON_BYTES, pieces_digest

TIMEOUT_S = 30
"""Without a byte. However long a file takes as a whole, an hour is enough."""
WHOLE_S = 3600
RETRIES = 4
PART_BYTES = 8 << 20
"""Of a file that is written in several requests."""
AHEAD = 16


class RemoteFiles:
    """The files below a URL. Safe for several threads.

    Raises:
        StoreFormatError: `obstore` is not installed, or knows no such URL.
    """

    def __init__(
        self, url: str, listing: Sequence[str] | None = None, token: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Open what lies below a URL.

        Args:
            listing: every file there, where it is known from elsewhere: plain HTTP lists none.
            timeout_s: without a byte, by default `TIMEOUT_S`; in which a request's bytes must have been taken, too.
            token: for the Authorization header of plain HTTP.
        """
        try:
            import obstore
            from obstore.store import HTTPStore, from_url
        except ImportError as error:
            raise StoreFormatError(f"{url} needs obstore; type `pip install 'logitstore[remote]'`") from error
        self.url = url
        self._obstore: Any = obstore
        options: Any = {
            "timeout": timedelta(seconds=WHOLE_S),
            "read_timeout": timedelta(seconds=timeout_s or TIMEOUT_S),
            "allow_http": True,
        }
        if token and re.match("https?://", url):
            options["default_headers"] = {"authorization": f"Bearer {token}"}
        retries: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=2 * TIMEOUT_S)}
        try:
            self._store: Any = from_url(url, client_options=options, retry_config=retries)
        except Exception as error:  # obstore raises what its parsers raise
            raise StoreFormatError(f"{url} is no URL that obstore knows ({first_line(error)})") from error
        self._lists = not isinstance(self._store, HTTPStore)
        self._listing = None if listing is None else sorted(listing)
        self.listed = frozenset(listing or ())
        self._kept = FileCache()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `files.Files`."""
        data = self._kept.get(name)
        if data is None:
            if name.split("/")[-1] == GROUP:  # what is too long is not fetched whole to find out
                data = b"".join(self.stream(name, 0, MOST_JSON_BYTES + 1))
            else:
                data = self._ask(lambda: bytes(self._obstore.get(self._store, name).bytes()), name)
            self._kept.put(name, data)
        return data[start:stop]

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start .. stop - 1 of a file in pieces, as they come; fewer where it ends before.

        Raises:
            OSError: as `read`, now or between two pieces.
        """
        options = {"range": {"offset": start}} if start else {}
        try:
            found = self._ask(lambda: self._obstore.get(self._store, name, options=options), name)
        except _NoRangesError:
            found = self._ask(lambda: self._obstore.get(self._store, name), name)
        pieces, at = iter(found.stream(min_chunk_size=1)), int(found.range[0])
        while at < stop:
            piece: bytes | None = self._ask(
                lambda: bytes(got) if (got := next(pieces, None)) is not None else None, name
            )
            if piece is None:
                return
            if at + len(piece) > start:
                yield piece[max(start - at, 0) : stop - at]
            at += len(piece)

    def digest(self, name: str, size: int) -> str:
        """`sealed.file_digest` of a file of so many bytes."""
        return pieces_digest(self.stream(name, 0, size))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its name from the URL.

        Raises:
            CannotList: as `names`.
        """
        self._require_listing(folder)
        pages = self._ask(lambda: list(self._list(folder)), folder)
        return {item["path"]: int(item["size"]) for page in pages for item in page}

    def put(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Write a file of so many bytes: whole, or not at all. What the pieces raise goes through.

        Raises:
            OSError: it cannot be written.
        """
        if size <= PART_BYTES:
            data: Any = b"".join(pieces)
        else:
            data = _Fetched(pieces)
        try:
            self._obstore.put(self._store, name, data, chunk_size=PART_BYTES, max_concurrency=2)
        except Exception as error:
            if isinstance(data, _Fetched) and data.error is not None:
                raise data.error from None
            raise OSError(f"{self.url}/{name} cannot be written ({first_line(error)})") from error
        finally:
            if isinstance(data, _Fetched):
                data.close()
        self._kept.drop(name)

    def delete(self, name: str) -> None:
        """Remove a file.

        Raises:
            OSError: it cannot be removed.
        """
        self._ask(lambda: self._obstore.delete(self._store, name), name)
        self._kept.drop(name)

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
        if self._listing is not None:
            found = [name for name in self._listing if name.startswith(prefix)]
        else:
            found = self._ask(lambda: [item["path"] for page in self._list(folder) for item in page], folder)
        below = (path.removeprefix(prefix) for path in found)
        return sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `files.Files`."""
        del known
        self._require_listing(folder)
        if self._listing is not None:
            return {name.split("/")[0] for name in self.names(folder) if "/" in name}
        found = self._ask(lambda: self._obstore.list_with_delimiter(self._store, folder)["common_prefixes"], folder)
        names = (path.rstrip("/").split("/")[-1] for path in found)
        return {name for name in names if not name.startswith(".")}

    def _require_listing(self, folder: str) -> None:
        if not self._lists and self._listing is None:
            raise CannotList(f"{self.url}/{folder} cannot be listed: plain HTTP has no folders")

    def _list(self, folder: str) -> Any:
        return self._obstore.list(self._store, prefix=folder or None)

    def _ask(self, question: Any, name: str) -> Any:
        try:
            return question()
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such file", f"{self.url}/{name}") from None
        except self._obstore.exceptions.NotSupportedError as error:
            raise _NoRangesError(f"{self.url}/{name} is not given in parts") from error
        except Exception as error:  # obstore raises what the network and its servers give
            raise CannotReach(f"{self.url}/{name} cannot be read ({first_line(error)})") from error


class _NoRangesError(OSError):
    """A server that gives a file as a whole only."""


class _Fetched:
    """Pieces that another thread fetches, a few ahead: obstore must not be asked for bytes while it asks for bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(AHEAD)
        self._closed = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch, args=(pieces,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = self._queue.get()
        if piece is not None:
            return piece
        if self.error is not None:
            raise OSError("the source broke off")  # so that nothing is written; `error` says why
        raise StopIteration

    def close(self) -> None:
        """Fetch no more."""
        self._closed = True
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)

    def _fetch(self, pieces: Iterable[bytes]) -> None:
        try:
            for piece in pieces:
                if self._closed:
                    return
                self._queue.put(piece)
        except BaseException as error:
            self.error = error
        self._queue.put(None)
