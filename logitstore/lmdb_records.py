"""The bytes of what an LMDB store holds: its keys, a document's record, the counts. FORMAT.md says what lies where.

A record is the streams of `streams`, `position_streams` and `hidden_states`, one frame for each set of entries, one for
what is kept beside them and one for each layer, so that a reader decompresses what it wants. Ranks come from a table
that the store keeps, and a record names its own. Measured on 112,000 positions of SmolLM2-135M at threshold:16, in
documents of 512 tokens, in bytes a position: record columns transposed 36.2 (zstd 3) or 35.8 (9), these streams 31.5
with ids for ranks, 28.8 with ranks of 500 positions, 27.7 of 4,000, 27.0 of all. So it is these streams, with tables
that follow the store's growth.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import google_crc32c
import numpy as np
import numpy.typing as npt

from logitstore import hidden_states, position_streams, streams
from logitstore.chunks import CRC, checked, pack, unchecked, unpack
from logitstore.codec import Codes, from_record, head_mask, to_record
from logitstore.key import document_key
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.streams import Chunk, Part, Ranks
from logitstore.targets import SparseTargets

COUNTS, ROOT, VOCABULARY, FIDELITY, RANKS, BLOCK, KEY, PLACE, BUNDLE = (bytes([kind]) for kind in range(9))
"""First byte of each key. COUNTS comes first in the file, BUNDLE last, where appending is cheapest."""
NUMBER = struct.Struct(">I")
"""Document numbers in keys: so written they are in order."""
MOST_DOCUMENTS = (1 << 32) - 1
BUNDLE_BYTES = 1 << 20
"""Records that are added together lie in one piece, of about this size at most: LMDB fills up each piece to a page."""

RECORD_BYTES = 64 << 20
"""A set of entries of one document takes no more than this before compression."""
FIT_GROWTH, LAST_FIT = 4, 32_768
"""A table of ranks is fitted to so many times the positions of the one before; to that many, it is the last."""

_HEAD = struct.Struct("<16sIII")
_COUNTS = struct.Struct("<7Q")
_PLACE = struct.Struct(">IIII")
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


@dataclass(frozen=True)
class Counts:
    """What a store holds, under the transaction that wrote it."""

    transaction: int
    documents: int = 0
    positions: int = 0
    blocks: int = 0
    tables: int = 0
    bundles: int = 0
    checksum: int = 0
    """`row_sum` of all KEY, BLOCK and PLACE entries: by this a walk knows that every one is as it was written."""

    def to_bytes(self) -> bytes:
        """56 bytes and their crc32c."""
        return checked(_COUNTS.pack(*astuple(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Counts":
        """Read them.

        Raises:
            ValueError: they are not what was written.
        """
        if len(data) != _COUNTS.size + CRC.size:
            raise ValueError("its counts are not of their size")
        return cls(*_COUNTS.unpack(unchecked(data)))

    def plus(self, entries: Mapping[bytes, bytes], **more: int) -> "Counts":
        """These with entries added, and with more of other things."""
        fields = {name: getattr(self, name) + by for name, by in more.items()}
        rows = b"".join((key + data).ljust(24, b"\0") for key, data in entries.items())
        checksum = self.checksum + row_sum(np.frombuffer(rows, np.uint8).reshape(-1, 24))
        return replace(self, **fields, checksum=checksum % (1 << 64))


@dataclass(frozen=True)
class Place:
    """Where a document's record lies, and what its bytes are."""

    bundle: int
    start: int
    stop: int
    crc: int
    """crc32c of the record."""

    @classmethod
    def of(cls, record: bytes, bundle: int, start: int) -> "Place":
        """The place of a record that begins there."""
        return cls(bundle, start, start + len(record), google_crc32c.value(record))

    def to_bytes(self) -> bytes:
        """16 bytes."""
        return _PLACE.pack(*astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Place":
        """Read them.

        Raises:
            ValueError: they are not 16.
        """
        if len(data) != _PLACE.size:
            raise ValueError("it has no place")
        return cls(*_PLACE.unpack(data))

    def record_in(self, bundle: bytes | memoryview) -> bytes:
        """The record.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        record = bytes(bundle[self.start : self.stop])
        if google_crc32c.value(record) != self.crc:
            raise ValueError("a checksum does not match")
        return record


def row_sum(rows: npt.NDArray[np.uint8]) -> int:
    """Sum over rows [n, 24] of three 64-bit words times odd numbers, modulo 2^64: no flipped bit leaves it as it is."""
    return int((rows.view("<u8").astype(np.uint64) * _MULTIPLIERS).sum(dtype=np.uint64))


def most_record_bytes(positions: int, recipe: Recipe) -> int:
    """Bytes of a set of entries, of what is kept beside them, or of a layer, that a document takes at most."""
    beside = position_streams.most_chunk_bytes(positions, recipe.form, len(recipe.log_z))
    layer = positions * hidden_states.layer_width(recipe.hidden_size)
    return max(streams.most_chunk_bytes(positions, recipe.form), beside, layer)


def encode(document: DocumentRecord, recipe: Recipe, table: int, rank_of: npt.NDArray[np.uint32]) -> bytes:
    """A document as a record.

    Args:
        table: number of the table of ranks, and `rank_of` what it says.

    Raises:
        ValueError: a document of one token, or one that is too long.
    """
    positions, form = len(document.records), recipe.form
    if positions < 1 or most_record_bytes(positions, recipe) > RECORD_BYTES:
        raise ValueError(f"a document of {positions + 1:,} tokens cannot be kept in one record")
    sets = [from_record(document.records[:, recipe.columns(number)], form) for number in range(recipe.sets)]
    beside = position_streams.to_streams(
        document.records[:, recipe.columns(recipe.sets)], document.token_ids[1:], sets[0], form, rank_of
    )
    frames = [pack(part) for part in (*(streams.to_streams(codes, form, rank_of) for codes in sets), beside)]
    for number in range(len(recipe.hidden_layers)):
        layer = hidden_states.to_streams(document.records[:, recipe.layer_columns(number)], recipe.hidden_size)
        frames.append(pack(layer, level=hidden_states.ZSTD_LEVEL))
    head = _HEAD.pack(document.key, positions + 1, int(document.token_ids[0]), table)
    sizes = np.array([len(frame) for frame in frames], "<u4")
    return b"".join([checked(head + sizes.tobytes()), *frames])


class Record:
    """A document's record; decompressed and decoded as far as it is asked for.

    Raises:
        ValueError: its bytes are not those that were written; so do all of its methods.
    """

    def __init__(self, data: bytes, recipe: Recipe, table: Callable[[int], Ranks]) -> None:
        self._recipe = recipe
        at = _HEAD.size + 4 * (recipe.sets + 1 + len(recipe.hidden_layers)) + CRC.size
        head = unchecked(data[:at])
        if len(head) != at - CRC.size:
            raise ValueError("a record that ends too early")
        self.key, length, self._first, number = _HEAD.unpack_from(head)
        self.positions = length - 1
        if length < 2 or most_record_bytes(self.positions, recipe) > RECORD_BYTES:
            raise ValueError(f"a record of {length:,} tokens")
        ends = at + np.cumsum(np.frombuffer(head, "<u4", offset=_HEAD.size), dtype=np.int64)
        if ends[-1] != len(data):
            raise ValueError("a record that does not end where it should")
        self._frames = [data[start:end] for start, end in zip([at, *ends[:-1].tolist()], ends.tolist(), strict=True)]
        self._sets: dict[int, Codes] = {}
        self.ranks = table(number)

    def part(self, number: int) -> Part:
        """The streams of set `number` of entries; those of several records of one table are decoded at once."""
        form, n = self._recipe.form, self.positions
        raw = unpack(self._frames[number], streams.most_chunk_bytes(n, form), at_most=True)
        return Chunk(raw, n, form).part(0, n)

    def codes(self, number: int) -> Codes:
        """Set `number` of entries."""
        if number not in self._sets:
            self._sets[number] = streams.from_parts([self.part(number)], self._recipe.form, self.ranks)
        return self._sets[number]

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """[L]; held against the key."""
        return self._beside[1]

    def targets(self, count: int, temperature: float | None, replica: int) -> SparseTargets:
        """The first `count` positions; see `Recipe.read`."""
        codes = self.codes(self._recipe.set_number(temperature, replica)).rows(slice(count))
        return self._recipe.read_codes(codes, self._beside[0][:count], self._hidden()[:count], temperature)

    def document(self) -> DocumentRecord:
        """All of it, as a teacher gave it."""
        sets = [to_record(self.codes(number), self._recipe.form) for number in range(self._recipe.sets)]
        return DocumentRecord(self.token_ids, np.concatenate([*sets, self._beside[0], self._hidden()], axis=1))

    def _hidden(self) -> npt.NDArray[np.uint8]:
        """[P, hidden_width]"""
        n, size = self.positions, self._recipe.hidden_size
        parts = []
        for frame in self._frames[self._recipe.sets + 1 :]:
            raw = unpack(frame, n * hidden_states.layer_width(size))
            parts.append(hidden_states.from_streams(raw, n, size))
        return np.concatenate(parts, axis=1) if parts else np.empty((n, 0), np.uint8)

    @cached_property
    def _beside(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        form, log_z = self._recipe.form, len(self._recipe.log_z)
        raw = unpack(
            self._frames[self._recipe.sets],
            position_streams.most_chunk_bytes(self.positions, form, log_z),
            at_most=True,
        )
        position, labels = position_streams.from_streams(raw, self.codes(0), form, log_z, self.ranks)
        token_ids = np.concatenate([np.array([self._first], np.uint32).astype(np.int32), labels])
        if document_key(token_ids) != self.key:
            raise ValueError("its tokens are not those of its key")
        return position, token_ids


def table_to_bytes(ranks: Ranks, positions: int) -> bytes:
    """A table of ranks, and to how many positions it was fitted."""
    return checked(CRC.pack(positions)) + pack(streams.planes(ranks.common, 4).reshape(4, -1))


def table_from_bytes(data: bytes, vocab_size: int) -> tuple[Ranks, int]:
    """Read them back.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    (positions,) = CRC.unpack(unchecked(data[:8]))
    common = unpack(data[8:], 4 * min(streams.RANKED, vocab_size), at_most=True)
    return Ranks(streams.integers(common, 4), vocab_size), positions


def used_ids(document: DocumentRecord, recipe: Recipe) -> npt.NDArray[np.int64]:
    """How often each id is an entry of a document: [V], what a table is fitted to."""
    counts = np.zeros(recipe.vocab_size, np.int64)
    for number in range(recipe.sets):
        codes = from_record(document.records[:, recipe.columns(number)], recipe.form)
        kept = recipe.form.sampled_tail | head_mask(codes.head_count, recipe.form.selection.k)
        counts += np.bincount(codes.ids[np.broadcast_to(kept, codes.ids.shape)], minlength=recipe.vocab_size)
    return counts
