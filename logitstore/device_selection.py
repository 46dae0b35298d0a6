"""Selection where the logits are: `logitstore.selection.select` for a teacher on a GPU, with the same arguments.

Only the k kept entries leave the device, never [n, V].
"""

from distill_kernels.select import select_threshold, select_top_k

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore.selection import Randomness, Selected, Selection


def select(
    logits: mx.array,
    labels: npt.NDArray[np.int64],
    selection: Selection,
    temperature: float,
    random: Randomness,
) -> Selected:
    """Keep k entries of softmax(logits / temperature) at each of N positions, logits [N, V] of any float type.

    Raises:
        ValueError: NaN or +inf among the logits, or a row with no finite logit.
    """
    label_ids = mx.array(labels.astype(np.int32))
    if selection.kind == "threshold":
        order = mx.array(random.block_order.astype(np.uint32))
        start = mx.array((random.start * 2**24).astype(np.int32))
        kept = select_threshold(logits, label_ids, selection.k, temperature, order, start)
    else:
        kept = select_top_k(logits, label_ids, selection.k, temperature)
    mx.eval(*kept)
    ids, probs, count, tail, label, entropy = (np.array(array) for array in kept)
    if not np.isfinite(entropy).all():
        bad = int(np.flatnonzero(~np.isfinite(entropy))[0])
        raise ValueError(f"the teacher's logits hold NaN, +inf or nothing finite at row {bad}")
    head, tail, label, entropy = (array.astype(np.float64) for array in (probs, tail, label, entropy))
    return Selected(ids, head, count, tail, label, entropy)
