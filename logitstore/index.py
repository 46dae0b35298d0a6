"""Finds documents by the hash of what they say, and by the hash of how they begin. Numbers in, numbers out; no files.

A table is a sorted column of 64-bit hashes and, beside it, the number of the document that each belongs to. A search
touches a few pages of it however many documents there are, so a table may be a mapped file. Who asks for a key holds
the document found against all of it: a hash alone never decides what is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitstore.key import document_key

FIRST_BLOCKS = (32, 128)
BLOCK_TOKENS = 256
"""A document is also found by the keys of its first 32, 128, 256, 512, 768, ... tokens."""

MOST_ALIKE = 64
"""So many documents under one hash are compared one by one."""

Hashes = npt.NDArray[np.uint64]


def key_hash(key: bytes) -> int:
    """The first 64 bits of a key, as the tables hold it."""
    return int.from_bytes(key[:8], "little")


def key_hashes(keys: npt.NDArray[np.uint8]) -> Hashes:
    """The same of keys [D, 16]: [D]."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0].astype(np.uint64)


def block_ends(length: int) -> list[int]:
    """At which numbers of tokens a document of so many is found by its beginning."""
    return [end for end in FIRST_BLOCKS if end <= length] + list(range(BLOCK_TOKENS, length + 1, BLOCK_TOKENS))


def block_hashes(token_ids: npt.NDArray[np.integer]) -> list[int]:
    """Hashes of the keys of a document's beginnings, shortest first."""
    return [key_hash(document_key(token_ids[:end])) for end in block_ends(len(token_ids))]


def block_counts(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """How many such beginnings documents of these lengths have."""
    lengths = lengths.astype(np.int64)
    return lengths // BLOCK_TOKENS + sum((lengths >= end).astype(np.int64) for end in FIRST_BLOCKS)


@dataclass(frozen=True, eq=False)
class Table:
    """Hashes in rising order, and the document of each; of equal hashes the lower document first."""

    hashes: Hashes
    documents: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, hashes: Hashes, documents: npt.NDArray[np.integer]) -> "Table":
        """Sort hashes [N], and with them the documents [N] that they belong to."""
        order = np.lexsort((documents, hashes))
        return cls(hashes[order], documents[order].astype(np.uint32))

    def find(self, value: int, most: int = MOST_ALIKE) -> list[int]:
        """The documents under a hash, no more than `most`."""
        first = int(np.searchsorted(self.hashes, np.uint64(value)))
        same = self.hashes[first : first + most] == np.uint64(value)
        found: list[int] = self.documents[first : first + most][same].tolist()
        return found


EMPTY = Table(np.empty(0, np.uint64), np.empty(0, np.uint32))


def find(tables: Sequence[Table], value: int, most: int = MOST_ALIKE) -> list[int]:
    """The documents under a hash in several tables, in their order; of each table no more than `most`."""
    return [document for table in tables for document in table.find(value, most)]


def common_length(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> int:
    """How many leading tokens two documents have in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
