"""The stores that a service has: names, and stores that are open.

Stands between the routes and the disk. A folder of stores is looked at again when it is listed, so a store that was
built or removed meanwhile is there or gone without a restart.
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError, LogitstoreError, StoreNotFoundError
from logitstore.files import Files
from logitstore.info import info
from logitstore.sealed import GROUP, read_group
from logitstore.store import files_of, is_lmdb_store
from logitstore.zarr_store import ZarrStore

SUFFIXES = (".zarr", ".zip")
RESERVED = frozenset({"v1", "page", "docs", "health", "ready", "metrics", "openapi.json"})
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
FACTS_S = 10.0
LOOKED_S = 1.0
"""A store's shards are looked at again after so long, and before a document is called a miss."""


class UnknownStoreError(StoreNotFoundError):
    """The service has no store of this name."""


class Served:
    """A store that is served.

    Attributes:
        lock: held by whoever reads `store`, which is not safe for several threads; `files` is.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.lock = threading.RLock()
        self.reopen()
        self.root = read_group(self.files)
        """The bytes of its `zarr.json`: another store has others."""
        self.stat = path.stat()

    def reopen(self) -> None:
        """Open it again: a file has been put in the place of another."""
        self.files: Files = files_of(self.path)
        self.store = ZarrStore(self.files, self.path)
        self._looked = time.monotonic()
        self._facts: tuple[float, dict[str, Any]] | None = None

    @property
    def writable(self) -> bool:
        """Whether it is a folder, which can be added to."""
        return self.path.is_dir()

    @contextmanager
    def reading(self, *, fresh: bool = False) -> Iterator[ZarrStore]:
        """The store, for this thread alone, and with what others have finished since.

        Args:
            fresh: see what was finished a moment ago too.

        Raises:
            StoreError: it is gone, or damaged.
        """
        with self.lock:
            if fresh or time.monotonic() - self._looked > LOOKED_S:
                self.store.refresh()
                self._looked = time.monotonic()
            yield self.store

    def facts(self) -> dict[str, Any]:
        """What `logitstore info` says of it, at most some seconds old: all of its files are looked at for this.

        Raises:
            StoreError: it is gone, or damaged.
        """
        with self.reading() as store:
            if self._facts is None or time.monotonic() - self._facts[0] > FACTS_S:
                self._facts = time.monotonic(), info(store)
            return self._facts[1]


class Shelf:
    """All of them, by name.

    Args:
        places: stores, and folders whose children may be stores.

    Raises:
        ConfigError: two stores of one name, a name that no URL may have, or a place of no store.
        StoreError: a store that was named cannot be opened.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Served] = {}
        self._stores: dict[str, Path] = {}
        self._folders: list[Path] = []
        for place in places:
            if is_lmdb_store(place):
                raise ConfigError(
                    f"{place} is an LMDB file, which a run on this machine reads; type `logitstore convert {place} "
                    f"{place.with_suffix('.zarr')}`, and serve that"
                )
            if place.is_dir() and not (place / GROUP).exists():
                self._folders.append(place)
            else:
                self._add(self._stores, place)
        self._places(strict=True)
        for name in self._stores:
            self.get(name)  # of a folder's stores a damaged one keeps nobody from the others

    @property
    def begins_stores(self) -> Path | None:
        """The folder in which stores that are uploaded begin; None where single stores are served."""
        return self._folders[0] if self._folders else None

    def names(self) -> list[str]:
        """What is there now."""
        return sorted(self._places())

    def get(self, name: str) -> Served:
        """A store by its name, open.

        Raises:
            UnknownStoreError: there is none.
            StoreError: it is damaged.
        """
        path = self._places().get(name)
        if path is None:
            raise UnknownStoreError(f"there is no store {name!r} here; GET /v1/stores lists what there is")
        with self._lock:
            served = self._open.get(name)
            if served is not None and not _same(served, path):
                served = None  # deleted, and another put in its place
            if served is None:
                served = self._open[name] = Served(name, path)
        return served

    def _places(self, *, strict: bool = False) -> dict[str, Path]:
        """Where the stores are; what has an unusable name is an error if `strict`, later it is no store."""
        found = dict(self._stores)
        for folder in self._folders:
            try:
                children = sorted(folder.iterdir())
            except OSError as error:
                raise StoreNotFoundError(f"{folder} cannot be read: {error.strerror}") from error
            for child in children:
                if not child.name.startswith(".") and ((child / GROUP).is_file() or child.suffix == ".zip"):
                    with nullcontext() if strict else suppress(ConfigError):
                        self._add(found, child)
        return {name: path for name, path in found.items() if path.exists()}

    def _add(self, found: dict[str, Path], path: Path) -> None:
        name = name_of(path)
        other = found.setdefault(name, path)
        if other != path:
            raise ConfigError(f"{other} and {path} would both be served as /{name}; rename one of them")


def name_of(path: Path) -> str:
    """What a store is served as: its file name without .zarr or .zip.

    Raises:
        ConfigError: no URL may have it.
    """
    name = path.resolve().name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    require_name(name, path)
    return name


def require_name(name: str, path: object) -> None:
    """Check that a store may be served under a name.

    Raises:
        ConfigError: it is a route of the service, or has other characters than URLs have.
    """
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(
            f"{path} would be served as /{name}, expected letters, digits, - . and _, and none of "
            f"{', '.join(sorted(RESERVED))}; rename it"
        )


def _same(served: Served, path: Path) -> bool:
    """Whether what lies there is still what was opened."""
    try:
        stat = path.stat()
        if (served.path, served.stat.st_ino) != (path, stat.st_ino):
            return False
        return (
            stat.st_mtime_ns == served.stat.st_mtime_ns if path.is_file() else read_group(served.files) == served.root
        )
    except (OSError, LogitstoreError):
        return False
