"""A bucket of an object store that a store is moved into: s3://, gs://, az:// and what else `obstore` speaks to.

An object is there whole or not at all, so a part's files go first and its `zarr.json` last: a reader that lists the
bucket finds no shard without one. The index, which a place without listing needs, is the last of all.
"""

import threading
from pathlib import Path

from logitstore.errors import StoreWriteError
from logitstore.moved import Pieces, Source, index_of
from logitstore.parts import Part, folder_of
from logitstore.remote_files import RemoteFiles
from logitstore.sealed import GROUP, file_digest, read_group, unseal_group
from logitstore.stored_index import FOLDER


class ObjectDestination:
    """See `moved.Destination`."""

    def __init__(self, files: RemoteFiles, where: str) -> None:
        self._files, self._where = files, where
        self._lock = threading.Lock()
        self._sent: set[str] = set()

    @property
    def where(self) -> str:
        """See `moved.Destination`."""
        return self._where

    def root(self) -> bytes | None:
        """See `moved.Destination`."""
        try:
            return read_group(self._files)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._cannot(error) from error

    def digests(self, names: list[str]) -> dict[str, str]:
        """See `moved.Destination`.

        Raises:
            CorruptStoreError: a part that is there is damaged.
        """
        found = {}
        try:
            folders = {f"shards/{name}" for name in self._files.folders("shards")} | self._files.folders("") | {""}
            for name in names:
                if folder_of(name) in folders:
                    try:
                        group = read_group(self._files, folder_of(name))
                        unseal_group(group, f"{self._where}/{folder_of(name)}/{GROUP}")
                        found[name] = file_digest(group)
                    except FileNotFoundError:
                        continue  # its files are there; a part begins to exist with its last
        except OSError as error:
            raise self._cannot(error) from error
        return found

    def require_room(self, size_bytes: int) -> None:
        """See `moved.Destination`: a bucket has no end."""

    def received(self, part: Part) -> dict[str, int]:
        """See `moved.Destination`."""
        try:
            sizes = self._files.sizes(part.folder or "vocabulary")
        except OSError as error:
            raise self._cannot(error) from error
        whole = {}
        for file, entry in part.files.items():
            if sizes.get(part.path(file)) == entry["bytes"]:
                whole[file] = entry["bytes"]
        return whole

    def receive(self, part: Part, file: str, offset: int, pieces: Pieces, path: Path | None) -> None:
        """See `moved.Destination`: the whole file."""
        del path, offset
        try:
            self._files.put(part.path(file), pieces(0), part.files[file]["bytes"])
        except OSError as error:
            raise self._cannot(error) from error
        with self._lock:
            self._sent.add(part.path(file))

    def publish(self, part: Part) -> list[str]:
        """See `moved.Destination`. Files that were there before are read again: only their size was known."""
        with self._lock:
            unsure = {file: entry for file, entry in part.files.items() if part.path(file) not in self._sent}
        try:
            bad = [f for f, entry in unsure.items() if self._digest(part.path(f), entry["bytes"]) != entry["digest"]]
            if not bad:
                self._files.put(part.path(), [part.group], len(part.group))
        except OSError as error:
            raise self._cannot(error) from error
        return bad

    def _digest(self, name: str, size: int) -> str:
        try:
            return self._files.digest(name, size)
        except FileNotFoundError:
            return ""

    def finish(self, source: Source) -> str:
        """See `moved.Destination`: the index, if one can be made without fetching what is there."""
        try:
            shards = self._files.folders("shards")
            if not shards:
                return ""
            with index_of(source, shards) as index:
                if index is None:
                    return "shards of others are there too, which its index does not name"
                group = read_group(index, FOLDER)
                try:
                    if read_group(self._files, FOLDER) == group:
                        return ""
                    self._files.delete(f"{FOLDER}/{GROUP}")  # without it the rest is looked at by nobody
                except FileNotFoundError:
                    pass
                for name in unseal_group(group, FOLDER)["files"]:
                    data = index.read(f"{FOLDER}/{name}")
                    self._files.put(f"{FOLDER}/{name}", [data], len(data))
                self._files.put(f"{FOLDER}/{GROUP}", [group], len(group))
        except OSError as error:
            raise self._cannot(error) from error
        return ""

    def _cannot(self, error: OSError) -> StoreWriteError:
        return StoreWriteError(
            f"{self._where} cannot be used ({error.strerror or error}); what is finished is kept, mend this and type "
            "the same command again"
        )
