"""Which entries of a next-token distribution are kept: logits in, `Selected` out. NumPy, on the CPU.

`distill_kernels.select` is the same algorithm in MLX, for a teacher on a GPU. Sorting and cumulative sums are over
blocks of the vocabulary and kept entries, never over V.
"""

import numpy as np
import numpy.typing as npt

from logitstore.selection import BLOCK_SIZE, Randomness, Selected, Selection, block_count

ROWS_AT_ONCE = 16  # of V = 49,152 floats: 3 MB, the size that stayed in cache and ran fastest
HEAD_MARGIN = 1e-6  # p within this of tau counts as head: no token can then be drawn twice through rounding


def select(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    selection: Selection,
    temperature: float,
    random: Randomness,
) -> Selected:
    """Keep k entries of softmax(logits / temperature) at each of N positions.

    `threshold:k` finds tau with sum_i min(1, p_i / tau) = k, keeps every p_i > tau, and draws the rest by systematic
    sampling in a random order of blocks with inclusion probability p_i / tau; a drawn entry weighs tau, and
    E[weight_i] = p_i. `random:N:t` draws N times with replacement from w_i = p_i^t / sum_j p_j^t; an id drawn c_i times
    weighs (c_i / N) (p_i / w_i). `top-k:K` keeps the K largest, `top-p:P:K` of these the shortest prefix that holds P,
    one at least. Equal logits are ordered by id.

    Args:
        logits: float32 [N, V]; may hold -inf.
        labels: [N], the ids of the tokens that followed.
        temperature: above 0. The label's log-prob and the entropy are those of temperature 1.
        random: from `randomness`, for the same N positions.

    Raises:
        ValueError: NaN or +inf among the logits, or a row with no finite logit.

    Reference: Cohen et al., "Efficient stream sampling for variance-optimal estimation of subset sums", SIAM J. Comput.
    2011 (threshold and weights); Madow, 1949 (systematic sampling); Anshumann et al., "Sparse Logit Sampling", 2025
    (random); Peng et al., "Pre-training Distillation for Large Language Models", 2024 (top-p, then top-k).
    """
    # Made once: memory that the system hands out anew for each group of rows takes longer than the arithmetic in it.
    room = np.empty((3, min(len(logits), ROWS_AT_ONCE), BLOCK_SIZE * block_count(logits.shape[1])), np.float32)
    parts = [
        _select_rows(
            logits[rows], labels[rows], selection, temperature, random.block_order[rows], random.draws[rows], room
        )
        for rows in (slice(i, i + ROWS_AT_ONCE) for i in range(0, len(logits), ROWS_AT_ONCE))
    ]
    return Selected(*(np.concatenate([getattr(part, name) for part in parts]) for name in Selected.__annotations__))


def _select_rows(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    selection: Selection,
    temperature: float,
    block_order: npt.NDArray[np.int64],
    draws: npt.NDArray[np.float64],
    room: npt.NDArray[np.float32],
) -> Selected:
    n, vocab_size = logits.shape
    blocks = block_count(vocab_size)
    rows = np.arange(n)[:, None]

    z, p, work = room[:, :n]
    z[:, vocab_size:] = -np.inf
    np.divide(logits, np.float32(temperature), out=z[:, :vocab_size])
    z_max = z.max(axis=1)
    if not np.isfinite(z_max).all():
        bad = int(np.flatnonzero(~np.isfinite(z_max))[0])
        raise ValueError(f"the teacher's logits hold NaN, +inf or nothing finite at row {bad}")
    z -= z_max[:, None]
    np.exp(z, out=p)  # unnormalised
    entropy, label_log_prob = _entropy_and_label(logits, labels, z, p, temperature, work)

    k = selection.k
    if selection.kind == "random":
        ids, values, head_count = _draw_with_replacement(z, p, draws, selection.exponent)
        return Selected(ids, values, head_count, np.zeros(n), label_log_prob, entropy)

    top_ids = _top_ids(z.reshape(n, BLOCK_SIZE, blocks), k)
    top_p = p[rows, top_ids].astype(np.float64)
    p[rows, top_ids] = 0
    block_mass = p.reshape(n, BLOCK_SIZE, blocks).sum(axis=1).astype(np.float64)
    rest = block_mass.sum(axis=1)
    # Mass from rank h on, for h = 0..k: a suffix sum from the smallest, so nothing cancels.
    suffix = np.cumsum(np.concatenate([rest[:, None], top_p[:, ::-1]], axis=1), axis=1)[:, ::-1]
    total = suffix[:, :1]

    if selection.kind == "threshold":
        tau = suffix[:, :k] / (k - np.arange(k))
        is_tail = (top_p <= tau * (1 - HEAD_MARGIN)) | (tau == 0)
        head_count = np.where(is_tail.any(axis=1), is_tail.argmax(axis=1), k).astype(np.int32)
        # The ranks that turned out to be tail take part in the draw again.
        in_tail = np.arange(k) >= head_count[:, None]
        p[rows, top_ids] = np.where(in_tail, top_p, 0)
        np.add.at(block_mass, (rows, top_ids % blocks), np.where(in_tail, top_p, 0))
        drawn = _systematic(p.reshape(n, BLOCK_SIZE, blocks), block_mass, block_order, draws, k - head_count, k)
        ids = np.where(in_tail, np.maximum(drawn, 0), top_ids)
        values = np.where(in_tail, np.where(drawn >= 0, p[rows, ids], 0), top_p)
    else:
        head_count = _top_p_count(top_p, total, selection.mass)
        kept = np.arange(k) < head_count[:, None]
        ids, values = np.where(kept, top_ids, 0), np.where(kept, top_p, 0)

    return Selected(
        ids=ids.astype(np.uint32),
        values=values / total,
        head_count=head_count,
        tail_mass=np.take_along_axis(suffix, head_count[:, None].astype(np.int64), axis=1)[:, 0] / total[:, 0],
        label_log_prob=label_log_prob,
        entropy=entropy,
    )


def _top_p_count(top_p: npt.NDArray[np.float64], total: npt.NDArray[np.float64], mass: float) -> npt.NDArray[np.int32]:
    """How many of the largest are kept [N]: those that are possible, and of these no more than hold the mass."""
    before = np.cumsum(top_p, axis=1) - top_p
    wanted = before < mass * total if mass < 1 else True
    return np.asarray(((top_p > 0) & wanted).sum(axis=1), np.int32)


def log_z(logits: npt.NDArray[np.float32], temperatures: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """log sum_j p_j^(1 / T) of p = softmax(logits) [N, V] for each T: [N, n], from 0 (T = 1) to (1 - 1 / T) log V.

    With it an entry's probability at temperature 1 gives the one at T: p^(1 / T) / Z_T.
    """
    z = (logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    log_total = np.log(_row_sums(np.exp(z)))
    columns = [np.log(_row_sums(np.exp(z / np.float32(t)))) - log_total / t for t in temperatures]
    return np.stack(columns, axis=1) if columns else np.empty((len(logits), 0))


def _entropy_and_label(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    z: npt.NDArray[np.float32],
    p: npt.NDArray[np.float32],
    temperature: float,
    work: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Entropy [N] and the label's log-prob [N] at temperature 1, from exp(z) where that is already temperature 1."""
    if temperature != 1:
        work = work[:, : logits.shape[1]]
        z = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(z)
    total = _row_sums(p)
    # 0 · -inf counts as 0.
    surprise = np.einsum("nv,nv->n", p, np.maximum(z, np.float32(-1e4), out=work))
    label = z[np.arange(len(z)), labels].astype(np.float64)
    return np.log(total) - surprise / total, label - np.log(total)


def _row_sums(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Sums over V, float64 [N], exact to 1e-7: NumPy adds float32 rows pairwise."""
    return np.asarray(p.sum(axis=1), np.float64)


def _top_ids(z: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """The ids of the k largest, largest first, equal ones by rising id: [N, k] from blocks [N, 64, B].

    The k largest lie in the k blocks with the largest maxima (equal maxima: the lower block).
    """
    n, _, blocks = z.shape
    best = np.sort(_largest(z.max(axis=1), k), axis=1)[:, None]
    element = np.arange(BLOCK_SIZE)[:, None]
    candidates = (element * blocks + best).reshape(n, -1)  # by rising id
    values = z[np.arange(n)[:, None, None], element, best].reshape(n, -1)
    return np.take_along_axis(candidates, _largest(values, k), axis=1)


def _largest(values: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Places of the k largest of each row [N, M], none of them above 0; largest first, equal ones by rising place.

    Of floats of one sign the bits rise with the size: with the place below them they are sorted in a tenth of the time
    of a stable argsort.
    """
    keys = np.abs(values).view(np.uint32).astype(np.uint64) << np.uint64(32) | np.arange(
        values.shape[1], dtype=np.uint64
    )
    keys.sort(axis=1)
    return (keys[:, :k] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _draw_with_replacement(
    z: npt.NDArray[np.float32], p: npt.NDArray[np.float32], draws: npt.NDArray[np.float64], exponent: float
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Ids [N, k] by falling weight, equal ones by rising id; their weights [N, k]; how many there are [N]."""
    (n, width), k = z.shape, draws.shape[1]
    blocks = width // BLOCK_SIZE
    proposal = p if exponent == 1 else np.exp(z * np.float32(exponent))
    grid = proposal.reshape(n, BLOCK_SIZE, blocks)
    ends = np.cumsum(grid.sum(axis=1, dtype=np.float64), axis=1)
    drawn = _locate(grid, ends, np.arange(blocks)[None].repeat(n, 0), draws * ends[:, -1:])

    weight = np.full((n, k), 1 / k)
    if exponent != 1:
        rows = np.arange(n)[:, None]
        ratio = np.exp(z[rows, drawn].astype(np.float64) * (1 - exponent))
        weight = ratio * (ends[:, -1:] / _row_sums(p)[:, None]) / k
    # Equal ids lie side by side: the first takes the weight of all.
    order = np.argsort(drawn, axis=1, kind="stable")
    ids, weight = np.take_along_axis(drawn, order, 1), np.take_along_axis(weight, order, 1)
    first = np.diff(ids, axis=1, prepend=-1) != 0
    place = np.cumsum(first, axis=1) - 1
    merged_ids, merged = np.zeros((n, k), np.int64), np.zeros((n, k))
    np.put_along_axis(merged_ids, place, ids, axis=1)
    np.add.at(merged, (np.arange(n)[:, None], place), weight)
    order = np.argsort(-merged, axis=1, kind="stable")
    return (
        np.take_along_axis(merged_ids, order, 1).astype(np.uint32),
        np.take_along_axis(merged, order, 1),
        first.sum(axis=1).astype(np.int32),
    )


def _systematic(
    p: npt.NDArray[np.float32],
    block_mass: npt.NDArray[np.float64],
    block_order: npt.NDArray[np.int64],
    start: npt.NDArray[np.float64],
    draws: npt.NDArray[np.int32],
    k: int,
) -> npt.NDArray[np.int64]:
    """Draw draws[n] ids of row n at equal steps along its mass from start [N, 1], blocks in the given order.

    Returns [N, k], the ids in the last slots, rising; the slots before them hold -1, as do all of a row without mass.
    """
    ends = np.cumsum(np.take_along_axis(block_mass, block_order, axis=1), axis=1)
    total = ends[:, -1:]
    points = (start + np.arange(k)) * (total / np.maximum(draws, 1)[:, None])
    ids = _locate(p, ends, block_order, points)
    used = (np.arange(k) < draws[:, None]) & (total > 0)
    return np.sort(np.where(used, ids, -1), axis=1)


def _locate(
    p: npt.NDArray[np.float32],
    ends: npt.NDArray[np.float64],
    block_order: npt.NDArray[np.int64],
    points: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """The id at which the running mass of each row reaches each of its points: [N, k] of blocks [N, 64, B].

    Args:
        ends: [N, B]; the running mass at the end of each block, in the given order of blocks.
    """
    n, _, blocks = p.shape
    place = np.stack([np.searchsorted(row, at, side="right") for row, at in zip(ends, points, strict=True)])
    place = np.minimum(place, blocks - 1)
    begins = np.where(place > 0, np.take_along_axis(ends, np.maximum(place - 1, 0), axis=1), 0)
    offset = points - begins
    block = np.take_along_axis(block_order, place, axis=1)
    inside = p[np.arange(n)[:, None], :, block].cumsum(axis=2, dtype=np.float64)
    # Rounding may leave a point at the very end of its block: it belongs to the last id there that has mass.
    offset = np.minimum(offset, inside[:, :, -1] * (1 - 1e-9))
    element = (inside <= offset[:, :, None]).sum(axis=2)
    return np.asarray(element * blocks + block)
