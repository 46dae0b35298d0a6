"""Selected entries to bytes and back: one u8 record of `record_width` bytes per position.

The columns of a record, for k entries (all integers little-endian, one byte plane after another):

    ids     k x id_bytes   the head as it is; the tail's first id, then differences
    values  k              the head's probabilities as codes, each minus the one before (mod 256); 0 after the head
    head    1 or 2         number of head entries (2 bytes where k > 255)
    tail    1              the probability outside the head, as a code
    label   1              the label's log-prob, nearest code
    entropy 1              nearest multiple of 1/16 nat

A code c stands for exp(-c / 16), 255 for zero. Probabilities are rounded up or down at random, so that the mean of what
is stored is the value itself: rounding to the nearest code leaves a bias of up to 3.2 % in an entry, this leaves none.
Reading a record makes head and tail sum to 1 again: the cell with the smallest code (of equal ones the tail, then the
first) takes what the others leave, which keeps the mean.
"""

import numpy as np
import numpy.typing as npt

from logitstore.selection import Selected, Selection
from logitstore.targets import SparseTargets

STEPS_PER_NAT = 16
ZERO = 255
SMALLEST = ZERO - 1
PROBS = np.append(np.exp(-np.arange(ZERO) / STEPS_PER_NAT), 0.0)
"""float64 [256]; the probability that each code stands for."""


def id_bytes(vocab_size: int) -> int:
    """Bytes of one token id: 2, 3 or 4."""
    return 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4


def record_width(k: int, vocab_size: int) -> int:
    """Bytes of one position's record before compression."""
    return k * id_bytes(vocab_size) + k + _head_bytes(k) + 3


def encode(selected: Selected, rounding: npt.NDArray[np.float64], vocab_size: int) -> npt.NDArray[np.uint8]:
    """Pack N positions into records uint8 [N, record_width].

    Args:
        rounding: [N, k + 1] in [0, 1), from `selection.randomness`; the same numbers give the same bytes.
    """
    n, k = selected.ids.shape
    in_head = np.arange(k) < selected.head_count[:, None]
    first_tail = np.arange(k) == selected.head_count[:, None]
    ids = selected.ids.astype(np.int64)
    steps = np.diff(ids, axis=1, prepend=0)
    ids = np.where(in_head | first_tail, ids, steps)

    cells = np.concatenate([selected.tail_mass[:, None], selected.head_probs], axis=1)
    tail, codes = np.split(_mark_largest(round_at_random(cells, np.roll(rounding, 1, axis=1)), cells), [1], axis=1)
    values = np.where(in_head, np.diff(codes, axis=1, prepend=0), 0)
    label = np.clip(np.rint(-selected.label_log_prob * STEPS_PER_NAT), 0, SMALLEST)
    entropy = np.clip(np.rint(selected.entropy * STEPS_PER_NAT), 0, ZERO)
    return np.concatenate(
        [
            _to_planes(ids, id_bytes(vocab_size)),
            values.astype(np.uint8),
            _to_planes(selected.head_count.astype(np.int64)[:, None], _head_bytes(k)),
            tail.astype(np.uint8),
            label.astype(np.uint8)[:, None],
            entropy.astype(np.uint8)[:, None],
        ],
        axis=1,
    ).reshape(n, record_width(k, vocab_size))


def decode(records: npt.NDArray[np.uint8], selection: Selection, vocab_size: int) -> SparseTargets:
    """Unpack records uint8 [P, record_width] of the positions 0 .. P - 1.

    Raises:
        ValueError: a record says something that no encoder writes (a head longer than k, an id beyond the vocabulary).
    """
    n, k = len(records), selection.k
    width, head_bytes = id_bytes(vocab_size), _head_bytes(k)
    id_planes, values, head, tail, label, entropy = np.split(
        records, np.cumsum([k * width, k, head_bytes, 1, 1]), axis=1
    )
    head_count = _from_planes(head, 1)[:, 0]
    in_head = np.arange(k) < head_count[:, None]
    ids = _from_planes(id_planes, k)
    ids = np.where(in_head, ids, np.cumsum(np.where(in_head, 0, ids), axis=1))
    if n and (int(head_count.max()) > k or int(ids.max()) >= vocab_size):
        raise ValueError(f"a record holds {head_count.max()} head entries of {k} and id {ids.max()} of {vocab_size:,}")

    head_probs = np.where(in_head, PROBS[np.cumsum(values, axis=1, dtype=np.uint8)], 0)
    cells = sum_to_one(np.concatenate([PROBS[tail], head_probs], axis=1))
    tail_mass, weights = cells[:, 0], cells[:, 1:]
    if selection.kind == "threshold":
        tau = tail_mass / np.maximum(k - head_count, 1)
        weights = np.where(in_head, weights, tau[:, None])
    with np.errstate(divide="ignore"):
        log_tail_mass = np.log(tail_mass)
    return SparseTargets(
        positions=np.arange(n, dtype=np.int32),
        ids=ids.astype(np.uint32),
        weights=weights.astype(np.float32),
        head_count=head_count.astype(np.int32),
        log_tail_mass=log_tail_mass.astype(np.float32),
        label_log_prob=(label[:, 0] / np.float32(-STEPS_PER_NAT)).astype(np.float32),
        entropy=(entropy[:, 0] / np.float32(STEPS_PER_NAT)).astype(np.float32),
    )


def round_at_random(probs: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Round probabilities to codes so that E[PROBS[code]] = p: up with probability (p - below) / (above - below)."""
    with np.errstate(divide="ignore"):
        exact = -np.log(probs) * STEPS_PER_NAT
    above = np.clip(np.floor(np.minimum(exact, SMALLEST)), 0, SMALLEST).astype(np.int64)
    upper, lower = PROBS[above], PROBS[above + 1]
    return np.asarray(above + (uniform * (upper - lower) >= probs - lower), np.uint8)


def _mark_largest(codes: npt.NDArray[np.uint8], cells: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Make the largest cell [tail, head ...] the first that has the smallest code, whatever the others were rounded to.

    Its value is what they leave. Were it chosen by the luck of the rounding, two nearly equal cells would be biased.
    """
    rows, largest = np.arange(len(cells)), cells.argmax(axis=1)
    marked = codes.astype(np.int64)
    above = np.floor(-STEPS_PER_NAT * np.log(cells[rows, largest])).clip(0, SMALLEST).astype(np.int64)
    tied = (largest > 0) & (codes[:, 0] <= above)  # the tail comes before the head
    marked[rows, largest] = above - tied
    return marked


def sum_to_one(cells: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give the largest cell of each row [N, m] (of equal ones the first) what the others leave of 1.

    Each cell is an unbiased estimate, so the largest stays one; dividing by the sum would bias every cell. Only where
    that would cost the largest half of its value (hundreds of equal cells) is the row divided by its sum.
    """
    rows, largest = np.arange(len(cells)), cells.argmax(axis=1)
    others = cells.copy()
    others[rows, largest] = 0
    rest = 1 - others.sum(axis=1)
    usable = rest >= cells[rows, largest] / 2
    others[rows, largest] = np.where(usable, rest, cells[rows, largest])
    others[~usable] /= others[~usable].sum(axis=1, keepdims=True)
    return others


def _head_bytes(k: int) -> int:
    return 1 if k < 256 else 2 if k < 1 << 16 else 4


def _to_planes(values: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.uint8]:
    """Integers [N, m] to byte planes [N, width * m], lowest bytes first."""
    return np.concatenate([(values >> (8 * i) & 0xFF).astype(np.uint8) for i in range(width)], axis=1)


def _from_planes(planes: npt.NDArray[np.uint8], m: int) -> npt.NDArray[np.int64]:
    """Byte planes [N, width * m] back to integers [N, m]."""
    width = planes.shape[1] // m
    parts = planes.reshape(len(planes), width, m).astype(np.int64)
    return np.asarray((parts << (8 * np.arange(width))[:, None]).sum(axis=1))
