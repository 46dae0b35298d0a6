"""The two ends of a move: a `Source`, where a store is read, and a `Destination`, where it is written part by part.

The one seam between `transfer` and the kinds of places.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from logitstore.files import Files, LocalFiles, ZipFiles
from logitstore.http_files import HttpFiles
from logitstore.parts import Part
from logitstore.remote_files import RemoteFiles
from logitstore.sealed import PIECE
from logitstore.stored_index import FOLDER
from logitstore.zarr_store import ZarrStore


@dataclass(frozen=True)
class Source:
    """Where a store is read."""

    files: Files
    where: str
    """For messages: what was typed."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the parts' `zarr.json` by the parts' names, where the place tells them all at once."""

    @property
    def local(self) -> bool:
        """Whether reading it twice costs little."""
        return isinstance(self.files, LocalFiles | ZipFiles)

    def path(self, name: str) -> Path | None:
        """A file's path, where it has one."""
        return self.files.root / name if isinstance(self.files, LocalFiles) else None

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start .. stop - 1 of a file, in pieces; fewer where it ends before."""
        if isinstance(self.files, RemoteFiles):
            yield from self.files.stream(name, start, stop)
            return
        if isinstance(self.files, HttpFiles):
            yield from self.files.client.stream(name, start, stop)
            return
        for at in range(start, stop, PIECE):
            piece = self.files.read(name, at, min(at + PIECE, stop))
            if not piece:
                return
            yield piece


Pieces = Callable[[int], Iterator[bytes]]


class Destination(Protocol):
    """Where a store is written, part by part. Its methods may be called by several threads at once."""

    @property
    def where(self) -> str:
        """For messages: what was typed."""
        ...

    def root(self) -> bytes | None:
        """The `zarr.json` of the store that is there."""
        ...

    def digests(self, names: list[str]) -> dict[str, str]:
        """Digests of the `zarr.json` of those of these parts that are there."""
        ...

    def require_room(self, size_bytes: int) -> None:
        """Check that so much can be written, as far as that can be told.

        Raises:
            StoreWriteError: it cannot.
        """
        ...

    def received(self, part: Part) -> dict[str, int]:
        """How many bytes of its files are there already; where another part of that name is, none."""
        ...

    def receive(self, part: Part, file: str, offset: int, pieces: Pieces, path: Path | None) -> None:
        """Take a file's bytes from an offset on, which is what `received` says.

        Args:
            pieces: gives the bytes from an offset on.
            path: where the file lies, if it does in the file system.

        Raises:
            StoreWriteError: they cannot be written.
        """
        ...

    def publish(self, part: Part) -> list[str]:
        """Show a part of which all files were received. Files that were not right after all are named and forgotten.

        Raises:
            StoreWriteError: it cannot be written.
        """
        ...

    def finish(self, source: Source) -> str:
        """Do what is to be done when all parts are there; something to tell, or nothing."""
        ...


@contextmanager
def index_of(source: Source, shards: Iterable[str]) -> Iterator[Files | None]:
    """The files of an index over exactly these shards, below `index/`, for a place that cannot make one by itself; None
    where the source has others.

    Raises:
        StoreError: the source cannot be read.
    """
    store = ZarrStore(source.files, source.where)
    names = sorted(shards)
    if sorted(store.shard_names) != names:
        yield None
        return
    if store.catalog.index is not None and sorted(store.catalog.index.shards) == names:
        yield source.files
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FOLDER).mkdir()
        store.catalog.write_index(Path(folder) / FOLDER, names)
        yield LocalFiles(Path(folder))
