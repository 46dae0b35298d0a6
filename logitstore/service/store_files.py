"""A store's files over HTTP, as plain Zarr readers, CDNs and nginx know them: ranges, ETags, caching for good.

Shards and the vocabulary are written once, so whoever holds one never asks again. Files whose names begin with a dot
are being written, and are not there.
"""

import os
import re
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from logitstore.entries import read_entry
from logitstore.errors import CorruptStoreError
from logitstore.sealed import GROUP, MOST_JSON_BYTES, file_digest
from logitstore.service.access import Access
from logitstore.service.shelf import Served, Shelf

PIECE = 1 << 18
WRITE_ONCE = ("shards", "vocabulary")
FOR_GOOD, ASK_AGAIN = "max-age=31536000, immutable", "no-cache"
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


@dataclass
class OpenFile:
    """A file that is being sent."""

    size: int
    read: Callable[[int, int], bytes]
    etag: str
    handle: int | None = None

    def close(self) -> None:
        """Close it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()  # of an answer that nobody began to read


def routes(shelf: Shelf, access: Access) -> list[Route]:
    """GET and HEAD of /NAME/PATH."""

    async def get(request: Request) -> Response:
        name = request.path_params["name"]
        access.require(request, "read", name)
        shared = "public" if access.tokens is None else "private"
        path = request.scope["path"].partition(f"/{name}/")[2]  # the route's own match leaves out a newline at the end
        return await run_in_threadpool(answer, shelf, name, path, request, shared)

    return [Route("/{name}/{path:path}", get, methods=["GET", "HEAD"])]


def answer(shelf: Shelf, name: str, path: str, request: Request, shared: str) -> Response:
    """The file, a part of it, or word that the client has it.

    Raises:
        HTTPException: 404, or 416 for a range beyond it.
        UnknownStoreError: as its name says.
    """
    parts = path.split("/")
    file = open_file(shelf.get(name), parts)
    once = parts[0] in WRITE_ONCE
    headers = {
        "ETag": file.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": f"{shared}, {FOR_GOOD if once else ASK_AGAIN}",
        "Content-Type": "application/json" if parts[-1] == GROUP else "application/octet-stream",
    }
    try:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known or known == ["*"]:
            return _closing(file, Response(status_code=304, headers=headers))
        start, stop, status = 0, file.size, 200
        asked = request.headers.get("range", "") if request.method == "GET" else ""
        if asked and request.headers.get("if-range", file.etag) == file.etag:
            found = part_of(asked, file.size)
            if found is not None:
                (start, stop), status = found, 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        headers["Content-Length"] = str(stop - start)
        if request.method == "HEAD":
            return _closing(file, Response(status_code=status, headers=headers))
        return _Sent(file, start, stop, status, headers)
    except BaseException:
        file.close()
        raise


def part_of(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes start .. stop - 1 that a Range header asks for; None where all may be sent, as of several ranges.

    Raises:
        HTTPException: 416, none of these bytes is there.
    """
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        raise HTTPException(
            416, f"the file has {size:,} bytes, and none of {asked}", {"Content-Range": f"bytes */{size}"}
        )
    return start, stop


def open_file(served: Served, parts: list[str]) -> OpenFile:
    """Open a file of a store.

    Raises:
        HTTPException: 404, there is none that may be seen.
    """
    missing = HTTPException(404, f"{served.name} has no such file")
    if not all(part and not part.startswith(".") and part.isprintable() and "\\" not in part for part in parts):
        raise missing
    name = "/".join(parts)
    try:
        if not served.path.is_dir():
            size = served.files.size(name)
            etag = _etag(served, parts, f"{name}-{served.stat.st_mtime_ns}-{served.stat.st_ino}")
            return OpenFile(size, lambda a, b: served.files.read(name, a, b), etag)
        handle = _open_inside(served.path, parts)
        try:
            found = os.fstat(handle)
            etag = _etag(served, parts, f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}")
        except BaseException:
            os.close(handle)
            raise
        return OpenFile(found.st_size, lambda a, b: os.pread(handle, b - a, a), etag, handle)
    except (OSError, ValueError):
        raise missing from None


def _open_inside(root: Path, parts: list[str]) -> int:
    """Open a regular file below a folder, following no link on the way."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileNotFoundError
    return handle


def _etag(served: Served, parts: list[str], version: str) -> str:
    """The digest that the store itself gives, where it names the file; else what tells this version from others."""
    name = "/".join(parts)
    with suppress(OSError, CorruptStoreError):
        if parts[-1] == GROUP and len(parts) in (1, 3):
            return f'"{file_digest(served.files.read(name, 0, MOST_JSON_BYTES))}"'
        if parts[0] == "shards" and len(parts) > 2:
            entry = read_entry(served.files, "/".join(parts[:2])).files.get("/".join(parts[2:]))
        else:
            entry = served.store.root.files.get(name)
        if entry is not None:
            return f'"{entry["digest"]}"'
    return f'"{file_digest(version.encode())}"'


class _Sent(StreamingResponse):
    """A part of a file, which is closed when it is sent, or its client has gone."""

    def __init__(self, file: OpenFile, start: int, stop: int, status: int, headers: dict[str, str]) -> None:
        super().__init__(_pieces(file, start, stop), status, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


async def _pieces(file: OpenFile, start: int, stop: int) -> AsyncIterator[bytes]:
    for at in range(start, stop, PIECE):
        piece = await run_in_threadpool(file.read, at, min(at + PIECE, stop))
        if not piece:
            return  # it was cut meanwhile: so is the answer, and the client sees that it is short
        yield piece


def _closing(file: OpenFile, response: Response) -> Response:
    file.close()
    return response
