"""The index of a store as it lies on disk: what `index` holds in memory, for all shards together.

It is derived from the shards and replaced as a whole; a store without one is read all the same, shard by shard. Opening
maps its columns, and whoever first asks for one holds it against its checksum: ten million documents are there at once.
"""

import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from logitstore.chunks import CRC, unpack
from logitstore.entries import damaged, unreadable
from logitstore.errors import CorruptStoreError
from logitstore.files import Files, require_damage
from logitstore.index import Table
from logitstore.sealed import GROUP, are_file_entries, file_entries, file_problems, read_group, seal_group, unseal_group

FOLDER = "index"
FILE = "c/0"
COLUMNS = ("keys", "keys-documents", "blocks", "blocks-documents")
NAME_BYTES = 8
MOST_SHARDS = 1 << 24
PIECE = 1 << 20


class StoredIndex:
    """The index of some shards; which they are it says itself.

    Raises:
        CorruptStoreError: its bytes are not those that were written.
        FileNotFoundError: there is none.
    """

    def __init__(self, files: Files, where: object) -> None:
        self._files, self._where = files, where
        attributes = unseal_group(read_group(files, FOLDER), f"{where}/{FOLDER}/{GROUP}")
        self.files: Any = attributes.get("files")
        self.duplicates: list[int] = attributes.get("duplicates", [])
        """Documents that an earlier shard holds too."""
        shards = attributes.get("shards")
        if not (are_file_entries(self.files) and isinstance(shards, int) and 0 <= shards < MOST_SHARDS):
            raise self.damaged(GROUP, "says what no logitstore writes")
        small = {name: entry for name, entry in self.files.items() if name.startswith(("shards/", "counts/"))}
        for problem in file_problems(files, FOLDER, small):
            raise self.damaged(problem.file, problem.fault)
        try:
            names = unpack(files.read(f"{FOLDER}/shards/c/0/0"), shards * NAME_BYTES) if shards else b""
            counts = unpack(files.read(f"{FOLDER}/counts/c/0/0"), shards * 16) if shards else b""
        except (OSError, ValueError) as error:
            require_damage(error, f"{where}/{FOLDER}")
            raise self.damaged("shards", f"cannot be read ({error})") from error
        self.shards = bytes(names).hex(" ", NAME_BYTES).split()
        self.counts = np.frombuffer(counts, "<u8").reshape(-1, 2).astype(np.int64)
        """[S, 2]; documents and positions of each shard."""
        self._mapped = {name: self._map(name) for name in COLUMNS}  # now: another writer may replace the folder later
        documents = int(self.counts[:, 0].sum())
        if (self.counts < 1).any() or len(self._mapped["keys"]) != (8 * documents + CRC.size if documents else 0):
            raise self.damaged("counts", "they are not those of its keys")
        twice = self.duplicates
        numbers = isinstance(twice, list) and all(type(n) is int and 0 <= n < documents for n in twice)
        if not numbers or len(set(twice)) != len(twice):
            raise self.damaged(GROUP, "says what no logitstore writes")

    @cached_property
    def known(self) -> frozenset[str]:
        """The names of its shards."""
        return frozenset(self.shards)

    @cached_property
    def keys(self) -> Table:
        """Hashes of whole documents.

        Raises:
            CorruptStoreError: its bytes are not those that were written.
        """
        return self._table("keys")

    @cached_property
    def blocks(self) -> Table:
        """Hashes of how documents begin.

        Raises:
            CorruptStoreError: its bytes are not those that were written.
        """
        return self._table("blocks")

    def _table(self, name: str) -> Table:
        hashes, documents = self._column(name, 8), self._column(f"{name}-documents", 4)
        if len(hashes) != len(documents):
            raise self.damaged(name, "is not as long as its documents")
        return Table(hashes, documents)

    def _column(self, name: str, width: int) -> npt.NDArray[Any]:
        """A mapped column, every byte of it held against its checksum first, a piece at a time."""
        mapped = self._mapped[name]
        owner: Any = mapped.base
        size, crc = len(mapped) - CRC.size, 0
        if not len(mapped):
            return np.empty(0, f"<u{width}")
        for at in range(0, size, PIECE):
            crc = google_crc32c.extend(crc, mapped[at : min(at + PIECE, size)].tobytes())
            if isinstance(owner, mmap.mmap):
                owner.madvise(mmap.MADV_DONTNEED, at, PIECE)  # else all that was checked stays in memory
        if size % width or CRC.pack(crc) != mapped[size:].tobytes():
            raise self.damaged(f"{name}/{FILE}", "a checksum does not match")
        return mapped[:size].view(f"<u{width}")

    def _map(self, name: str) -> npt.NDArray[np.uint8]:
        file = f"{name}/{FILE}"
        if file not in self.files:
            return np.empty(0, np.uint8)
        try:
            mapped = self._files.mapped(f"{FOLDER}/{file}")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            require_damage(error, f"{self._where}/{FOLDER}/{file}")
            raise self.damaged(file, f"cannot be read ({error})") from error
        if len(mapped) != self.files[file]["bytes"] or len(mapped) < CRC.size:
            raise self.damaged(file, f"holds {len(mapped):,} bytes instead of {self.files[file]['bytes']:,}")
        return mapped

    def damaged(self, file: str, fault: str) -> CorruptStoreError:
        """The one line for an index that cannot be trusted."""
        return CorruptStoreError(
            f"{self._where}/{FOLDER}/{file}: {fault}; delete the folder {FOLDER}, and `logitstore build` makes it again"
        )


def read_index(files: Files, where: object) -> StoredIndex | None:
    """The index, or None where there is none; read again where another process replaces it meanwhile.

    Raises:
        CorruptStoreError: its bytes are not those that were written.
    """
    while True:
        begun = None
        try:
            begun = read_group(files, FOLDER)
            index = StoredIndex(files, where)
            if read_group(files, FOLDER) == begun:  # then its columns, which nobody has read yet, are its own too
                return index
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(f"{where}/{FOLDER}", error) from error
        except CorruptStoreError:
            try:
                if begun is None or read_group(files, FOLDER) == begun:
                    raise
            except FileNotFoundError:
                return None


def indexed_shards(files: Files, where: object) -> list[str] | None:
    """The shards that the index names, none of its columns being read; None where there is no index.

    Raises:
        CorruptStoreError: its bytes are not those that were written.
    """
    path, file = f"{where}/{FOLDER}/{GROUP}", f"shards/{FILE}/0"
    try:
        attributes = unseal_group(read_group(files, FOLDER), path)
        entries, count = attributes.get("files"), attributes.get("shards")
        if not (are_file_entries(entries) and isinstance(count, int) and 0 <= count < MOST_SHARDS):
            raise damaged(path, "says what no logitstore writes")
        if count and not 0 <= entries.get(file, {"bytes": -1})["bytes"] <= 2 * NAME_BYTES * count + 64:
            raise damaged(path, "says what no logitstore writes")
        if not count:
            return []
        for problem in file_problems(files, FOLDER, {file: entries[file]}):
            raise damaged(f"{where}/{FOLDER}/{problem.file}", problem.fault)
        return bytes(unpack(files.read(f"{FOLDER}/{file}"), count * NAME_BYTES)).hex(" ", NAME_BYTES).split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def write_index(
    folder: Path, shards: Sequence[str], counts: npt.NDArray[np.int64], keys: Table, blocks: Table, twice: list[int]
) -> None:
    """Write the index of shards, in this order, into a folder that is there."""
    from logitstore.zarr_arrays import write_array, write_column

    names = np.frombuffer(bytes.fromhex("".join(shards)), np.uint8).reshape(-1, NAME_BYTES)
    write_array(folder, "shards", names)
    write_array(folder, "counts", counts.astype(np.uint64))
    for name, table in (("keys", keys), ("blocks", blocks)):
        write_column(folder, name, table.hashes)
        write_column(folder, f"{name}-documents", table.documents)
    attributes = {"shards": len(shards), "duplicates": twice, "files": file_entries(folder)}
    (folder / GROUP).write_bytes(seal_group(attributes))
