"""Selection where the logits are: `logitstore.cpu_selection` for a teacher on a GPU, with the same arguments.

Only the k kept entries leave the device, never [n, V]; but for `random:N`, which is there for comparison and drawn on
the host.
"""

from distill_kernels.select import log_z as device_log_z
from distill_kernels.select import select_threshold, select_top_k

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore import cpu_selection
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
    if selection.kind == "random":
        return cpu_selection.select(np.array(logits.astype(mx.float32)), labels, selection, temperature, random)
    label_ids = mx.array(labels.astype(np.int32))
    if selection.kind == "threshold":
        order = mx.array(random.block_order.astype(np.uint32))
        start = mx.array((random.draws[:, 0] * 2**24).astype(np.int32))
        kept = select_threshold(logits, label_ids, selection.k, temperature, order, start)
    else:
        kept = select_top_k(logits, label_ids, selection.k, temperature)
    mx.eval(*kept)
    ids, probs, count, tail, label, entropy = (np.array(array) for array in kept)
    if not np.isfinite(entropy).all():
        bad = int(np.flatnonzero(~np.isfinite(entropy))[0])
        raise ValueError(f"the teacher's logits hold NaN, +inf or nothing finite at row {bad}")
    probs, tail, label, entropy = (array.astype(np.float64) for array in (probs, tail, label, entropy))
    if selection.mass < 1:
        ids, probs, count, tail = _top_p(ids, probs, tail, selection.mass)
    return Selected(ids, probs, count, tail, label, entropy)


def log_z(logits: mx.array, temperatures: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """`cpu_selection.log_z` of logits on the device."""
    return np.array(device_log_z(logits, temperatures)).astype(np.float64)


def _top_p(
    ids: npt.NDArray[np.uint32], probs: npt.NDArray[np.float64], tail: npt.NDArray[np.float64], mass: float
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Cut the K largest to the shortest prefix that holds the mass; what is cut off joins the tail."""
    kept = (probs > 0) & (np.cumsum(probs, axis=1) - probs < mass)
    cut = np.where(kept, 0, probs).sum(axis=1)
    return (
        np.where(kept, ids, 0).astype(np.uint32),
        np.where(kept, probs, 0),
        kept.sum(axis=1, dtype=np.int32),
        tail + cut,
    )
