"""A file that appears under its name whole, or not at all: how zip files, Parquet files and pages are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, FileIO
from pathlib import Path

from logitstore.durable import cannot_write, flush, sync
from logitstore.errors import StoreWriteError
from logitstore.journal import open_locked


@contextmanager
def replaced(path: Path) -> Iterator[BufferedRandom]:
    """Write a file beside `path`, and rename it to that when the block ends well; one process at a time.

    What a killed process has left under the temporary name is written over. Of a link, what it points to is replaced.

    Raises:
        StoreWriteError: it is a folder or a device, another process writes it, full disk or no permission.
    """
    if path.is_dir():
        raise StoreWriteError(f"{path} is a folder, expected a file; type a path in it, with a name")
    if path.exists() and not path.is_file():
        raise StoreWriteError(f"{path} is no regular file, and would be replaced by one; type another path")
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _begun(partial)
    except BlockingIOError as error:
        raise StoreWriteError(f"another process is writing {path}; wait for it, or end it") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        raw.truncate(0)
        file = BufferedRandom(raw)
        yield file
        file.flush()
        flush(raw.fileno())
        partial.rename(path)
        sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    finally:
        raw.close()


def _begun(partial: Path) -> FileIO:
    while True:
        raw = open_locked(partial)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(raw.fileno()), partial.stat()):
                return raw
        raw.close()  # its holder renamed it between our two calls
