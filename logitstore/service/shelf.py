"""The stores that a service has: names, and stores that are open.

Stands between the routes and the disk. A folder of stores is looked at again when it is listed, so a store that was
built or removed meanwhile is there or gone without a restart.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError, LogitstoreError, StoreNotFoundError
from logitstore.files import Files, LocalFiles
from logitstore.info import info
from logitstore.sealed import GROUP, read_group
from logitstore.store import files_of, is_lmdb_store
from logitstore.zarr_store import ZarrStore

SUFFIXES = (".zarr", ".zip")
RESERVED = frozenset({"v1", "page", "docs", "health", "ready", "metrics", "openapi.json"})
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
FACTS_S, FACTS_SHARE = 10.0, 20
"""What a store says of itself is so many seconds old at most, or so many times what it takes to say it."""
LOOKED_S = 1.0
"""A store's shards are looked at again after so long, and before a document is called a miss."""
MOST_WITH_FILES = 16
"""Stores of which files are kept open, the last used ones."""


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
        self._telling = threading.Lock()
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

    def is_there(self) -> bool:
        """Whether what lies at its path is still what was opened: neither deleted nor replaced."""
        try:
            stat = self.path.stat()
            if stat.st_ino != self.stat.st_ino:
                return False
            return (
                stat.st_mtime_ns == self.stat.st_mtime_ns
                if self.path.is_file()
                else read_group(self.files) == self.root
            )
        except (OSError, LogitstoreError):
            return False

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
        """What `logitstore info` says of it, at most some seconds old: all of its files are looked at for this, by one
        thread at a time, while others read the store.

        Raises:
            StoreError: it is gone, or damaged.
        """
        known = self._facts
        if not self._telling.acquire(blocking=known is None):
            assert known is not None
            return known[1]
        try:
            known = self._facts  # of another thread, which was waited for
            if known is None or time.monotonic() > known[0]:
                began = time.monotonic()
                found = info(ZarrStore(files_of(self.path), self.path))
                now = time.monotonic()
                self._facts = known = now + max(FACTS_S, FACTS_SHARE * (now - began)), found
            return known[1]
        finally:
            self._telling.release()


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
        self._opening: dict[str, threading.Lock] = {}
        self._open: OrderedDict[str, Served] = OrderedDict()
        self._seen: tuple[float, dict[str, Path]] = (-LOOKED_S, {})
        self._stores: dict[str, Path] = {}
        self._folders: list[Path] = []
        for place in places:
            if is_lmdb_store(place):
                raise ConfigError(
                    f"{place} is an LMDB file, which a run on this machine reads; type `logitstore convert {place} "
                    f"{place.with_suffix('.zarr')}`, and serve that"
                )
            if not place.exists():
                raise ConfigError(f"there is nothing at {place}; type the path of a store, or of a folder of stores")
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
        return sorted(self._places_now(fresh=True))

    def get(self, name: str) -> Served:
        """A store by its name, open.

        Raises:
            UnknownStoreError: there is none.
            StoreError: it is damaged.
        """
        path = self._places_now().get(name)
        if path is None or not path.exists():
            path = self._places_now(fresh=True).get(name)
        if path is None:
            raise UnknownStoreError(f"there is no store {name!r} here; GET /v1/stores lists what there is")
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:  # others go on with other stores
            served = self._open.get(name)
            if served is None or served.path != path or not served.is_there():  # or another was put in its place
                served = Served(name, path)
            with self._lock:
                self._open[name] = served
                self._open.move_to_end(name)
                for idle in list(self._open.values())[:-MOST_WITH_FILES]:
                    if isinstance(idle.files, LocalFiles):
                        idle.files.close()  # which a read opens again
        return served

    def name_at(self, place: Path) -> str | None:
        """What the store is served as that lies at a place, however it is spelled; None where none lies there.

        A link is another spelling, and on most Macs other letters are: s.zarr is S.zarr there.
        """
        if not place.exists():
            return None
        return next((name for name, path in self._places_now(fresh=True).items() if path.samefile(place)), None)

    def _places_now(self, *, fresh: bool = False) -> dict[str, Path]:
        """Where the stores are, or were a moment ago; what is gone is let go of."""
        looked, places = self._seen
        if not fresh and time.monotonic() - looked < LOOKED_S:
            return places
        places = self._places()
        self._seen = time.monotonic(), places
        with self._lock:
            for name in self._open.keys() - places.keys():
                del self._open[name]
        return places

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
    resolved = path.resolve()
    name = resolved.stem if resolved.suffix in SUFFIXES else resolved.name
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
