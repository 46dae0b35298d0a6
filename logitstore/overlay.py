"""What was fetched from services, on this machine's disk: a folder for each URL, bounded in bytes, the least used out.

    OVERLAY/HOST-PORT-NAME/
        url            whose it is
        store/         a store like any other, of the shards that were fetched
        index/         the service's index, which names the others too
        taught.lmdb    what its teacher answered

All of it can be had again, so all of it may go: `logitstore gc --overlay`.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from logitstore.durable import alone_in, cannot_write

STORE, INDEX, TAUGHT, URL = "store", "index", "taught.lmdb", "url"
USED_S = 60.0
"""A use is noted no more often than this."""


def default_overlay() -> Path:
    """Where fetched stores lie unless it is said otherwise: in the user's cache folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "logitstore"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitstore"


def folder_of(overlay: Path, url: str) -> Path:
    """The folder of a URL.

    Raises:
        StoreWriteError: it cannot be begun.
    """
    bare = url.split("://", 1)[-1].rstrip("/")
    folder = overlay / re.sub(r"[^A-Za-z0-9._]+", "-", bare)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not (folder / URL).exists() or (folder / URL).read_text() != url:
            if not (folder / URL).exists():
                (folder / URL).write_text(url)
            else:  # another URL that is written the same way
                folder = folder.with_name(folder.name + "-")
                folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


@dataclass(frozen=True)
class Fetched:
    """Something in an overlay that may go."""

    path: Path
    size_bytes: int
    used: float
    """When it was last read, in seconds since 1970, to about a minute."""


def fetched(overlay: Path) -> Iterator[Fetched]:
    """Every shard, and every file of taught answers."""
    for folder in sorted(overlay.glob("*/")):
        if not (folder / URL).is_file():
            continue  # nothing of ours
        for path in [*(folder / STORE / "shards").glob("*/"), folder / TAUGHT]:
            with suppress(FileNotFoundError):  # another process has removed it
                yield Fetched(path, _size(path), path.stat().st_mtime)


def used(path: Path) -> None:
    """Note that something was read."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > USED_S:
            os.utime(path)


def trim(overlay: Path, most_bytes: int, keep: Path | None = None) -> list[Fetched]:
    """Remove what was used longest ago, until the overlay takes no more than `most_bytes`; what went.

    Args:
        keep: stays in any case.

    Raises:
        StoreWriteError: no permission.
    """
    there = sorted(fetched(overlay), key=lambda each: each.used)
    over = sum(each.size_bytes for each in there) - most_bytes
    gone = []
    try:
        for each in there:
            if over <= 0:
                break
            if each.path != keep and _remove(each.path):
                over -= each.size_bytes
                gone.append(each)
    except OSError as error:
        raise cannot_write(overlay, error) from error
    return gone


def _remove(path: Path) -> bool:
    """Remove it at once for readers; whether this process did."""
    hidden = path.with_name(f".partial-removed-{uuid4().hex}")
    with alone_in(path.parent):
        try:
            path.rename(hidden)
        except FileNotFoundError:
            return False
    shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
    return True


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
