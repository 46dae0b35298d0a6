"""A folder that a store is moved into. Readers see a part when all of it is there; see `incoming`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitstore.durable import cannot_write, write_whole
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError, CorruptStoreError, StoreWriteError
from logitstore.files import LocalFiles
from logitstore.incoming import SPARE_BYTES, Incoming, WrongOffsetError
from logitstore.moved import Pieces, Source
from logitstore.parts import FIDELITY, Part, folder_of
from logitstore.sealed import GROUP, file_digest, read_group, unseal_group
from logitstore.stored_index import FOLDER
from logitstore.zarr_store import MAP_PREFIX, ZarrStore

SUFFIXES = (".zip", ".lmdb")
_OF_A_STORE = {"vocabulary", "shards", FOLDER, FIDELITY}
"""What may be there before the root is, of a move that was stopped."""


class FolderDestination:
    """See `moved.Destination`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._incoming = Incoming(path)
        self._files = LocalFiles(path, write_once="/")  # nothing stays open: the folder may be another's too

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["FolderDestination"]:
        """Be the only process that moves a store into the folder.

        Raises:
            ConfigError: a store of another kind, or a folder inside another store.
            StoreWriteError: another process moves one into it, or it cannot be written.
        """
        if path.is_file() or path.suffix in SUFFIXES:
            raise ConfigError(
                f"{path} is no folder; type one, as in {path.with_suffix('.zarr')}, and then `logitstore convert`"
            )
        require_outside_stores(path)
        _require_own(path)
        try:
            with cls(path)._incoming.alone():
                yield cls(path)
        except BlockingIOError as error:
            raise StoreWriteError(f"another process is moving a store into {path}; wait for it, or end it") from error
        except OSError as error:
            raise cannot_write(path, error) from error

    @property
    def where(self) -> str:
        """See `moved.Destination`."""
        return str(self.path)

    def root(self) -> bytes | None:
        """See `moved.Destination`."""
        try:
            return read_group(self._files)
        except FileNotFoundError:
            return None

    def digests(self, names: list[str]) -> dict[str, str]:
        """See `moved.Destination`.

        Raises:
            CorruptStoreError: a part that is there is damaged.
        """
        found = {}
        for name in names:
            try:
                group = read_group(self._files, folder_of(name))
            except FileNotFoundError:
                if name and (self.path / "shards" / name).is_dir():
                    raise _damaged(self.path, name) from None
                continue
            try:
                unseal_group(group, name)
            except CorruptStoreError as error:
                raise _damaged(self.path, name) from error
            found[name] = file_digest(group)
        return found

    def require_room(self, size_bytes: int) -> None:
        """See `moved.Destination`."""
        free = shutil.disk_usage(self.path).free
        if free < size_bytes + SPARE_BYTES:
            raise StoreWriteError(
                f"{self.path} has {free:,} bytes free, {size_bytes + SPARE_BYTES:,} are needed; free some, and type "
                "the same command again"
            )

    def received(self, part: Part) -> dict[str, int]:
        """See `moved.Destination`."""
        return self._incoming.received(part) if self._incoming.group(part.name) == part.group else {}

    def receive(self, part: Part, file: str, offset: int, pieces: Pieces, path: Path | None) -> None:
        """See `moved.Destination`."""
        del path
        try:
            self._incoming.begin(part)
            with self._incoming.appending(part, file, offset) as handle:
                for piece in pieces(offset):
                    write_whole(handle, piece)
        except CorruptStoreError:
            self._incoming.drop(part, file)
            raise
        except (WrongOffsetError, BlockingIOError) as error:
            raise StoreWriteError(
                f"another process is receiving {part.path(file)} into {self.path}; wait for it, and type the same "
                "command again"
            ) from error
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def publish(self, part: Part) -> list[str]:
        """See `moved.Destination`."""
        try:
            if not part.files:
                self._incoming.begin(part)
            problems = self._incoming.problems(part)
            if not problems:
                self._incoming.publish(part)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return [problem.file for problem in problems]

    def finish(self, source: Source) -> str:
        """See `moved.Destination`: an index of all shards."""
        del source
        store = ZarrStore(LocalFiles(self.path), self.path)
        store.save_index()
        return f"{len(store):,} documents, {store.positions:,} positions"


def _require_own(path: Path) -> None:
    """Raise ConfigError where a folder holds other things than a store: they would lie in one among its files."""
    try:
        found = sorted(each.name for each in path.iterdir() if not each.name.startswith((".", MAP_PREFIX)))
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    other = next((name for name in found if name not in _OF_A_STORE), None)
    if other is not None and GROUP not in found:
        raise ConfigError(f"{path} holds {other}, which is no part of a store; type a folder of the store's own")


def _damaged(path: Path, name: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path}/{folder_of(name)}/{GROUP} is damaged; type `logitstore verify --repair {path}`, then this command "
        "again"
    )
