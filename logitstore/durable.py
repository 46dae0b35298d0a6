"""Writing so that a kill, a crash or a full disk leaves a thing whole or not there: flushed first, then one rename."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def cannot_write(path: Path, error: OSError) -> StoreWriteError:
    """The one line for a full disk, a missing permission and the like."""
    return StoreWriteError(
        f"{path} cannot be written: {error.strerror or error}; nothing that was finished is lost, "
        "mend this and type the same command to go on"
    )
