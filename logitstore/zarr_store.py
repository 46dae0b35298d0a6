"""A store as a Zarr v3 hierarchy on disk: the only file that speaks to zarr.

::

    STORE/
      zarr.json                  group; its attributes are the manifest, sealed
      vocabulary/bytes, lengths  every token's bytes, one after another, and how many each has
      shards/NAME/               write-once; NAME is a hash of the keys inside
        zarr.json                group; its attributes are the shard's entry (documents, positions, a digest per file), sealed
        keys       u8  [D, 16]   document keys
        ends       u64 [D]       where each document ends in token_ids
        token_ids  u32 [tokens]
        records    u8  [positions, record width]; document d's rows are ends[d-1] - d .. ends[d] - d - 1

A shard appears by one rename, complete; what is being written lives in names that begin with a dot. A shard's files are held
against the digests in its entry before the first value of it is used.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec

from logitstore.errors import CorruptStoreError, StoreFormatError, StoreNotFoundError, StoreWriteError
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.sealed import file_digest, seal_group, unseal_group
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary

CHUNK_POSITIONS = 2048
ZSTD_LEVEL = 9
GROUP = "zarr.json"


@dataclass(frozen=True)
class Problem:
    """Something that `verify` found: which file, and what is wrong with it."""

    file: str
    fault: str


@dataclass
class Shard:
    """One finished shard: a few small arrays in memory, records read when asked for."""

    path: Path
    entry: dict[str, Any]
    checked: bool = False

    @cached_property
    def group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r", zarr_format=3)

    def array(self, name: str) -> zarr.Array[Any]:
        """One of the shard's arrays, its files held against their digests first."""
        if not self.checked:
            for problem in self.problems():
                raise CorruptStoreError(
                    f"{self.path / problem.file}: {problem.fault}; type `logitstore verify {self.path.parent.parent}` for all "
                    "that is damaged, then delete the shard's folder and build again"
                )
            self.checked = True
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        return np.asarray(self.array("keys")[:])

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.array("ends")[:]).astype(np.int64)

    def token_span(self, document: int) -> slice:
        """Where the document's tokens lie in `token_ids`; its records lie `document` rows earlier, one row fewer."""
        return slice(int(self.ends[document - 1]) if document else 0, int(self.ends[document]))

    def token_ids(self, document: int) -> npt.NDArray[np.int32]:
        return np.asarray(self.array("token_ids")[self.token_span(document)]).astype(np.int32)

    def records(self, document: int) -> npt.NDArray[np.uint8]:
        tokens = self.token_span(document)
        return np.asarray(self.array("records")[tokens.start - document : tokens.stop - document - 1])

    def problems(self) -> Iterator[Problem]:
        """Hold every file of the shard against its size and digest."""
        yield from file_problems(self.path, self.entry["files"])


class ZarrStore:
    """A store in a directory. Open it with `logitstore.open_store`."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            StoreNotFoundError, StoreFormatError, CorruptStoreError: as their names say.
        """
        self.path = path
        self.manifest = Manifest.from_json(read_root(path)["logitstore"], path)
        self.shards: list[Shard] = []
        self._index: dict[bytes, tuple[Shard, int]] = {}
        self.refresh()

    @classmethod
    def create(cls, path: Path, manifest: Manifest, vocabulary: Vocabulary) -> "ZarrStore":
        """Begin an empty store, or open the one that another process has begun at the same moment.

        Raises:
            StoreWriteError: the place cannot be written.
        """
        partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "shards").mkdir(parents=True)
            (partial / "shards" / GROUP).write_bytes(seal_group({}))
            _write_vocabulary(partial / "vocabulary", vocabulary)
            root = {
                "logitstore": manifest.to_json(),
                "special_ids": sorted(vocabulary.special_ids),
                "bos_id": vocabulary.bos_id,
                "eos_id": vocabulary.eos_id,
                "files": _file_entries(partial),
            }
            (partial / GROUP).write_bytes(seal_group(root))
            _sync_tree(partial)
            try:
                partial.rename(path)
            except OSError:
                if not (path / GROUP).is_file():
                    raise
            _sync(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokens as bytes."""
        root = read_root(self.path)
        for problem in file_problems(self.path, root["files"]):
            raise CorruptStoreError(
                f"{self.path / problem.file}: {problem.fault}; restore the file, or build the store again"
            )
        group = zarr.open_group(self.path / "vocabulary", mode="r", zarr_format=3)
        data = np.asarray(group["bytes"][:]).tobytes()  # type: ignore[index]
        ends = np.cumsum(np.asarray(group["lengths"][:])).tolist()  # type: ignore[index]
        tokens = tuple(data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
        return Vocabulary(tokens, frozenset(root["special_ids"]), root["bos_id"], root["eos_id"])

    def refresh(self) -> None:
        """See the shards that were finished since the store was opened."""
        seen = {shard.path.name for shard in self.shards}
        try:
            found = sorted(p for p in (self.path / "shards").iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError as error:
            raise CorruptStoreError(
                f"{self.path / 'shards'} cannot be read ({error.strerror}); restore the folder"
            ) from error
        for path in found:
            if path.name in seen:
                continue
            shard = Shard(path, read_entry(path))
            self.shards.append(shard)
            for document, key in enumerate(shard.keys):
                self._index.setdefault(key.tobytes(), (shard, document))

    def __len__(self) -> int:
        """How many documents the store holds."""
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    @property
    def positions(self) -> int:
        """How many positions the store holds."""
        return sum(shard.entry["positions"] for shard in self.shards)

    @property
    def disk_bytes(self) -> int:
        """Size of everything on disk, metadata included."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def get(self, token_ids: npt.ArrayLike) -> SparseTargets | None:
        """Look a document up by its token ids [L]; None is a miss.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        place = self._index.get(document_key(np.asarray(token_ids)))
        if place is None:
            return None
        return self._decode(*place)

    def document(self, number: int) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The tokens and targets of the N-th document, in the store's own order from 0.

        Raises:
            IndexError: there are fewer documents.
            CorruptStoreError: the bytes are not those that were written.
        """
        for shard in self.shards:
            if 0 <= number < len(shard.keys):
                return shard.token_ids(number), self._decode(shard, number)
            number -= len(shard.keys)
        raise IndexError(number)

    def _decode(self, shard: Shard, document: int) -> SparseTargets:
        try:
            return self.manifest.recipe.read(shard.records(document))
        except ValueError as error:
            raise CorruptStoreError(
                f"document {document} of {shard.path / 'records'} cannot be decoded ({error}); type `logitstore verify {self.path}`"
            ) from error

    def write_shard(self, documents: Sequence[DocumentRecord]) -> None:
        """Add documents as one shard: complete, or not there at all.

        Raises:
            StoreWriteError: full disk or no permission.
        """
        keys = [document.key for document in documents]
        name = blake2b(b"".join(keys), digest_size=8).hexdigest()
        partial, final = self.path / "shards" / f".partial-{name}", self.path / "shards" / name
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            tokens = np.concatenate([document.token_ids for document in documents]).astype(np.uint32)
            _write_array(partial, "keys", np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
            _write_array(
                partial, "ends", np.cumsum([len(document.token_ids) for document in documents], dtype=np.uint64)
            )
            _write_array(partial, "token_ids", tokens)
            _write_array(partial, "records", np.concatenate([document.records for document in documents]))
            entry = {
                "documents": len(documents),
                "positions": len(tokens) - len(documents),
                "fingerprint": self.manifest.fingerprint,
                "files": _file_entries(partial),
            }
            (partial / GROUP).write_bytes(seal_group(entry))
            _sync_tree(partial)
            if not final.exists():
                partial.rename(final)
                _sync(final.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.refresh()


def read_root(path: Path) -> dict[str, Any]:
    """Read and check the root's attributes.

    Raises:
        StoreNotFoundError, StoreFormatError, CorruptStoreError: as their names say.
    """
    if not path.exists():
        raise StoreNotFoundError(
            f"there is no store at {path}; type `logitstore build --teacher T --dataset D --out {path}`"
        )
    if not path.is_dir():
        raise StoreFormatError(
            f"{path} is a file, a store is a folder; type the path that `logitstore build --out` was given"
        )
    try:
        data = (path / GROUP).read_bytes()
    except FileNotFoundError:
        raise StoreFormatError(
            f"{path} is not a store: it has no {GROUP}; type the path that `logitstore build --out` was given"
        ) from None
    except OSError as error:
        raise StoreFormatError(f"{path / GROUP} cannot be read ({error.strerror})") from error
    if b'"logitstore"' not in data:
        raise StoreFormatError(f"{path} is not a logitstore; type the path that `logitstore build --out` was given")
    return unseal_group(data, path / GROUP)


def read_entry(shard: Path) -> dict[str, Any]:
    """Read and check a shard's entry.

    Raises:
        CorruptStoreError: it is missing or damaged.
    """
    try:
        return unseal_group((shard / GROUP).read_bytes(), shard / GROUP)
    except OSError as error:
        raise CorruptStoreError(
            f"{shard / GROUP} cannot be read ({error.strerror}); delete the shard's folder and build again"
        ) from error


def cannot_write(path: Path, error: OSError) -> StoreWriteError:
    """The one line for a full disk, a missing permission and the like."""
    return StoreWriteError(
        f"{path} cannot be written: {error.strerror or error}; nothing that was finished is lost, "
        "mend this and type the same command to go on"
    )


def _write_array(group: Path, name: str, data: npt.NDArray[Any]) -> None:
    """Write one array as a single file of chunks, each with its own checksum."""
    rows = min(CHUNK_POSITIONS, max(len(data), 1))
    chunks = (rows, *data.shape[1:])
    array = zarr.create_array(
        store=str(group),
        name=name,
        shape=data.shape,
        chunks=chunks,
        shards=(-(-max(len(data), 1) // rows) * rows, *data.shape[1:]),
        dtype=data.dtype,
        filters=[TransposeCodec(order=(1, 0))] if data.ndim == 2 else [],
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    array[:] = data


def _write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    path.mkdir()
    (path / GROUP).write_bytes(seal_group({}))
    _write_array(path, "bytes", np.frombuffer(b"".join(vocabulary.tokens), np.uint8))
    _write_array(path, "lengths", np.array([len(token) for token in vocabulary.tokens], np.uint32))


def _file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file below a folder, but for the group's own `zarr.json` that will hold them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "digest": file_digest(file.read_bytes())}
        for file in files
        if file != folder / GROUP
    }


def file_problems(folder: Path, entries: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Hold files against their entries."""
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                yield Problem(name, f"holds {size:,} bytes instead of {entry['bytes']:,}")
            elif file_digest((folder / name).read_bytes()) != entry["digest"]:
                yield Problem(name, "its bytes are not those that were written")
        except OSError as error:
            yield Problem(name, f"cannot be read ({error.strerror})")


def _sync(path: Path) -> None:
    """Flush a file or a folder's names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
