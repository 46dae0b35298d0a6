"""What a chunk of positions keeps beside its entries, as streams of bytes: labels, their log-probs, entropies, log Z.

The token that followed a position is, three times in four, among the position's own entries, and most often the
likeliest: so it is kept as a place among them, and only otherwise as a rank (FORMAT.md, "A chunk of positions"). This
is where a store keeps its documents' tokens. One after another:

    entropy      its code
    log_z        two byte planes for each temperature
    place        0 where the label is no entry, i where it is the i-th by falling weight
    near         the label's code, minus that of the head entry that it is
    label        the label's code, elsewhere
    others       ranks of the labels that are no entry
"""

import numpy as np
import numpy.typing as npt

from logitstore.codec import LARGEST, Codes, Form, head_mask, position_width
from logitstore.streams import Cut, Ranks, integers, planes
from logitstore.varint import Varints, most_bytes

Bytes = npt.NDArray[np.uint8]


def most_chunk_bytes(rows: int, form: Form, log_z: int) -> int:
    """Bytes that a chunk of so many positions takes at most."""
    return rows * (position_width(log_z) + form.count_bytes + most_bytes(form.vocab_size))


def to_streams(
    position: Bytes, labels: npt.NDArray[np.integer], codes: Codes, form: Form, rank_of: npt.NDArray[np.uint32]
) -> list[Bytes]:
    """The streams of N positions, in their order on disk.

    Args:
        position: [N, position_width], from `codec.encode_position`.
        labels: [N]; the token that followed.
        codes: the first set of entries.
        rank_of: `Ranks.table`.
    """
    order = _by_weight(codes, form)
    hits = np.take_along_axis(codes.ids == labels[:, None], order, axis=1) & _used(codes, form, order)
    place = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    near = _near(place, codes.head_count, _largest_in_head(codes, form), form)
    rows = np.arange(len(place))
    code, label = codes.codes[rows, order[rows, np.maximum(place - 1, 0)]], position[:, 0]
    return [
        position[:, 1],
        np.ascontiguousarray(position[:, 2:].T).reshape(-1),
        planes(place, form.count_bytes),
        (label - code)[near],
        label[~near],
        *Varints.of(rank_of[labels[place == 0]]).planes,
    ]


def from_streams(raw: Bytes, codes: Codes, form: Form, log_z: int, ranks: Ranks) -> tuple[Bytes, npt.NDArray[np.int32]]:
    """`position` and `labels` of a whole chunk, given its first set of entries.

    Raises:
        ValueError: they are not what `to_streams` writes.
    """
    chunk = PositionChunk(raw, codes.head_count, _largest_in_head(codes, form), form, log_z)
    return chunk.part(0, codes, ranks)


class PositionChunk:
    """The streams of a chunk of N positions, cut apart; any rows are decoded, and no others.

    Args:
        head_count: [N], of the first set of entries.
        largest_in_head: [N]; where the largest cell is an entry of the head.

    Raises:
        ValueError: they are not what `to_streams` writes.
    """

    def __init__(
        self,
        raw: Bytes,
        head_count: npt.NDArray[np.uint32],
        largest_in_head: npt.NDArray[np.bool_],
        form: Form,
        log_z: int,
    ) -> None:
        cut, n = Cut(raw), len(head_count)
        self._form = form
        self._entropy = cut.take(n)
        self._log_z = cut.take(2 * log_z * n).reshape(2 * log_z, n)
        self._place = integers(cut.take(n * form.count_bytes), form.count_bytes)
        if self._place.max(initial=0) > form.selection.k:
            raise ValueError(f"a label is entry {self._place.max()} of {form.selection.k}")
        self._near = _near(self._place, head_count, largest_in_head, form)
        self._near_codes = cut.take(_count(self._near))
        self._codes = cut.take(n - len(self._near_codes))
        self._others = cut.varints(_count(self._place == 0))

    def part(self, start: int, codes: Codes, ranks: Ranks) -> tuple[Bytes, npt.NDArray[np.int32]]:
        """`position` [n, position_width] and `labels` [n] of the rows from `start` on, given their n entries.

        Raises:
            ValueError: a label beyond the vocabulary.
        """
        n = len(codes.tail)
        rows = slice(start, start + n)
        near, place = self._near[rows], self._place[rows].astype(np.int64)
        numbers, order = np.arange(n), _by_weight(codes, self._form)
        slot = order[numbers, np.maximum(place - 1, 0)]

        position = np.empty((n, 2 + len(self._log_z)), np.uint8)
        position[:, 1] = self._entropy[rows]
        position[:, 2:] = self._log_z[:, rows].T
        before, count = _count(self._near[:start]), _count(near)
        position[near, 0] = codes.codes[numbers, slot][near] + self._near_codes[before : before + count]
        position[~near, 0] = self._codes[start - before : start - before + n - count]

        labels, is_other = codes.ids[numbers, slot], place == 0
        before = _count(self._place[:start] == 0)
        labels[is_other] = ranks.ids(self._others.slice(slice(before, before + _count(is_other))).values())
        return position, labels.astype(np.int32)


def _count(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))


def _by_weight(codes: Codes, form: Form) -> npt.NDArray[np.int64]:
    """The entries of each row by falling weight, of equals the first first: places [N, k]."""
    k = form.selection.k
    in_head = head_mask(codes.head_count, k)
    falling = 255 - codes.codes if form.counts else codes.codes
    # with its place below it a weight is sorted in a fraction of the time of a stable argsort
    keys = np.where(in_head, falling, np.uint64(256)) << np.uint64(32) | np.arange(k, dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _used(codes: Codes, form: Form, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the ordered places hold an entry: all, where there is a sampled tail."""
    return (order < codes.head_count[:, None]) | form.sampled_tail


def _largest_in_head(codes: Codes, form: Form) -> npt.NDArray[np.bool_]:
    """Where the largest cell is an entry of the head: [N]."""
    in_head = head_mask(codes.head_count, form.selection.k)
    return np.asarray((in_head & (codes.codes == LARGEST)).any(axis=1))


def _near(
    place: npt.NDArray[np.integer],
    head_count: npt.NDArray[np.uint32],
    largest_in_head: npt.NDArray[np.bool_],
    form: Form,
) -> npt.NDArray[np.bool_]:
    """Where the label is a head entry with a code of its own: [N]. By weight the head comes first, the largest before
    all."""
    return np.asarray((place > largest_in_head) & (place <= head_count) & form.sums_to_one)
