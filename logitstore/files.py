"""Where a store's files are: a folder, one zip file, or a URL. Read only; names are relative, with forward slashes.

The one seam between a store in Zarr and the place that holds it. Missing files are `FileNotFoundError`, whatever else
goes wrong is an `OSError`, as for a folder.
"""

import errno
import os
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Set
from pathlib import Path
from typing import ClassVar, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from logitstore.errors import StoreLostError

OPEN_FILES = 64
"""Of one folder so many handles stay open, and of all together twice as many, or one each: macOS gives a process 256,
of which every index takes 4."""
WRITE_ONCE = "shards/"
"""Files below this are never replaced, so a handle may stay open."""
_LOCAL_HEADER, _LOCAL_MAGIC = struct.Struct("<4s22xHH"), b"PK\3\4"


class CannotList(OSError):
    """What plain HTTP answers to `names` and `folders`: it gives files by name, and lists nothing."""


class CannotReach(OSError):
    """What a place answers that does not give a file now, whatever is in it."""


_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT}


def require_damage(error: Exception, path: object) -> None:
    """Check that what went wrong when something was read may lie in its bytes, and not in the way to them.

    Raises:
        StoreLostError: no permission, too many open files, a network or a server that fails.
    """
    if isinstance(error, CannotReach) or (isinstance(error, OSError) and error.errno in _PASSING):
        raise StoreLostError(
            f"{path} cannot be read now ({error.strerror or error}), which is no damage; mend this and type the same "
            "command again"
        ) from error


class Files(Protocol):
    """Files by name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes start .. stop - 1 of a file, fewer where it ends before."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """A file's bytes, where possible without reading them yet."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Every file below a folder, by its name from there, sorted; none that is being written (dot names).

        Raises:
            CannotList: it cannot be told.
        """
        ...

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """Names of the folders in a folder; none that is being written (dot names).

        Args:
            known: names of folders that need not be looked at, if they are there.

        Raises:
            CannotList: it cannot be told.
        """
        ...


class LocalFiles:
    """A folder. Safe for several threads."""

    _all: ClassVar["WeakSet[LocalFiles]"] = WeakSet()

    def __init__(self, root: Path, write_once: str = WRITE_ONCE) -> None:
        self.root, self._write_once = root, write_once
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._all.add(self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Files`."""
        if not name.startswith(self._write_once):
            with (self.root / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else max(stop - start, 0))
        with self._lock:  # so that no other thread closes the handle that is read from
            handle = self._handles.pop(name, None)
            if handle is None:
                handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
            self._handles[name] = handle
            while len(self._handles) > min(OPEN_FILES, max(1, 2 * OPEN_FILES // len(self._all))):
                os.close(self._handles.popitem(last=False)[1])
            size = os.fstat(handle).st_size
            return os.pread(handle, max(min(size if stop is None else stop, size) - start, 0), start)

    def size(self, name: str) -> int:
        """See `Files`."""
        return (self.root / name).stat().st_size

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """See `Files`."""
        return np.memmap(self.root / name, np.uint8, "r")

    def names(self, folder: str = "") -> list[str]:
        """See `Files`."""
        found: list[str] = []
        for parent, folders, files in os.walk(self.root / folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(parent).relative_to(self.root / folder)
            found.extend((below / name).as_posix() for name in files if not name.startswith("."))
        return sorted(found)

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `Files`."""
        place = self.root / folder
        try:
            there = set(os.listdir(place))  # noqa: PTH208  thousands of names, of which all but a few are known
        except FileNotFoundError:
            return set()
        there -= {name for name in there - known if name.startswith(".") or not (place / name).is_dir()}
        return there

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        self.close()


class ZipFiles:
    """A zip file whose members are stored as they are, so that a part of one is a part of the zip file."""

    def __init__(self, path: Path) -> None:
        """Read the zip file's directory.

        Raises:
            OSError: no zip file, or one with members that are compressed, encrypted, or not inside of it.
        """
        self._archive = LocalFiles(path.parent, write_once=path.name)
        self._name = path.name
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {item.filename: item for item in archive.infolist() if not item.is_dir()}
        except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, IndexError, struct.error) as error:
            raise OSError(f"{path} is no zip file ({error})") from error
        room = path.stat().st_size - _LOCAL_HEADER.size
        for name, item in self._members.items():
            if item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1:
                raise OSError(
                    f"{name} in {path} is compressed or encrypted; a store is zipped with `logitstore convert` or "
                    "`zip -0`"
                )
            outside = name.startswith("/") or ".." in name.split("/") or not name.isprintable()
            if outside or not 0 <= item.header_offset <= room or item.file_size > room:
                raise OSError(f"{name} in {path} lies outside of it")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Files`."""
        item = self._member(name)
        header = self._archive.read(self._name, item.header_offset, item.header_offset + _LOCAL_HEADER.size)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if magic != _LOCAL_MAGIC:
            raise OSError(f"{name} is not where the zip file's directory says")
        begin = item.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        end = begin + min(item.file_size if stop is None else stop, item.file_size)
        return self._archive.read(self._name, begin + start, max(end, begin + start))

    def size(self, name: str) -> int:
        """See `Files`."""
        return self._member(name).file_size

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """See `Files`."""
        return np.frombuffer(self.read(name), np.uint8)

    def names(self, folder: str = "") -> list[str]:
        """See `Files`."""
        prefix = f"{folder}/" if folder else ""
        below = (name.removeprefix(prefix) for name in self._members if name.startswith(prefix))
        return sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))

    def folders(self, folder: str, known: Set[str] = frozenset()) -> set[str]:
        """See `Files`."""
        del known
        return {name.split("/")[0] for name in self.names(folder) if "/" in name}

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise FileNotFoundError(2, "no such file in the zip file", name)
        return self._members[name]
