"""Writing so that a kill, a crash or a full disk leaves a thing whole or not there: flushed first, then one rename."""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from uuid import uuid4

from logitstore.errors import StoreWriteError


def publish(partial: Path, final: Path) -> None:
    """Make a finished folder appear under its name; where there is one already, that one stays."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    sync(final.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def flush(handle: int) -> None:
    """Flush an open file to the medium: on macOS fsync ends in the drive's cache, and F_FULLFSYNC empties that too.

    Raises:
        OSError: full disk, or a disk that fails.
    """
    os.fsync(handle)
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # a file system without that call; what can be flushed there is
            fcntl.fcntl(handle, full)


def write_whole(handle: FileIO, data: bytes) -> None:
    """Write all of some bytes to a file without a buffer, which takes less at a time where they are many.

    Raises:
        OSError: full disk.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[handle.write(rest) :]


def read_whole(handle: FileIO, size: int) -> bytes:
    """The next bytes of a file without a buffer, which gives at most 2 GiB at a time; fewer where it ends before."""
    pieces: list[bytes] = []
    while size and (piece := handle.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other process is in this block for the folder; False where the file system has no such locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:  # some network file systems lock no folders
            locked = False
        yield locked
    finally:
        os.close(handle)


@contextmanager
def beginning(path: Path) -> Iterator[Path | None]:
    """Yield a name beside `path` under which to make what is then given that name; None where there is one by now.

    One process at a time is in this block. What killed ones left is removed, and so is what is left at its end.

    Raises:
        StoreWriteError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent) as alone:
            if alone:
                for left in begun_beside(path):
                    _remove(left)
            partial = None if path.exists() else path.with_name(f".partial-{path.name}-{uuid4().hex}")
            try:
                yield partial
            finally:
                if partial is not None:
                    with suppress(OSError):
                        _remove(partial)
    except OSError as error:
        raise cannot_write(path, error) from error


def replace_folder(final: Path, is_good: Callable[[], bool], write: Callable[[Path], object]) -> bool:
    """Make a folder anew, in the place of the one that is there; nothing where that is found to be good.

    One process at a time does in the folder around it, and removes what killed ones have left there.

    Returns:
        Whether it was made.

    Raises:
        StoreWriteError: full disk or no permission.
    """
    around = final.parent
    partial, old = (around / f".partial-{which}{final.name}-{uuid4().hex}" for which in ("", "old-"))
    try:
        with alone_in(around) as alone:
            if alone:
                for left in around.glob(".partial-*"):
                    shutil.rmtree(left)
            if is_good():
                return False
            try:
                partial.mkdir()
                write(partial)
                if final.exists():
                    final.rename(old)
                publish(partial, final)
            finally:
                for left in (partial, old):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise cannot_write(around, error) from error
    return True


def begun_beside(path: Path) -> list[Path]:
    """What is being made to be given this name, or was when a process was killed; nothing of names that begin alike."""
    name = re.compile(rf"\.partial-{re.escape(path.name)}-[0-9a-f]+(-lock)?")
    return sorted(found for found in path.parent.iterdir() if name.fullmatch(found.name))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> StoreWriteError:
    """The one line for a full disk, a missing permission and the like."""
    return StoreWriteError(
        f"{path} cannot be written: {error.strerror or error}; nothing that was finished is lost, "
        "mend this and type the same command to go on"
    )
