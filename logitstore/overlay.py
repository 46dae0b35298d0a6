"""What was fetched from services, on this machine's disk: a folder for each URL, bounded in bytes, the least used out.

    OVERLAY/HOST-PORT-NAME-HASH/
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
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from logitstore.durable import alone_in, cannot_write

STORE, SHARDS, INDEX, TAUGHT, URL = "store", "shards", "index", "taught.lmdb", "url"
PARTIAL = ".partial-"
"""How the name begins of what is being fetched, or removed."""
USED_S = 60.0
"""A use is noted no more often than this."""
LEFT_S = 3600.0
"""What is being fetched and has not grown for so long was left by a process that was killed."""


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
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", url.split("://", 1)[-1])[-100:].lstrip(".-")
    folder = overlay / f"{readable}-{blake2b(url.encode(), digest_size=4).hexdigest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / URL).exists():
            partial = folder / f"{PARTIAL}{uuid4().hex}"
            partial.write_text(url)
            partial.rename(folder / URL)
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
    url: str


def fetched(overlay: Path) -> Iterator[Fetched]:
    """Every shard, every index, and every file of taught answers."""
    for folder in sorted(overlay.glob("*/")):
        try:
            url = (folder / URL).read_text()
        except (OSError, ValueError):
            continue  # nothing of ours
        shards = (path for path in (folder / STORE / SHARDS).glob("*/") if not path.name.startswith("."))
        for path in [*shards, folder / INDEX, folder / TAUGHT]:
            with suppress(FileNotFoundError):  # another process has removed it
                found = path.stat()
                size = _shard_size(path, found.st_ino) if path.parent.name == SHARDS else _size(path)
                yield Fetched(path, size, found.st_mtime, url)


def used(path: Path) -> None:
    """Note that something was read."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > USED_S:
            os.utime(path)


def trim(overlay: Path, most_bytes: int, keep: Path | None = None, *, dry_run: bool = False) -> list[Fetched]:
    """Remove what was used longest ago, until the overlay takes no more than `most_bytes`; what went, or would go.

    Args:
        keep: stays in any case.

    Raises:
        StoreWriteError: no permission.
    """
    there = sorted(fetched(overlay), key=lambda each: each.used)
    over = sum(each.size_bytes for each in there) - most_bytes
    gone = []
    for each in there:
        if over <= 0:
            break
        if each.path != keep and (dry_run or remove(each.path)):
            over -= each.size_bytes
            gone.append(each)
    return gone


@dataclass(frozen=True)
class OverlayReport:
    """What was removed from an overlay, or would be, and what stays."""

    gone: list[Fetched]
    stays: list[Fetched]
    left_bytes: int
    """Of what killed processes have left, which went too."""


def gc_overlay(overlay: Path, most_bytes: int, *, dry_run: bool = False) -> OverlayReport:
    """`trim`, after `remove_left`; with `dry_run`, only tell.

    Raises:
        StoreWriteError: no permission.
    """
    left_bytes = remove_left(overlay, dry_run=dry_run)
    gone = trim(overlay, most_bytes, dry_run=dry_run)
    paths = {each.path for each in gone}
    return OverlayReport(gone, [each for each in fetched(overlay) if each.path not in paths], left_bytes)


def remove_left(overlay: Path, *, dry_run: bool = False) -> int:
    """Remove what killed processes have left half fetched or half removed; how many bytes.

    Raises:
        StoreWriteError: no permission.
    """
    freed = 0
    for file in sorted(overlay.glob(f"*/{URL}")):
        folder = file.parent
        left = [path for place in (folder, folder / STORE / SHARDS) for path in place.glob(f"{PARTIAL}*")]
        for path in [*left, *folder.glob(f".{TAUGHT}-*")]:
            try:
                if time.time() - _changed(path) > LEFT_S:
                    freed += _size(path)
                    if not dry_run:
                        _delete(path)
            except FileNotFoundError:  # it is finished by now
                continue
            except OSError as error:
                raise cannot_write(path, error) from error
    return freed


def remove(path: Path) -> bool:
    """Remove something at once for its readers; whether this process did.

    Raises:
        StoreWriteError: no permission.
    """
    hidden = path.with_name(f"{PARTIAL}removed-{uuid4().hex}")
    try:
        with alone_in(path.parent):
            path.rename(hidden)
            if path.name == TAUGHT:  # a new file must not meet those who have this one open in the same lock
                path.with_name(f"{TAUGHT}-lock").unlink(missing_ok=True)
        _delete(hidden)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_write(path, error) from error
    return True


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _changed(path: Path) -> float:
    """When the newest of it was written."""
    return max(each.lstat().st_mtime for each in [path, *path.rglob("*")])


@lru_cache(maxsize=1 << 16)
def _shard_size(path: Path, inode: int) -> int:
    """`_size` of a shard, which is written once; each fetch looks at all of them."""
    del inode
    return _size(path)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
