"""A store as a Zarr v3 hierarchy on disk: the only file that speaks to zarr. FORMAT.md says what lies where.

A shard appears by one rename, complete; what is being written lives in names that begin with a dot. Opening a store
holds the shards' keys against their digests; the first look into a shard holds all of its files against theirs.
"""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec

from logitstore.durable import alone_in, cannot_write, publish
from logitstore.entries import damaged, read_entry, read_root, shard_name, shard_names
from logitstore.errors import CorruptStoreError, IncompatibleStoreError
from logitstore.key import KEY_BYTES, document_key
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.sealed import GROUP, file_entries, file_problems, files_below, seal_group
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary

CHUNK_POSITIONS = 2048
ZSTD_LEVEL = 9


class Shard:
    """One finished shard: keys and lengths in memory, tokens and records read when asked for."""

    def __init__(self, path: Path, record_width: int) -> None:
        """Read the shard's entry, and no array yet.

        Raises:
            CorruptStoreError: the entry is missing or damaged.
        """
        self.path = path
        self.entry = read_entry(path)
        self._record_width = record_width
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._whole_is_checked = False

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        """[D, 16]"""
        return self.values("keys")

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """[D]; where each document ends in `token_ids`."""
        return self.values("ends").astype(np.int64)

    def token_span(self, document: int) -> slice:
        """Where the document's tokens lie in `token_ids`."""
        return slice(int(self.ends[document - 1]) if document else 0, int(self.ends[document]))

    def record_span(self, document: int) -> slice:
        """Where the document's rows lie in `records`: every document has one row fewer than tokens."""
        tokens = self.token_span(document)
        return slice(tokens.start - document, tokens.stop - document - 1)

    def values(self, name: str, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Rows of one array.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        try:
            if name not in self._arrays:
                self._arrays[name] = self._open(name)
            return np.asarray(self._arrays[name][rows])
        except CorruptStoreError:
            raise
        except Exception as error:  # zarr raises whatever its parsers and codecs raise
            raise damaged(self.path / name, f"cannot be read ({error})") from error

    def _open(self, name: str) -> zarr.Array[Any]:
        """Open an array, its shape held against the entry."""
        self._check("keys" if name == "keys" else None)
        array = zarr.open_array(self.path / name, mode="r", zarr_format=3)
        documents, positions = self.entry.documents, self.entry.positions
        shape, dtype = {
            "keys": ((documents, KEY_BYTES), "uint8"),
            "ends": ((documents,), "uint64"),
            "token_ids": ((positions + documents,), "uint32"),
            "records": ((positions, self._record_width), "uint8"),
        }[name]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{array.dtype} {array.shape} instead of {dtype} {shape}")
        return array

    def _check(self, name: str | None) -> None:
        """Hold files against their digests: those of one array, or, once, all of the shard."""
        if self._whole_is_checked:
            return
        below = f"{name}/" if name else ""
        files = {file: entry for file, entry in self.entry.files.items() if file.startswith(below)}
        for problem in file_problems(self.path, files):
            raise damaged(self.path / problem.file, problem.fault)
        if files.keys() != {file for file in files_below(self.path) - {GROUP} if file.startswith(below)}:
            raise ValueError("its files are not those that the shard's entry names")
        self._whole_is_checked = name is None


class ZarrStore:
    """A store in a directory. Open it with `logitstore.open_store`."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            StoreNotFoundError, StoreFormatError, CorruptStoreError: as their names say.
            IncompatibleStoreError: it holds a shard of another store.
        """
        self.path = path
        self.root = read_root(path)
        for problem in file_problems(path, self.root.files):
            raise CorruptStoreError(
                f"{path / problem.file}: {problem.fault}; restore the file, or build the store again"
            )
        self.manifest = self.root.manifest
        self.shards: dict[str, Shard] = {}
        self._places: list[tuple[Shard, int]] = []
        self._numbers: dict[bytes, int] = {}
        self.refresh()

    @classmethod
    def create(cls, path: Path, manifest: Manifest, vocabulary: Vocabulary) -> "ZarrStore":
        """Begin an empty store, or open the one that another process has begun at the same moment.

        Raises:
            StoreWriteError: the place cannot be written.
            StoreError: what another process has begun there cannot be opened.
        """
        beside = f".partial-{path.name}-"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone_in(path.parent) as alone:
                if alone:  # then what lies there is of a process that was killed
                    for left in path.parent.iterdir():
                        if left.name.startswith(beside):
                            shutil.rmtree(left)
                if not path.exists():
                    partial = path.with_name(beside + uuid4().hex)
                    try:
                        _write_root(partial, manifest, vocabulary)
                        publish(partial, path)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return cls(path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokens as bytes.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        try:
            data, lengths = (
                np.asarray(zarr.open_array(self.path / "vocabulary" / name, mode="r", zarr_format=3)[:])
                for name in ("bytes", "lengths")
            )
        except Exception as error:
            raise damaged(self.path / "vocabulary", f"cannot be read ({error})") from error
        ends = np.cumsum(lengths).tolist()
        tokens = (data[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends, strict=True))
        return Vocabulary(tuple(tokens), self.root.special_ids, self.root.bos_id, self.root.eos_id)

    def refresh(self) -> None:
        """See the shards that were finished since the store was opened.

        Raises:
            CorruptStoreError: a shard's entry or keys are not what was written.
            IncompatibleStoreError: a shard belongs to another store.
        """
        for name in shard_names(self.path):
            if name in self.shards:
                continue
            shard = Shard(self.path / "shards" / name, self.manifest.recipe.record_width)
            if shard.entry.fingerprint != self.manifest.fingerprint:
                raise IncompatibleStoreError(
                    f"{shard.path} was built as part of store {shard.entry.fingerprint}, this one is "
                    f"{self.manifest.fingerprint}; move that folder out of {self.path}"
                )
            for document, key in enumerate(shard.keys):
                if key.tobytes() not in self._numbers:
                    self._numbers[key.tobytes()] = len(self._places)
                    self._places.append((shard, document))
            self.shards[name] = shard

    def __len__(self) -> int:
        """How many documents the store holds."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        """Whether a document with this key (`logitstore.key.document_key`) is there; reads no values."""
        return key in self._numbers

    @property
    def positions(self) -> int:
        """How many positions the store holds."""
        return sum(shard.entry.positions for shard in self.shards.values())

    @property
    def disk_bytes(self) -> int:
        """Size of every file that is part of the store, metadata included."""
        return sum((self.path / name).stat().st_size for name in files_below(self.path))

    def get(self, token_ids: npt.ArrayLike) -> SparseTargets | None:
        """Look a document up by its token ids [L]; None is a miss.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
            ValueError: no row of token ids.
        """
        number = self._numbers.get(document_key(np.asarray(token_ids)))
        return None if number is None else self._read(*self._places[number])

    def document(self, number: int) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The token ids and targets of the N-th document, in the store's own order from 0.

        Raises:
            IndexError: there are fewer documents.
            CorruptStoreError: the bytes are not those that were written.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard, document = self._places[number]
        return shard.values("token_ids", shard.token_span(document)).astype(np.int32), self._read(shard, document)

    def _read(self, shard: Shard, document: int) -> SparseTargets:
        records = shard.values("records", shard.record_span(document))
        try:
            return self.manifest.recipe.read(records)
        except ValueError as error:
            raise damaged(shard.path / "records", f"document {document} does not decode ({error})") from error

    def write_shard(self, documents: Sequence[DocumentRecord], writer: str = "") -> None:
        """Add documents as one shard: complete, or not there at all.

        Args:
            writer: tells apart those who write into this store at the same time. What a killed one left half-written is
                replaced by the next shard that it writes.

        Raises:
            StoreWriteError: full disk or no permission.
        """
        keys = b"".join(document.key for document in documents)
        folder = self.path / "shards"
        partial = folder / f".partial-{writer}"
        lengths = [len(document.token_ids) for document in documents]
        try:
            try:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir()
                _write_array(partial, "keys", np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))
                _write_array(partial, "ends", np.cumsum(lengths, dtype=np.uint64))
                _write_array(partial, "token_ids", np.concatenate([d.token_ids for d in documents]).astype(np.uint32))
                _write_array(partial, "records", np.concatenate([d.records for d in documents]))
                entry = {
                    "documents": len(documents),
                    "positions": sum(lengths) - len(documents),
                    "fingerprint": self.manifest.fingerprint,
                    "files": file_entries(partial),
                }
                (partial / GROUP).write_bytes(seal_group(entry))
                publish(partial, folder / shard_name(keys))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.refresh()


def _write_root(path: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
    (path / "shards").mkdir(parents=True)
    (path / "shards" / GROUP).write_bytes(seal_group({}))
    (path / "vocabulary").mkdir()
    (path / "vocabulary" / GROUP).write_bytes(seal_group({}))
    _write_array(path / "vocabulary", "bytes", np.frombuffer(b"".join(vocabulary.tokens), np.uint8))
    _write_array(path / "vocabulary", "lengths", np.array([len(token) for token in vocabulary.tokens], np.uint32))
    root = {
        "logitstore": manifest.to_json(),
        "special_ids": sorted(vocabulary.special_ids),
        "bos_id": vocabulary.bos_id,
        "eos_id": vocabulary.eos_id,
        "files": file_entries(path),
    }
    (path / GROUP).write_bytes(seal_group(root))


def _write_array(group: Path, name: str, data: npt.NDArray[Any]) -> None:
    """Write one array as a single file of chunks, each with its own checksum."""
    rows = min(CHUNK_POSITIONS, max(len(data), 1))
    array = zarr.create_array(
        store=str(group),
        name=name,
        shape=data.shape,
        chunks=(rows, *data.shape[1:]),
        shards=(-(-max(len(data), 1) // rows) * rows, *data.shape[1:]),
        dtype=data.dtype,
        # A chunk that is lost after it was checked reads as what no encoder writes, not as zeros.
        fill_value=np.iinfo(data.dtype).max,
        filters=[TransposeCodec(order=(1, 0))] if data.ndim == 2 else [],
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    array[:] = data
