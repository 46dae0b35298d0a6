"""Selected entries to codes and records, and codes to targets: what is kept of a position, in bytes.

A code c stands for the probability exp(-c / 16), 255 for zero. Probabilities are rounded up or down at random, so that
the mean of what is stored is the value itself: rounding to the nearest code leaves a bias of up to 3.2 % in an entry,
this leaves none. The largest cell of a position (the tail, or a head entry) has code 0 and no value of its own: it is
what the others leave of 1, which keeps its mean too and makes the sum exact. `random:N` keeps counts of N instead, and
with an exponent codes for weights up to e^4.

A record is these codes as columns of bytes, for k entries (integers little-endian, one byte plane after another):

    ids     k x id_bytes   head and tail each by rising id: the first as it is, then differences
    codes   k              the head's; the tail's own log-probs where they are kept, else 0
    head    1 or more      number of head entries (2 bytes where k > 255)
    tail    1              code of the probability outside the head

and beside them, once however many sets of entries there are:

    label   1              the label's log-prob, nearest code
    entropy 1              nearest multiple of 1/16 nat
    log_z   2 each         nearest multiple of 1/4096 nat
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.selection import Selected, Selection
from logitstore.targets import SparseTargets

STEPS_PER_NAT = 16
LOG_Z_STEPS = 4096
LARGEST = 0
"""Code of a position's largest cell. No other has it: a cell that is not the largest is at most 1/2, code 11."""
ZERO = 255
SMALLEST = ZERO - 1
PROBS = np.append(np.exp(-np.arange(ZERO) / STEPS_PER_NAT), 0.0)
"""float64 [256]; the probability that each code stands for."""
LEAST = float(PROBS[SMALLEST])
"""The least of these but none, 1.3e-7."""
LARGEST_WEIGHT = np.exp(4.0)
"""`random:N:t` with t other than 1: a weight is this times what its code stands for."""
_PROBS32 = PROBS.astype(np.float32)
_OTHER_PROBS32 = np.where(np.arange(256) == LARGEST, 0, PROBS).astype(np.float32)
"""The same where the largest cell counts nothing."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """What decides how entries become codes and bytes."""

    selection: Selection
    vocab_size: int
    tail_log_probs: bool = False

    @property
    def id_bytes(self) -> int:
        """Bytes of one token id in a record: 2, 3 or 4."""
        return 2 if self.vocab_size <= 1 << 16 else 3 if self.vocab_size <= 1 << 24 else 4

    @property
    def count_bytes(self) -> int:
        """Bytes of a number of entries."""
        return 1 if self.selection.k < 256 else 2 if self.selection.k < 1 << 16 else 4

    @property
    def entries_width(self) -> int:
        """Bytes of a position's entries in a record."""
        return self.selection.k * (self.id_bytes + 1) + self.count_bytes + 1

    @property
    def sampled_tail(self) -> bool:
        """Whether entries after the head stand for the tail."""
        return self.selection.kind == "threshold"

    @property
    def sums_to_one(self) -> bool:
        """Whether head and tail are cells of one distribution."""
        return self.selection.kind != "random"

    @property
    def counts(self) -> bool:
        """Whether the codes are counts of draws."""
        return self.selection.kind == "random" and self.selection.exponent == 1


@dataclass(frozen=True, eq=False)
class Codes:
    """The entries of N positions as they are stored, for a kernel that decodes by itself; `targets` decodes here."""

    ids: npt.NDArray[np.uint32]
    """[N, k]; the head by rising id, then the tail by rising id, then zeros."""
    codes: Bytes
    """[N, k]; of the head; of the tail where its log-probs are kept, else 0."""
    head_count: npt.NDArray[np.uint32]
    """[N]"""
    tail: Bytes
    """[N]; code of the probability outside the head."""

    def rows(self, rows: slice) -> "Codes":
        """Some of the positions."""
        return Codes(self.ids[rows], self.codes[rows], self.head_count[rows], self.tail[rows])


def concatenated(parts: list[Codes]) -> Codes:
    """The positions of several, one after another."""
    if len(parts) == 1:
        return parts[0]
    return Codes(*(np.concatenate([getattr(part, name) for part in parts]) for name in Codes.__annotations__))


def position_width(log_z: int) -> int:
    """Bytes of what a record keeps beside its entries, with log Z at that many temperatures."""
    return 2 + 2 * log_z


def quantize(selected: Selected, rounding: npt.NDArray[np.float64], form: Form) -> Codes:
    """Round the entries of N positions to codes.

    Args:
        rounding: [N, k + 1] in [0, 1), from `selection.randomness`; the same numbers give the same codes.
    """
    k = form.selection.k
    in_head = head_mask(selected.head_count, k)
    head = np.where(in_head, selected.values, 0)
    tail = np.full(len(head), ZERO)
    if form.counts:
        codes = np.rint(head * k)
    elif not form.sums_to_one:
        codes = round_at_random(head / LARGEST_WEIGHT, rounding[:, :k])
    else:
        cells = np.concatenate([selected.tail_mass[:, None], head], axis=1)
        rounded = np.maximum(round_at_random(cells, np.roll(rounding, 1, axis=1)), LARGEST + 1)
        rounded[np.arange(len(cells)), cells.argmax(axis=1)] = LARGEST
        tail, codes = rounded[:, 0], rounded[:, 1:]
    codes = np.where(in_head, codes, _nearest(selected.values) if form.tail_log_probs else 0)
    head_count = selected.head_count.astype(np.uint32)
    ids, codes = by_id(selected.ids.astype(np.uint32), codes.astype(np.uint8), head_count)
    return Codes(ids, codes, head_count, tail.astype(np.uint8))


def head_mask(head_count: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.bool_]:
    """Which of k entries are the head: bool [N, k]."""
    if k < 256:  # copying a row takes a tenth of comparing it
        return _head_masks(k).take(head_count, axis=0)
    return np.arange(k, dtype=np.uint32) < head_count[:, None]


@lru_cache
def _head_masks(k: int) -> npt.NDArray[np.bool_]:
    """`head_mask` of 0 .. k: [k + 1, k]."""
    return np.tri(k + 1, k, -1, dtype=np.bool_)


def by_id(
    ids: npt.NDArray[np.uint32], codes: Bytes, head_count: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.uint32], Bytes]:
    """Put head and tail of each row [N, k] in rising order of their ids, codes along with them."""
    in_tail = ~head_mask(head_count, ids.shape[1])
    if ids.max(initial=0) < 1 << 23:  # a row of 32-bit keys is sorted in half the time
        keys = ids << np.uint32(8)
        keys |= codes
        keys |= in_tail.astype(np.uint32) << np.uint32(31)
        keys.sort(axis=1)
        return keys << np.uint32(1) >> np.uint32(9), keys.astype(np.uint8)
    long_keys = in_tail.astype(np.uint64) << np.uint64(40) | ids.astype(np.uint64) << np.uint64(8) | codes
    long_keys.sort(axis=1)
    return (long_keys >> np.uint64(8)).astype(np.uint32), long_keys.astype(np.uint8)


def encode_position(selected: Selected, log_z: npt.NDArray[np.float64]) -> Bytes:
    """What N positions keep beside their entries: uint8 [N, position_width], from log_z [N, n]."""
    label = np.clip(np.rint(-selected.label_log_prob * STEPS_PER_NAT), 0, SMALLEST)
    entropy = np.clip(np.rint(selected.entropy * STEPS_PER_NAT), 0, ZERO)
    steps = np.clip(np.rint(log_z * LOG_Z_STEPS), 0, (1 << 16) - 1).astype(np.int64)
    columns = [label.astype(np.uint8)[:, None], entropy.astype(np.uint8)[:, None], to_planes(steps, 2)]
    return np.concatenate(columns, axis=1)


def to_record(codes: Codes, form: Form) -> Bytes:
    """Codes as columns of bytes: uint8 [N, entries_width]."""
    slots = np.arange(form.selection.k, dtype=np.uint32)
    starts = (slots == 0) | (slots == codes.head_count[:, None])
    steps = np.where(starts, codes.ids, np.diff(codes.ids, axis=1, prepend=np.uint32(0)))
    head_count = to_planes(codes.head_count[:, None], form.count_bytes)
    return np.concatenate([to_planes(steps, form.id_bytes), codes.codes, head_count, codes.tail[:, None]], axis=1)


def from_record(record: Bytes, form: Form) -> Codes:
    """The codes of records uint8 [N, entries_width].

    Raises:
        ValueError: they say something that no encoder writes.
    """
    k = form.selection.k
    planes, codes, head, tail = np.split(record, np.cumsum([k * form.id_bytes, k, form.count_bytes]), axis=1)
    head_count = from_planes(head, 1)[:, 0]
    ids = running_ids(from_planes(planes, k), require_heads(head_count, k))
    require_ids(ids, form.vocab_size)
    return Codes(ids, codes, head_count, tail[:, 0])


def running_ids(steps: npt.NDArray[np.uint32], head_count: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Undo the differences of head and tail: [N, k]."""
    sums = np.cumsum(steps, axis=1, dtype=np.uint32)
    k = steps.shape[1]
    last = np.take_along_axis(sums, (head_count.astype(np.int64)[:, None] - 1) % k, axis=1)
    in_head = head_mask(head_count, k)
    sums -= np.where(~in_head & (head_count[:, None] > 0), last, np.uint32(0))
    return sums


def require_heads(head_count: npt.NDArray[np.uint32], k: int) -> npt.NDArray[np.uint32]:
    """Raise ValueError where a head is longer than there are entries."""
    if head_count.max(initial=0) > k:
        raise ValueError(f"a record holds {head_count.max()} head entries of {k}")
    return head_count


def require_ids(ids: npt.NDArray[np.uint32], vocab_size: int) -> None:
    """Raise ValueError where an id lies beyond the vocabulary."""
    if ids.max(initial=0) >= vocab_size:
        raise ValueError(f"a record holds id {ids.max()} of {vocab_size:,}")


def weights(codes: Codes, form: Form) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weights [N, k] and the tail's mass [N] that codes stand for."""
    k = form.selection.k
    in_head = head_mask(codes.head_count, k)
    if not form.sums_to_one:
        values = codes.codes / np.float32(k) if form.counts else _PROBS32[codes.codes] * np.float32(LARGEST_WEIGHT)
        return np.where(in_head, values, np.float32(0)), np.zeros(len(in_head), np.float32)
    values = _OTHER_PROBS32.take(np.where(in_head, codes.codes, np.uint8(LARGEST)))
    tail = _OTHER_PROBS32.take(codes.tail)
    rest = 1 - (np.einsum("nk->n", values) + tail)
    # Hundreds of equal cells may leave the largest too little; it is then as large as the next, and all are scaled.
    if len(low := np.flatnonzero(rest < 0.26)):  # half of what a cell other than the largest may be
        next_largest = np.maximum(values[low].max(axis=1), tail[low])
        short = rest[low] < next_largest / 2
        low, next_largest = low[short], next_largest[short]
        total = 1 - rest[low] + next_largest
        values[low] /= total[:, None]
        tail[low] /= total
        rest[low] = next_largest / total
    tail = np.where(codes.tail == LARGEST, rest, tail)
    if form.sampled_tail:
        tau = tail / np.maximum(k - codes.head_count, 1).astype(np.float32)
        np.copyto(values, np.repeat(tau, k).reshape(values.shape), where=~in_head)
    largest = np.flatnonzero(in_head & (codes.codes == LARGEST))
    np.put(values, largest, rest[largest // k])
    return values, tail


def targets(codes: Codes, position: Bytes, form: Form) -> SparseTargets:
    """Decode P positions of a document, from 0 on.

    Args:
        position: [P, position_width].
    """
    values, tail_mass = weights(codes, form)
    log_probs = None
    with np.errstate(divide="ignore"):
        log_tail_mass = np.log(tail_mass)
        if form.tail_log_probs:
            own = np.where(codes.codes == ZERO, np.float32(-np.inf), codes.codes / np.float32(-STEPS_PER_NAT))
            log_probs = np.where(head_mask(codes.head_count, form.selection.k), np.log(values), own)
    steps = from_planes(position[:, 2:], position.shape[1] // 2 - 1)
    return SparseTargets(
        positions=np.arange(len(tail_mass), dtype=np.int32),
        ids=codes.ids,
        weights=values,
        head_count=codes.head_count.astype(np.int32),
        log_tail_mass=log_tail_mass,
        label_log_prob=position[:, 0].astype(np.float32) / np.float32(-STEPS_PER_NAT),
        entropy=position[:, 1].astype(np.float32) / np.float32(STEPS_PER_NAT),
        log_probs=log_probs,
        log_z=(steps / np.float32(LOG_Z_STEPS)).astype(np.float32) if steps.size else None,
    )


def round_at_random(probs: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Round probabilities to codes so that E[PROBS[code]] = p: up with probability (p - below) / (above - below)."""
    with np.errstate(divide="ignore"):
        exact = -np.log(probs) * STEPS_PER_NAT
    above = np.clip(np.floor(np.minimum(exact, SMALLEST)), 0, SMALLEST).astype(np.int64)
    upper, lower = PROBS[above], PROBS[above + 1]
    return np.asarray(above + (uniform * (upper - lower) >= probs - lower))


def _nearest(probs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The code nearest to each probability in nats; ZERO for none."""
    with np.errstate(divide="ignore"):
        return np.where(probs > 0, np.clip(np.rint(-np.log(probs) * STEPS_PER_NAT), 0, SMALLEST), ZERO)


def to_planes(values: npt.NDArray[np.integer[Any]], width: int) -> Bytes:
    """Integers [N, m] to byte planes [N, width * m], lowest bytes first."""
    return np.concatenate([(values >> (8 * i) & 0xFF).astype(np.uint8) for i in range(width)], axis=1)


def from_planes(planes: Bytes, m: int) -> npt.NDArray[np.uint32]:
    """Byte planes [N, width * m] back to integers [N, m]."""
    values = planes[:, :m].astype(np.uint32)
    for i in range(1, planes.shape[1] // max(m, 1)):
        values |= planes[:, i * m : (i + 1) * m].astype(np.uint32) << np.uint32(8 * i)
    return values
