"""A chunk of positions as streams of bytes, each of one kind, so that each is compressed by statistics of its own.

`codec.Codes` of N positions become, one after another (FORMAT.md, "A chunk of entries"):

    head_count   how many entries are the head
    largest      which cell is the largest: 0 the tail, i the i-th of the head; its code is left out below
    tail         the tail's code
    anchor       largest code of the head, where there is no sampled tail to start from
    values       codes of the head, as distance from the anchor or, with a sampled tail, from a tail entry's own
    head ids     ranks, each minus the one before: a set has no order, and loses log2(h!) bits by being sorted
    tail values  the tail's own codes, where they are kept
    tail ids     the same as the head's

Ranks are ids numbered by how often the shard stores them (`Ranks`). Reading takes any rows of a chunk and decodes no
others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from logitstore import varint
from logitstore.codec import LARGEST, STEPS_PER_NAT, ZERO, Codes, Form, by_id, head_mask, require_heads, require_ids
from logitstore.varint import Varints

RANKED = 8192
"""Ids that have a rank of their own; the others follow by rising id."""
MOST_TABLE = 1 << 22
"""Vocabulary up to which ranks are looked up in a table; larger ones, if there are any, in the common ids alone."""
CHUNK_POSITIONS = 2048
CHUNK_BYTES = 4 << 20

Bytes = npt.NDArray[np.uint8]


def chunk_positions(positions: int, form: Form) -> int:
    """Positions of one chunk, of a shard that has so many: 2,048, fewer where they would take more than 4 MB."""
    return max(1, min(CHUNK_POSITIONS, positions, CHUNK_BYTES // most_chunk_bytes(1, form)))


class Ranks:
    """Ids numbered by how often they are stored, commonest first; those that have no number follow by rising id."""

    def __init__(self, common: npt.NDArray[np.uint32], vocab_size: int) -> None:
        """Take the ids of the ranks 0 .. m - 1 [m].

        Raises:
            ValueError: an id twice, or beyond the vocabulary.
        """
        self.common, self.vocab_size = common, vocab_size
        rising = np.sort(common).astype(np.int64)
        if len(rising) and (rising[-1] >= vocab_size or (np.diff(rising) == 0).any()):
            raise ValueError("a table of ranks that no encoder writes")
        self._below = rising - np.arange(len(rising))
        """For each common id, how many rare ones are below it."""
        self._ids = self._look_up(np.arange(vocab_size, dtype=np.uint32)) if vocab_size <= MOST_TABLE else None

    @classmethod
    def fit(cls, counts: npt.NDArray[np.integer]) -> "Ranks":
        """Rank ids by how often each is stored [V]; of equals the lower id comes first."""
        order = np.argsort(-counts.astype(np.int64), kind="stable")[:RANKED]
        return cls(order[counts[order] > 0].astype(np.uint32), len(counts))

    def table(self) -> npt.NDArray[np.uint32]:
        """The rank of every id [V]."""
        ranks = np.empty(self.vocab_size, np.uint32)
        every = np.arange(self.vocab_size, dtype=np.uint32)
        ranks[self._look_up(every)] = every
        return ranks

    def ids(self, ranks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """The id of each rank, of any shape.

        Raises:
            ValueError: a rank beyond the vocabulary.
        """
        require_ids(ranks, self.vocab_size)
        return self._look_up(ranks) if self._ids is None else self._ids.take(ranks)

    def _look_up(self, ranks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """`ids` without a table: a rare id is its number among the rare ones, and the common ones below it."""
        m = len(self.common)
        number = ranks - np.uint32(m)
        rare = number + np.searchsorted(self._below, number, side="right").astype(np.uint32)
        return np.where(ranks < m, self.common.take(ranks, mode="clip"), rare) if m else ranks


def most_chunk_bytes(rows: int, form: Form) -> int:
    """Bytes that a chunk of so many positions takes at most."""
    entry = 1 + varint.most_bytes(form.vocab_size)
    return rows * (form.selection.k * entry + 2 * form.count_bytes + 2)


@lru_cache
def _log_codes(k: int) -> npt.NDArray[np.int64]:
    """16 log m to the nearest, for m = k .. 0 tail entries (1 where there are none): [k + 1], by the head's length."""
    codes: npt.NDArray[np.int64] = np.rint(STEPS_PER_NAT * np.log(np.maximum(np.arange(k, -1, -1), 1))).astype(np.int64)
    return codes


def to_streams(codes: Codes, form: Form, rank_of: npt.NDArray[np.uint32]) -> list[Bytes]:
    """The streams of a chunk, in their order on disk.

    Args:
        rank_of: `Ranks.table`.
    """
    k = form.selection.k
    in_head = head_mask(codes.head_count, k)
    in_tail = ~in_head & form.sampled_tail
    ranks, own = by_id(rank_of[codes.ids], codes.codes, codes.head_count)
    starts = (np.arange(k) == 0) | (np.arange(k, dtype=np.uint32) == codes.head_count[:, None])
    steps = np.where(starts, ranks, np.diff(ranks, axis=1, prepend=np.uint32(0)))

    streams = [planes(codes.head_count, form.count_bytes)]
    coded = in_head
    if form.sums_to_one:
        is_largest = in_head & (own == LARGEST)
        coded = in_head & ~is_largest
        largest = np.where(is_largest.any(axis=1), is_largest.argmax(axis=1) + 1, 0)
        streams += [planes(largest, form.count_bytes), codes.tail[largest > 0]]
    if form.sampled_tail:
        anchor = _tail_entry_code(codes.tail, codes.head_count, k)
    else:
        anchor = np.where(coded, own, 0).max(axis=1)
        streams.append(anchor)
    streams.append((anchor[:, None] - own)[coded])
    streams += Varints.of(steps[in_head]).planes
    if form.tail_log_probs:
        streams.append((own - anchor[:, None])[in_tail])
    if form.sampled_tail:
        streams += Varints.of(steps[in_tail]).planes
    return streams


class Chunk:
    """The streams of a chunk of N positions, cut apart.

    Raises:
        ValueError: they are not what `to_streams` writes.
    """

    def __init__(self, raw: Bytes, rows: int, form: Form) -> None:
        self.form = form
        k, cut = form.selection.k, Cut(raw)
        self.head_count = require_heads(integers(cut.take(rows * form.count_bytes), form.count_bytes), k)
        heads = int(self.head_count.sum())
        tails, self.largest, coded = rows * k - heads, None, heads
        if form.sums_to_one:
            self.largest = integers(cut.take(rows * form.count_bytes), form.count_bytes)
            if (self.largest > self.head_count).any():
                raise ValueError("the largest cell lies beyond the head")
            self._tail = cut.take(int(np.count_nonzero(self.largest)))
            coded -= len(self._tail)
        self._anchor = None if form.sampled_tail else cut.take(rows)
        self._values = cut.take(coded)
        self._head_ids = cut.varints(heads)
        self._tail_values = cut.take(tails) if form.tail_log_probs else None
        self._tail_ids = cut.varints(tails) if form.sampled_tail else None

    @property
    def largest_in_head(self) -> npt.NDArray[np.bool_]:
        """Where the largest cell is an entry of the head: [N]."""
        return np.zeros(len(self.head_count), np.bool_) if self.largest is None else self.largest > 0

    def part(self, start: int, stop: int) -> "Part":
        """The streams of the rows start .. stop - 1."""
        rows, k = slice(start, stop), self.form.selection.k
        first = int(self.head_count[:start].sum())
        last = first + int(self.head_count[rows].sum())
        heads, tails, coded = slice(first, last), slice(k * start - first, k * stop - last), slice(first, last)
        largest = tail = None
        if self.largest is not None:
            largest = self.largest[rows]
            before = int(np.count_nonzero(self.largest[:start]))
            after = before + int(np.count_nonzero(largest))
            tail, coded = self._tail[before:after], slice(first - before, last - after)
        return Part(
            head_count=self.head_count[rows],
            largest=largest,
            tail=tail,
            anchor=None if self._anchor is None else self._anchor[rows],
            values=self._values[coded],
            head_ids=self._head_ids.slice(heads),
            tail_values=None if self._tail_values is None else self._tail_values[tails],
            tail_ids=None if self._tail_ids is None else self._tail_ids.slice(tails),
        )


class Part(NamedTuple):
    """Streams of some rows of a chunk; several parts of one shard are decoded at once."""

    head_count: npt.NDArray[np.uint32]
    largest: npt.NDArray[np.uint32] | None
    tail: Bytes | None
    anchor: Bytes | None
    values: Bytes
    head_ids: Varints
    tail_values: Bytes | None
    tail_ids: Varints | None


def from_parts(parts: Sequence[Part], form: Form, ranks: Ranks) -> Codes:
    """Decode parts of one shard's chunks, one after another.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    return from_shards([(parts, ranks)], form)


def from_shards(shards: Sequence[tuple[Sequence[Part], Ranks]], form: Form) -> Codes:
    """Decode parts of several shards' chunks at once, one after another.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    parts = [part for some, _ in shards for part in some]
    k = form.selection.k
    head_count = np.concatenate([part.head_count for part in parts])
    n, in_head = len(head_count), head_mask(head_count, k)
    tail, coded = np.full(n, ZERO, np.uint8), in_head
    if form.sums_to_one:
        largest = _joined([part.largest for part in parts])
        tail[:] = LARGEST
        tail[largest > 0] = _joined([part.tail for part in parts])
        coded = in_head.copy()
        in_row = np.flatnonzero(largest)
        coded[in_row, largest[in_row] - 1] = False
    anchor = _tail_entry_code(tail, head_count, k) if form.sampled_tail else _joined([part.anchor for part in parts])
    codes = np.zeros((n, k), np.uint8)
    codes[coded] = np.concatenate([part.values for part in parts])
    codes = (anchor[:, None] - codes) * coded
    steps = np.zeros((n, k), np.uint32)
    head_steps = varint.concatenate([part.head_ids for part in parts]).values()
    steps[in_head] = head_steps
    if form.sampled_tail:
        in_tail = ~in_head
        tail_steps = varint.concatenate([part.tail_ids for part in parts if part.tail_ids is not None]).values()
        _start_again(tail_steps, head_steps, head_count, k)
        steps[in_tail] = tail_steps
        if form.tail_log_probs:
            codes[in_tail] = _joined([part.tail_values for part in parts])
            np.add(anchor[:, None], codes, out=codes, where=in_tail)
    ids, at = np.cumsum(steps, axis=1, dtype=np.uint32), 0
    for some, ranks in shards:
        rows = slice(at, at + sum(len(part.head_count) for part in some))
        ids[rows] = ranks.ids(ids[rows])
        at = rows.stop
    if not form.sampled_tail:
        ids[~in_head] = 0
    ids, codes = by_id(ids, codes, head_count)
    return Codes(ids, codes, head_count, tail)


def _start_again(
    tail_steps: npt.NDArray[np.uint32], head_steps: npt.NDArray[np.uint32], head_count: npt.NDArray[np.uint32], k: int
) -> None:
    """Make each row's first tail step, in place, one from the row's last head rank, modulo 2^32."""
    ends = np.cumsum(head_count, dtype=np.int64)
    sums = np.concatenate([np.zeros(1, np.uint32), np.cumsum(head_steps, dtype=np.uint32)])
    last_rank = sums[ends] - sums[ends - head_count]
    has_tail = head_count < k
    first = (np.arange(len(head_count)) * k - (ends - head_count))[has_tail]
    tail_steps[first] -= last_rank[has_tail]


def _tail_entry_code(tail: Bytes, head_count: npt.NDArray[np.integer], k: int) -> Bytes:
    """The code of a tail entry's weight, tail / (k - head), to the nearest: where the head's codes begin."""
    codes: Bytes = (tail + _log_codes(k)[head_count]).astype(np.uint8)
    return codes


def planes(values: npt.NDArray[np.integer], width: int) -> Bytes:
    """Integers [n] as byte planes one after another, lowest first: [width * n]."""
    return np.ascontiguousarray(values.astype("<u4").view(np.uint8).reshape(-1, 4).T[:width]).reshape(-1)


def integers(planes: Bytes, width: int) -> npt.NDArray[np.uint32]:
    """Byte planes [width * n] back to integers [n]."""
    if width == 1:
        return planes.astype(np.uint32)
    values = np.zeros(len(planes) // width, np.uint32)
    for i, plane in enumerate(planes.reshape(width, -1)):
        values |= plane.astype(np.uint32) << np.uint32(8 * i)
    return values


def _joined(parts: list[npt.NDArray[Any] | None]) -> npt.NDArray[Any]:
    return np.concatenate([part for part in parts if part is not None])


@dataclass
class Cut:
    """Takes streams off the front of a chunk."""

    rest: Bytes
    """What has not been taken yet."""

    def take(self, n: int) -> Bytes:
        """The next n bytes.

        Raises:
            ValueError: there are fewer.
        """
        if n > len(self.rest):
            raise ValueError("a chunk that ends too early")
        stream, self.rest = self.rest[:n], self.rest[n:]
        return stream

    def varints(self, n: int) -> Varints:
        """The next n integers."""
        first = self.take(n)
        second, third, escapes = (
            int(np.count_nonzero(first >= from_)) for from_ in (varint.MIDDLE, varint.HIGH, varint.ESCAPE)
        )
        return Varints(first, self.take(second), self.take(third), self.take(2 * escapes))
