"""A store in one LMDB file: transactions, many processes that read while one writes. For what is hot and local.

A document is there for every reader as soon as `append` has returned; there is nothing to commit. What the file holds,
by the first byte of the key: FORMAT.md. Opening walks the tree of keys, not the records, so it takes time in proportion
to the number of documents: 0.28 s for 100,000 of 700 tokens each, 2.8 s for a million (AMD EPYC, warm). Reading damaged
pages afterwards, while the file is open and mapped, is what this cannot guard against.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from logitstore import streams
from logitstore.alike import MOST_ORDERED, Alike
from logitstore.chunks import pack, unpack
from logitstore.codec import Codes
from logitstore.durable import beginning, sync
from logitstore.entries import root_attributes, root_of
from logitstore.errors import CorruptStoreError, StoreNotFoundError
from logitstore.index import block_ends, key_hash
from logitstore.key import document_key
from logitstore.lmdb_file import LmdbFile, create_file
from logitstore.lmdb_records import (
    BLOCK,
    BUNDLE,
    COUNTS,
    FIDELITY,
    KEY,
    NUMBER,
    PLACE,
    RANKS,
    ROOT,
    VOCABULARY,
    Counts,
    Place,
    Record,
    table_from_bytes,
)
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.sealed import seal_group, unseal_group
from logitstore.stored_vocabulary import LEVEL, lengths, read_tokens, text
from logitstore.streams import Ranks, planes
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary

if TYPE_CHECKING:
    from logitstore.lmdb_writer import LmdbWriter


class LmdbStore:
    """A store in one file; threads may read at once. `logitstore.open_store` opens it."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            StoreNotFoundError, StoreFormatError, CorruptStoreError: as their names say.
        """
        self.path = path
        try:
            self.file = LmdbFile.at(path)
        except OSError as error:
            raise StoreNotFoundError(f"{path} cannot be read ({error.strerror or error})") from error
        self.root = root_of(self._held(ROOT), f"{path}/root", path)
        self.manifest: Manifest = self.root.manifest
        self._tables: dict[int, tuple[Ranks, int]] = {}
        self._alike = Alike()

    @classmethod
    def create(cls, path: Path, manifest: Manifest, vocabulary: Vocabulary) -> "LmdbStore":
        """Begin an empty store, or open the one that another process has begun at the same moment.

        Raises:
            StoreWriteError: the place cannot be written.
            StoreError: what another process has begun there cannot be opened.
        """
        entries = {
            ROOT: seal_group(root_attributes(manifest, vocabulary, {})),
            VOCABULARY + b"lengths": pack(planes(lengths(vocabulary.tokens), 4).reshape(4, -1), level=LEVEL),
            VOCABULARY + b"bytes": pack([text(vocabulary.tokens)], level=LEVEL),
        }
        with beginning(path) as partial:
            if partial is not None:
                create_file(partial, path, entries)
                sync(path.parent)
        return cls(path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """See `contract.Store`."""
        with self._decoding("its vocabulary"):
            tokens = read_tokens(
                self.manifest.tokenizer.size,
                lambda name, size: unpack(self._held(VOCABULARY + name.encode()), size),
            )
        return Vocabulary(tokens, self.root.special_ids, self.root.bos_id, self.root.eos_id)

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """See `contract.Store`."""
        data = self.file.get(FIDELITY)
        return None if data is None else unseal_group(data, f"{self.path}/fidelity")

    def save_fidelity(self, fidelity: dict[str, Any]) -> None:
        """See `contract.Store`."""

        def put(txn: Any, counts: Counts) -> Counts:
            txn.put(FIDELITY, seal_group(fidelity))
            return counts

        self.change(put)

    def __len__(self) -> int:
        """How many documents the store holds."""
        return self.counts().documents

    def __contains__(self, key: object) -> bool:
        """Whether a document with this key (`logitstore.key.document_key`) is there; reads no values."""
        return isinstance(key, bytes) and self._number_of(key) is not None

    @property
    def positions(self) -> int:
        """How many positions the store holds."""
        return self.counts().positions

    @property
    def disk_bytes(self) -> int:
        """Size of the file."""
        return self.file.size

    @property
    def shard_count(self) -> int:
        """1: it is one file."""
        return 1

    def digest(self) -> str:
        """See `contract.Store`: a hash over the fingerprint and each document's key and record's crc32c."""
        whole = blake2b(self.manifest.fingerprint.encode(), digest_size=16)
        with self._decoding("a document"), self.file.reading() as txn, txn.cursor() as cursor:
            if cursor.set_range(KEY):
                for key, number in cursor:
                    if not key.startswith(KEY):
                        break
                    crc = Place.from_bytes(txn.get(PLACE + number) or b"").crc
                    whole.update(key + NUMBER.pack(crc))
        return whole.hexdigest()

    def plane_bytes(self) -> dict[str, int]:
        """The same apart: long records, the tree with short ones, the vocabulary, and pages to be used again."""
        stat, page = self.file.stat(), self.file.page_bytes
        parts = (len(self._held(VOCABULARY + part)) for part in (b"lengths", b"bytes"))
        vocabulary = sum(-(-size // page) * page for size in parts if size > page // 2)  # else it lies in the tree
        planes = {
            "records": stat["overflow_pages"] * page - vocabulary,
            "index": (stat["branch_pages"] + stat["leaf_pages"]) * page,
            "vocabulary": vocabulary,
        }
        return planes | {"unused": self.disk_bytes - sum(planes.values())}

    def get(self, token_ids: npt.ArrayLike, temperature: float | None = None, replica: int = 0) -> SparseTargets | None:
        """Look a document up by its token ids [L]; None is a miss. See `contract.Store`."""
        found = self._locate(np.asarray(token_ids))
        return None if found is None else self._targets(*found, temperature, replica)

    def codes(
        self, documents: Sequence[npt.NDArray[np.integer]], temperature: float | None = None, replica: int = 0
    ) -> list[Codes | None]:
        """See `contract.Store`."""
        number = self.manifest.recipe.set_number(temperature, replica)
        answers: list[Codes | None] = [None] * len(documents)
        by_table: dict[int, list[tuple[int, Record, int]]] = {}
        for i, token_ids in enumerate(documents):
            found = self._locate(token_ids)
            if found is not None:
                by_table.setdefault(id(found[0].ranks), []).append((i, *found))
        for asked in by_table.values():
            with self._decoding("a document"):
                parts = [record.part(number) for _, record, _ in asked]
                codes = streams.from_parts(parts, self.manifest.recipe.form, asked[0][1].ranks)
            at = 0
            for i, record, count in asked:
                answers[i] = codes.rows(slice(at, at + count))
                at += record.positions
        return answers

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions of a document `get` would answer."""
        if self._number_of(document_key(token_ids)) is not None:
            return len(token_ids) - 1
        found = self._locate(token_ids)
        return 0 if found is None else found[1]

    def document(
        self, number: int, temperature: float | None = None, replica: int = 0
    ) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The token ids and targets of the N-th document to be added; see `contract.Store`."""
        found = self._numbered(number)
        return self._tokens(found), self._targets(found, found.positions, temperature, replica)

    def token_ids(self, number: int) -> npt.NDArray[np.int32]:
        """The token ids of the N-th document; see `contract.Store`."""
        return self._tokens(self._numbered(number))

    def record(self, number: int) -> DocumentRecord:
        """The token ids and records of the N-th document; see `contract.Store`."""
        found = self._numbered(number)
        with self._decoding(f"document {number}"):
            return found.document()

    def refresh(self) -> None:
        """See `contract.Store`. There is nothing to do: every read sees all that is there."""

    def writer(self, name: str) -> "LmdbWriter":
        """See `contract.Store`."""
        from logitstore.lmdb_writer import LmdbWriter

        return LmdbWriter(self, name)

    def change(self, change: Callable[[Any, Counts], Counts]) -> None:
        """Change entries in one transaction, and the counts with them.

        Raises:
            StoreWriteError: full disk or no permission; nothing has changed.
        """

        def whole(txn: Any) -> None:
            counts = change(txn, Counts.from_bytes(txn.get(COUNTS)))
            txn.put(COUNTS, replace(counts, transaction=txn.id()).to_bytes())

        self.file.write(whole)

    def counts(self) -> Counts:
        """What it holds.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        with self._decoding("its counts"):
            return Counts.from_bytes(self._held(COUNTS))

    def table(self, number: int) -> tuple[Ranks, int]:
        """A table of ranks, and to how many positions it was fitted.

        Raises:
            CorruptStoreError: it is not there, or not as it was written.
        """
        if number not in self._tables:
            data = self._held(RANKS + NUMBER.pack(number))
            with self._decoding(f"table of ranks {number}"):
                self._tables[number] = table_from_bytes(data, self.manifest.recipe.vocab_size)
        return self._tables[number]

    def _ranks(self, number: int) -> Ranks:
        return self.table(number)[0]

    def _locate(self, token_ids: npt.NDArray[np.integer]) -> tuple[Record, int] | None:
        """The document that answers another, and how many of its positions."""
        number = self._number_of(document_key(token_ids))
        if number is not None:
            return self._record(number), len(token_ids) - 1
        for end in reversed(block_ends(len(token_ids))):
            numbers = self._beginning(key_hash(document_key(token_ids[:end])))
            nearest = self._alike.nearest(numbers, token_ids, end, lambda n: self._tokens(self._record(n)))
            if nearest is not None:
                return self._record(nearest[0]), nearest[1] - 1
        return None

    def _beginning(self, value: int) -> list[int]:
        """Documents under the hash of a beginning."""
        prefix, found = BLOCK + value.to_bytes(8, "big"), list[int]()
        with self.file.reading() as txn, txn.cursor() as cursor:
            if cursor.set_range(prefix):
                for key in cursor.iternext(values=False):
                    if not key.startswith(prefix) or len(found) == MOST_ORDERED:
                        break
                    found += NUMBER.unpack(key[len(prefix) :])
        return found

    def _number_of(self, key: bytes) -> int | None:
        data = self.file.get(KEY + key)
        return None if data is None else int.from_bytes(data, "big")

    def _numbered(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._record(number)

    def _record(self, number: int) -> Record:
        with self._decoding(f"document {number}"):
            with self.file.reading(buffers=True) as txn:
                held = txn.get(PLACE + NUMBER.pack(number))
                place = Place.from_bytes(bytes(held or b""))
                data = place.record_in(txn.get(BUNDLE + NUMBER.pack(place.bundle)) or b"")
            record = Record(data, self.manifest.recipe, self._ranks)
            if self._number_of(record.key) != number:
                raise ValueError("it is not found by its key")
            return record

    def _tokens(self, found: Record) -> npt.NDArray[np.int32]:
        with self._decoding("a document"):
            return found.token_ids

    def _targets(self, found: Record, count: int, temperature: float | None, replica: int) -> SparseTargets:
        with self._decoding("a document"):
            return found.targets(count, temperature, replica)

    def _held(self, key: bytes) -> bytes:
        data = self.file.get(key)
        if data is None:
            raise CorruptStoreError(f"{self.path} is no whole store: it has no entry {key!r}; build it again")
        return data

    @contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        """Tell what is wrong with bytes as damage of this."""
        try:
            yield
        except (ValueError, struct.error) as error:
            raise CorruptStoreError(
                f"{self.path}: {what} cannot be read ({error}); type `logitstore verify {self.path}` for all that is "
                "damaged, and restore the file or build the store again"
            ) from error


def block_key(value: int, number: int) -> bytes:
    """The key under which a document is found by the hash of a beginning."""
    return BLOCK + value.to_bytes(8, "big") + NUMBER.pack(number)
