"""What every store does, wherever its bytes lie: `zarr_store` and `lmdb_store` hold to it, under one set of tests."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from logitstore.codec import Codes
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary


class Store(Protocol):
    """Documents and their targets, found by what the documents say."""

    @property
    def path(self) -> Path | str:
        """Where it lies, for messages."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What made it."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokens as bytes.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        ...

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """How far it lies from its live teacher, as `fidelity.Fidelity.to_json` has it; None where nobody measured."""
        ...

    def save_fidelity(self, fidelity: dict[str, Any]) -> None:
        """Keep what was measured, in place of what was there.

        Raises:
            StoreWriteError: full disk or no permission.
        """
        ...

    def __len__(self) -> int:
        """How many documents it holds."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether a document with this key (`logitstore.key.document_key`) is there; reads no values."""
        ...

    @property
    def positions(self) -> int:
        """How many positions it holds."""
        ...

    @property
    def disk_bytes(self) -> int:
        """Size of all of it on disk, metadata included."""
        ...

    @property
    def shard_count(self) -> int:
        """How many write-once parts it has; 1 where it is one file."""
        ...

    def digest(self) -> str:
        """blake2b-128 over all that it holds, in hex: equal where two copies are. Reads no values."""
        ...

    def plane_bytes(self) -> dict[str, int]:
        """The same, apart for each kind of content."""
        ...

    def get(self, token_ids: npt.ArrayLike, temperature: float | None = None, replica: int = 0) -> SparseTargets | None:
        """Look a document up by its token ids [L]; None is a miss.

        A document that begins as a stored one, for at least 32 tokens, is answered as far as they agree: wholly where
        it is cut shorter, else at fewer positions than L - 1. Where more than 64 begin alike, 64 of them are looked at.

        Args:
            temperature: by default the store's first.
            replica: which of several draws, counted modulo how many there are.

        Raises:
            ConfigError: the store does not serve this temperature.
            CorruptStoreError: the bytes are not those that were written.
            ValueError: no row of token ids.
        """
        ...

    def codes(
        self, documents: Sequence[npt.NDArray[np.integer]], temperature: float | None = None, replica: int = 0
    ) -> list[Codes | None]:
        """Look several documents up at once, and decode nothing: for each its entries, as `get` would answer it.

        Raises:
            ConfigError: there are no entries of this temperature.
            CorruptStoreError, ValueError: as for `get`.
        """
        ...

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions of a document `get` would answer; reads no values."""
        ...

    def document(
        self, number: int, temperature: float | None = None, replica: int = 0
    ) -> tuple[npt.NDArray[np.int32], SparseTargets]:
        """The token ids and targets of the N-th document, in the store's own order from 0.

        Raises:
            IndexError: there are fewer documents.
            ConfigError, CorruptStoreError: as for `get`.
        """
        ...

    def token_ids(self, number: int) -> npt.NDArray[np.int32]:
        """The token ids of the N-th document.

        Raises:
            IndexError, CorruptStoreError: as for `document`.
        """
        ...

    def record(self, number: int) -> DocumentRecord:
        """The token ids and records of the N-th document, as a teacher gave them.

        Raises:
            IndexError, CorruptStoreError: as for `document`.
        """
        ...

    def refresh(self) -> None:
        """See what others have finished since it was opened.

        Raises:
            CorruptStoreError, IncompatibleStoreError: what they have finished cannot be read.
        """
        ...

    def writer(self, name: str) -> "Writer":
        """Begin to write; one process at a time holds a writer of a given name.

        Raises:
            StoreWriteError: another process holds it, or the store cannot be written.
        """
        ...


class Writer(Protocol):
    """Writes documents into a store. What it has appended survives a kill at any moment after `append` returned."""

    @property
    def pending(self) -> Mapping[bytes, DocumentRecord]:
        """Documents that are kept but that the store's readers do not see yet, by key, oldest first."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __contains__(self, key: object) -> bool:
        """Whether a document is pending or in the store."""
        ...

    def append(self, documents: Sequence[DocumentRecord]) -> None:
        """Keep a batch of documents; when this returns they are on disk.

        Raises:
            StoreWriteError: full disk; the batch is not kept, those before it are.
        """
        ...

    def commit(self, keys: Iterable[bytes]) -> None:
        """Show pending documents to the store's readers.

        Raises:
            StoreWriteError: full disk; the documents stay pending.
        """
        ...
