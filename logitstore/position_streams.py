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
    near, code = _near(place, order, codes, form)
    label = position[:, 0]
    others = rank_of[labels[place == 0]]
    return [
        position[:, 1],
        np.ascontiguousarray(position[:, 2:].T).reshape(-1),
        planes(place, form.count_bytes),
        (label - code)[near],
        label[~near],
        *Varints.of(others).planes,
    ]


def from_streams(raw: Bytes, codes: Codes, form: Form, log_z: int, ranks: Ranks) -> tuple[Bytes, npt.NDArray[np.int32]]:
    """`position` and `labels` of a chunk, given its first set of entries.

    Raises:
        ValueError: they are not what `to_streams` writes.
    """
    cut, n = Cut(raw), len(codes.tail)
    position = np.empty((n, position_width(log_z)), np.uint8)
    position[:, 1] = cut.take(n)
    position[:, 2:] = cut.take(2 * log_z * n).reshape(2 * log_z, n).T
    place = integers(cut.take(n * form.count_bytes), form.count_bytes).astype(np.int64)
    if place.max(initial=0) > form.selection.k:
        raise ValueError(f"a label is entry {place.max()} of {form.selection.k}")
    order = _by_weight(codes, form)
    near, code = _near(place, order, codes, form)
    position[near, 0] = code[near] + cut.take(int(np.count_nonzero(near)))
    position[~near, 0] = cut.take(n - int(np.count_nonzero(near)))
    labels = codes.ids[np.arange(n), order[np.arange(n), np.maximum(place - 1, 0)]]
    labels[place == 0] = ranks.ids(cut.varints(int(np.count_nonzero(place == 0))).values())
    return position, labels.astype(np.int32)


def _by_weight(codes: Codes, form: Form) -> npt.NDArray[np.int64]:
    """The entries of each row by falling weight, of equals the first first: places [N, k]."""
    in_head = head_mask(codes.head_count, form.selection.k)
    falling = 255 - codes.codes if form.counts else codes.codes
    return np.argsort(np.where(in_head, falling.astype(np.int64), 256), axis=1, kind="stable")


def _used(codes: Codes, form: Form, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the ordered places hold an entry: all, where there is a sampled tail."""
    return (order < codes.head_count[:, None]) | form.sampled_tail


def _near(
    place: npt.NDArray[np.int64], order: npt.NDArray[np.int64], codes: Codes, form: Form
) -> tuple[npt.NDArray[np.bool_], Bytes]:
    """Where the label is a head entry with a code of its own [N], and that code [N]."""
    rows = np.arange(len(place))
    slot = order[rows, np.maximum(place - 1, 0)]
    code = codes.codes[rows, slot]
    near = (place > 0) & (slot < codes.head_count) & (code != LARGEST) & form.sums_to_one
    return near, code
