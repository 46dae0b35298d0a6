"""A store as a Zarr v3 hierarchy: shards that appear by one rename, complete, and an index over them.

What lies in names that begin with a dot is not finished. Opening reads the root and the index, or each shard's
documents where the index does not know it yet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from logitstore.catalog import Catalog
from logitstore.chunks import unpack
from logitstore.codec import Codes, concatenated
from logitstore.durable import beginning, publish
from logitstore.entries import read_root, unreadable
from logitstore.errors import CorruptStoreError, StoreWriteError
from logitstore.files import CannotList, Files, LocalFiles
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.sealed import GROUP, file_digest, file_problems, read_group, unseal_group
from logitstore.shard import Shard
from logitstore.stored_index import FOLDER
from logitstore.stored_vocabulary import read_tokens
from logitstore.streams import from_shards
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_writer import write_documents, write_fidelity, write_index, write_root

if TYPE_CHECKING:
    from logitstore.journal import ShardWriter

T = TypeVar("T")
VOCABULARY_FILES = {"bytes": "c/0", "lengths": "c/0/0"}
MAP_PREFIX = "vocabulary-map-"
"""How the names of the folders begin that `saved_maps` keeps."""


class ZarrStore:
    """A store in a folder, a zip file or behind a URL; threads may read at once. `logitstore.open_store` opens it."""

    def __init__(self, files: Files, path: Path | str) -> None:
        """Open a store.

        Raises:
            StoreFormatError, CorruptStoreError: as their names say.
            IncompatibleStoreError: it holds a shard of another store.
        """
        self.path = path
        self.files = files
        self.root = read_root(files, path)
        for problem in file_problems(files, "", self.root.files):
            raise CorruptStoreError(
                f"{path}/{problem.file}: {problem.fault}; restore the file, or build the store again"
            )
        self.manifest = self.root.manifest
        self.catalog = Catalog(files, path, self.manifest)

    @classmethod
    def create(cls, path: Path, manifest: Manifest, vocabulary: Vocabulary) -> "ZarrStore":
        """Begin an empty store, or open the one that another process has begun at the same moment.

        Raises:
            StoreWriteError: the place cannot be written.
            StoreError: what another process has begun there cannot be opened.
        """
        with beginning(path) as partial:
            if partial is not None:
                write_root(partial, manifest, vocabulary)
                publish(partial, path)
        return cls(LocalFiles(path), path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokens as bytes.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """

        def read(name: str, size: int) -> npt.NDArray[np.uint8]:
            return unpack(self.files.read(f"vocabulary/{name}/{VOCABULARY_FILES[name]}"), size)

        try:
            tokens = read_tokens(self.manifest.tokenizer.size, read)
        except (OSError, ValueError) as error:
            raise unreadable(f"{self.path}/vocabulary", error) from error
        return Vocabulary(tokens, self.root.special_ids, self.root.bos_id, self.root.eos_id)

    def refresh(self) -> None:
        """See the shards that were finished since the store was opened.

        Raises:
            CorruptStoreError: the index, a shard's entry or its documents are not what was written.
            IncompatibleStoreError: a shard belongs to another store.
        """
        self.catalog.refresh()

    @property
    def shard_names(self) -> list[str]:
        """The shards, in the order in which documents are numbered."""
        return self.catalog.names

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return len(self.shard_names)

    def shard(self, name: str) -> Shard:
        """One shard by its name; see `Catalog.shard`."""
        return self.catalog.shard(name)

    def __len__(self) -> int:
        """How many documents the store holds."""
        return len(self.catalog)

    def __contains__(self, key: object) -> bool:
        """Whether a document with this key (`logitstore.key.document_key`) is there; reads no values."""
        return isinstance(key, bytes) and self._looking(lambda: self.catalog.number_of(key)) is not None

    @property
    def positions(self) -> int:
        """How many positions the store holds."""
        return self._looking(lambda: self.catalog.positions)

    @property
    def disk_bytes(self) -> int:
        """Size of every file that is part of the store, metadata included."""
        return sum(self.plane_bytes().values())

    def digest(self) -> str:
        """See `contract.Store`: a hash over the fingerprint and each shard's seal, which is one over its files.

        Raises:
            CorruptStoreError: a shard's entry is missing.
        """
        try:
            seals = (self.files.read(f"shards/{name}/{GROUP}") for name in sorted(self.shard_names))
            return file_digest("\n".join([self.manifest.fingerprint, *map(file_digest, seals)]).encode())
        except OSError as error:
            raise unreadable(f"{self.path}/shards", error) from error

    def plane_bytes(self) -> dict[str, int]:
        """The same for each kind of array, and for metadata."""
        planes: dict[str, int] = {}
        for name, size in self._sizes():
            parts = name.split("/")
            if parts[-1] == GROUP:
                plane = "metadata"
            elif parts[0] == "shards" and len(parts) > 2:
                plane = parts[2]
            else:
                plane = "vocabulary-maps" if parts[0].startswith(MAP_PREFIX) else parts[0]
            planes[plane] = planes.get(plane, 0) + size
        return planes

    def get(self, token_ids: npt.ArrayLike, temperature: float | None = None, replica: int = 0) -> SparseTargets | None:
        """Look a document up by its token ids [L]; None is a miss. See `contract.Store`."""
        ids = np.asarray(token_ids)

        def read() -> SparseTargets | None:
            place = self.catalog.locate(ids)
            return None if place is None else self._read(*place, temperature, replica)

        return self._looking(read)

    def answer(self, token_ids: npt.NDArray[np.integer]) -> DocumentRecord | None:
        """The same as a teacher gave it: of the document, or of its first tokens where no more is answered.

        Raises:
            CorruptStoreError, ValueError: as for `get`.
        """

        def read() -> DocumentRecord | None:
            place = self.catalog.locate(token_ids)
            if place is None:
                return None
            shard, document, count = place
            found = shard.document(document)
            return DocumentRecord(found.token_ids[: count + 1], found.records[:count])

        return self._looking(read)

    def codes(
        self, documents: Sequence[npt.NDArray[np.integer]], temperature: float | None = None, replica: int = 0
    ) -> list[Codes | None]:
        """See `contract.Store`. All are decoded together."""
        return self._looking(lambda: self._codes(documents, temperature, replica))

    def _codes(
        self, documents: Sequence[npt.NDArray[np.integer]], temperature: float | None, replica: int
    ) -> list[Codes | None]:
        number, form = self.manifest.recipe.set_number(temperature, replica), self.manifest.recipe.form
        by_shard: dict[str, list[tuple[int, tuple[int, int]]]] = {}
        for i, token_ids in enumerate(documents):
            place = self.catalog.locate(token_ids)
            if place is not None:
                shard, document, count = place
                start, _ = shard.span(document)
                by_shard.setdefault(shard.name, []).append((i, (start, start + count)))
        answers: list[Codes | None] = [None] * len(documents)
        if not by_shard:
            return answers
        spans = {name: [span for _, span in asked] for name, asked in by_shard.items()}
        try:
            found = from_shards([self.shard(name).parts(number, spans[name]) for name in spans], form)
        except ValueError:
            found = concatenated([self.shard(name).codes(number, spans[name]) for name in spans])  # tells which it is
        at = 0
        for i, (start, stop) in (asked for some in by_shard.values() for asked in some):
            answers[i] = found.rows(slice(at, at + stop - start))
            at += stop - start
        return answers

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions of a document `get` would answer; reads no values."""
        place = self._looking(lambda: self.catalog.locate(token_ids))
        return 0 if place is None else place[2]

    def document(
        self, number: int, temperature: float | None = None, replica: int = 0
    ) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The token ids and targets of the N-th document, in the store's own order from 0.

        Raises:
            IndexError: there are fewer documents.
            ConfigError, CorruptStoreError: as for `get`.
        """
        return self.document_of(*self.catalog.place(self.catalog.unhidden(number)), temperature, replica)

    def document_of(
        self, shard: Shard, document: int, temperature: float | None = None, replica: int = 0
    ) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The same of the N-th document of a shard, from 0.

        Raises:
            ConfigError, CorruptStoreError: as for `get`.
        """
        count = int(shard.lengths[document]) - 1
        return shard.token_ids(document), self._read(shard, document, count, temperature, replica)

    def number_of(self, key: bytes) -> int | None:
        """Which document has this key, as `document` counts them; None where none has."""
        number = self.catalog.number_of(key)
        return None if number is None else self.catalog.visible(number)

    def token_ids(self, number: int) -> npt.NDArray[np.int32]:
        """The token ids of the N-th document; see `contract.Store`."""
        shard, document = self.catalog.place(self.catalog.unhidden(number))
        return shard.token_ids(document)

    def record(self, number: int) -> DocumentRecord:
        """The token ids and records of the N-th document, as a teacher gave them.

        Raises:
            IndexError: there are fewer documents.
            CorruptStoreError: the bytes are not those that were written.
        """
        shard, document = self.catalog.place(self.catalog.unhidden(number))
        return shard.document(document)

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """See `contract.Store`.

        Raises:
            CorruptStoreError: its bytes are not those that were written.
        """
        name = f"fidelity/{GROUP}"
        try:
            return unseal_group(read_group(self.files, "fidelity"), f"{self.path}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(f"{self.path}/{name}", error) from error

    def save_fidelity(self, fidelity: dict[str, Any]) -> None:
        """See `contract.Store`."""
        write_fidelity(self.folder, fidelity)
        if isinstance(self.files, LocalFiles):
            self.files.close()  # the handle of what was there before

    def writer(self, name: str) -> "ShardWriter":
        """See `contract.Store`."""
        from logitstore.journal import ShardWriter

        return ShardWriter(self, name)

    def write_documents(self, documents: Sequence[DocumentRecord], writer: str = "") -> None:
        """Add documents as one shard: complete, or not there at all.

        Args:
            writer: tells apart those who write into this store at the same time. What a killed one left half-written is
                replaced by the next shard that it writes.

        Raises:
            StoreWriteError: full disk or no permission.
        """
        write_documents(self.folder, documents, self.manifest, writer)
        self.refresh()

    def save_index(self) -> None:
        """Write the index of all shards, where it is not there already.

        Raises:
            StoreWriteError: full disk or no permission.
        """
        write_index(self.folder, self.catalog)

    @property
    def folder(self) -> Path:
        """The folder that can be written into.

        Raises:
            StoreWriteError: there is none.
        """
        if not isinstance(self.files, LocalFiles):
            raise StoreWriteError(f"{self.path} can only be read; type a folder, as in --out store.zarr")
        return self.files.root

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Every file that is part of the store, and its bytes; over plain HTTP as the store itself says."""
        try:
            for name in self.files.names():
                with suppress(FileNotFoundError):  # another process has replaced the index since
                    yield name, self.files.size(name)
        except CannotList:
            groups = {"": self.root.files, **({FOLDER: self.catalog.index.files} if self.catalog.index else {})}
            groups |= {f"shards/{name}": self.shard(name).entry.files for name in self.shard_names}
            for folder, files in sorted(groups.items()):
                group = f"{folder}/{GROUP}".lstrip("/")
                yield group, self.files.size(group)
                yield from ((f"{folder}/{name}".lstrip("/"), entry["bytes"]) for name, entry in files.items())

    def _looking(self, read: Callable[[], T]) -> T:
        """Look documents up, again where a shard was taken away meanwhile: `gc` leaves them in another."""
        while True:
            before = self.shard_names
            try:
                return read()
            except CorruptStoreError:
                if isinstance(self.files, LocalFiles):
                    self.refresh()
                if self.shard_names is before:  # one list for each look at them, also where they are the same again
                    raise

    def _read(self, shard: Shard, document: int, count: int, temperature: float | None, replica: int) -> SparseTargets:
        recipe = self.manifest.recipe
        start, _ = shard.span(document)
        number = recipe.set_number(temperature, replica)
        codes = shard.codes(number, [(start, start + count)])
        position, _ = shard.positions(start, start + count, None if number else codes)
        return recipe.read_codes(codes, position, shard.hidden(start, start + count), temperature)
