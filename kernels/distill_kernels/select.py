"""Which entries of a teacher's distribution are kept, on the device where its logits are.

The definition in plain MLX of what `logitstore.cpu_selection` does in NumPy; given the same random numbers both keep
the same entries, up to float32 rounding. `select_metal` holds the Metal twins. The vocabulary is seen as blocks
[64, B], B = ceil(V / 64): id = element * B + block.
"""

from typing import NamedTuple

from distill_kernels.metal import on_metal
from distill_kernels.row_ops import in_vocabulary

import mlx.core as mx

BLOCK_SIZE = 64
HEAD_MARGIN = 1e-6  # as in logitstore.cpu_selection
UNITS = 1 << 34


class Kept(NamedTuple):
    """What is kept of N positions; see `logitstore.selection.Selected`."""

    ids: mx.array
    """uint32 [N, k]"""
    probs: mx.array
    """float32 [N, k]; of head and tail, 0 after the last entry"""
    head_count: mx.array
    """int32 [N]"""
    tail_mass: mx.array
    """float32 [N]"""
    label_log_prob: mx.array
    """float32 [N], at temperature 1"""
    entropy: mx.array
    """float32 [N], nats, at temperature 1"""


class _Blocks(NamedTuple):
    """Unnormalised probabilities and the k largest among them."""

    z: mx.array  # [N, 64 * B], (logits - max) / T, padded with -inf
    probs: mx.array  # [N, 64 * B], exp(z)
    top_ids: mx.array  # [N, k], largest first
    top_probs: mx.array  # [N, k]


def select_threshold_ops(
    logits: mx.array, labels: mx.array, k: int, temperature: float, block_order: mx.array, start: mx.array
) -> Kept:
    """`threshold:k`: tau with sum_i min(1, p_i / tau) = k; the head p_i > tau exactly, the tail by systematic sampling.

    Args:
        logits: [N, V] of any float type.
        labels: [N], ids of the tokens that followed.
        block_order: [N, B], a random order of the blocks.
        start: [N] int32 in [0, 2^24), where sampling starts, in units of 2^-24.

    Reference: Cohen et al., "Efficient stream sampling for variance-optimal estimation of subset sums", SIAM J. Comput.
    2011 (threshold and weights); Madow, 1949 (systematic sampling).
    """
    n = logits.shape[0]
    slots = mx.arange(k)[None]
    blocks = _blocks(logits, k, temperature)
    count = blocks.probs.shape[1] // BLOCK_SIZE
    probs = mx.put_along_axis(blocks.probs, blocks.top_ids, mx.array(0.0), axis=1)
    mass = probs.reshape(n, BLOCK_SIZE, count).sum(axis=1)
    suffix = _suffix_mass(mass, blocks.top_probs)

    tau = suffix[:, :k] / (k - slots)
    is_tail = (blocks.top_probs <= tau * (1 - HEAD_MARGIN)) | (tau == 0)
    head_count = mx.where(is_tail.any(axis=1), is_tail.argmax(axis=1).astype(mx.int32), k)[:, None]
    in_head = slots < head_count
    back = mx.where(in_head, 0, blocks.top_probs)
    grid = mx.put_along_axis(probs, blocks.top_ids, back, axis=1).reshape(n, BLOCK_SIZE, count)
    drawn = _systematic(grid, block_order, start, k - head_count, slots)
    ids = mx.where(in_head, blocks.top_ids.astype(mx.int32), mx.maximum(drawn, 0))
    used = in_head | (drawn >= 0)
    kept = mx.where(used, mx.take_along_axis(blocks.probs, ids, axis=1), 0)
    return _kept(logits, labels, temperature, blocks, ids, kept, head_count, suffix)


def select_top_k_ops(logits: mx.array, labels: mx.array, k: int, temperature: float) -> Kept:
    """`top-k:k`: the k largest; arguments as in `select_threshold_ops`."""
    blocks = _blocks(logits, k, temperature)
    rest = mx.put_along_axis(blocks.probs, blocks.top_ids, mx.array(0.0), axis=1)
    mass = rest.reshape(len(rest), BLOCK_SIZE, -1).sum(axis=1)
    possible = blocks.top_probs > 0
    ids = mx.where(possible, blocks.top_ids.astype(mx.int32), 0)
    head_count = possible.sum(axis=1, keepdims=True).astype(mx.int32)
    suffix = _suffix_mass(mass, blocks.top_probs)
    return _kept(logits, labels, temperature, blocks, ids, blocks.top_probs, head_count, suffix)


def _blocks(logits: mx.array, k: int, temperature: float) -> _Blocks:
    """The k largest lie in the k blocks with the largest maxima."""
    n, vocab_size = logits.shape
    count = -(-vocab_size // BLOCK_SIZE)
    z = logits.astype(mx.float32) / temperature
    z = z - z.max(axis=1, keepdims=True)
    z = mx.pad(z, [(0, 0), (0, count * BLOCK_SIZE - vocab_size)], constant_values=-mx.inf)
    grid = z.reshape(n, BLOCK_SIZE, count)
    best = mx.sort(mx.argsort(-grid.max(axis=1), axis=1)[:, :k], axis=1)[:, None].astype(mx.int32)
    candidates = (mx.arange(BLOCK_SIZE)[None, :, None] * count + best).reshape(n, -1)
    values = mx.take_along_axis(z, candidates, axis=1)
    top_ids = mx.take_along_axis(candidates, mx.argsort(-values, axis=1)[:, :k], axis=1)
    probs = mx.exp(z)
    return _Blocks(z, probs, top_ids, mx.take_along_axis(probs, top_ids, axis=1))


def _suffix_mass(mass: mx.array, top_probs: mx.array) -> mx.array:
    """Mass from rank h on, h = 0 .. k: [N, k + 1], summed from the smallest so that nothing cancels."""
    rising = mx.concatenate([mass.sum(axis=1, keepdims=True), top_probs[:, ::-1]], axis=1)
    return mx.cumsum(rising, axis=1)[:, ::-1]


def _systematic(grid: mx.array, block_order: mx.array, start: mx.array, draws: mx.array, slots: mx.array) -> mx.array:
    """Draw draws[n] ids of row n at equal steps along its mass, from blocks [N, 64, B]: int32 [N, k].

    They lie in the last slots, by rising id; the slots before them hold -1.
    """
    count = grid.shape[2]
    mass = grid.sum(axis=1)
    total = mass.sum(axis=1, keepdims=True)
    # Running sums in whole units of about total / 2^34: they add up exactly, float32 would move 1 draw in 200.
    share = mx.take_along_axis(mass, block_order, axis=1) / mx.maximum(total, 1e-37)
    ordered = (share * UNITS).astype(mx.int64)
    ends = mx.cumsum(ordered, axis=1)
    units, parts, slots64 = ends[:, -1:], mx.maximum(draws, 1).astype(mx.int64), slots.astype(mx.int64)
    step, left = units // parts, units % parts
    points = slots64 * step + slots64 * left // parts + ((step * start[:, None].astype(mx.int64)) >> 24)
    place = mx.minimum((ends[:, None] <= points[:, :, None]).sum(axis=2), count - 1)
    offset = (points - mx.take_along_axis(ends - ordered, place, axis=1)).astype(mx.float32) / UNITS * total
    block = mx.take_along_axis(block_order, place, axis=1).astype(mx.int32)
    every = mx.broadcast_to(block[:, None], (len(block), BLOCK_SIZE, block.shape[1]))
    inside = mx.cumsum(mx.take_along_axis(grid, every, axis=2), axis=1)
    offset = mx.minimum(offset, inside[:, -1] * (1 - 1e-6))
    element = mx.minimum((inside <= offset[:, None]).sum(axis=1).astype(mx.int32), BLOCK_SIZE - 1)
    used = (slots < draws) & (total > 0)
    return mx.sort(mx.where(used, element * count + block, -1), axis=1)


def _kept(
    logits: mx.array,
    labels: mx.array,
    temperature: float,
    blocks: _Blocks,
    ids: mx.array,
    kept: mx.array,
    head_count: mx.array,
    suffix: mx.array,
) -> Kept:
    """Normalise, and add what every position keeps at temperature 1."""
    z, probs = blocks.z, blocks.probs
    if temperature != 1:
        z = logits.astype(mx.float32)
        z = z - z.max(axis=1, keepdims=True)
        probs = mx.exp(z)
    total = _long_sum(probs)
    inside, labels = in_vocabulary(labels, logits.shape[1])
    label = mx.where(inside, mx.take_along_axis(z, labels[:, None], axis=1)[:, 0] - mx.log(total), -mx.inf)
    entropy = mx.log(total) - _long_sum(probs * mx.maximum(z, -1e4)) / total
    tail_mass = mx.take_along_axis(suffix, head_count, axis=1) / suffix[:, :1]
    bad = mx.isnan(suffix[:, :1])  # a row that is no distribution keeps nothing, and its probabilities say so
    ids, head_count = mx.where(bad, 0, ids), mx.where(bad, 0, head_count)
    return Kept(ids.astype(mx.uint32), kept / suffix[:, :1], head_count[:, 0], tail_mass[:, 0], label, entropy)


def _long_sum(values: mx.array) -> mx.array:
    """Sum over V in two levels: MLX's own float32 sum over 49,152 values is off by 1.5e-4 on the CPU."""
    n, width = values.shape
    padded = mx.pad(values, [(0, 0), (0, -width % BLOCK_SIZE)])
    return padded.reshape(n, BLOCK_SIZE, -1).sum(axis=1).sum(axis=1)


def select_threshold(
    logits: mx.array, labels: mx.array, k: int, temperature: float, block_order: mx.array, start: mx.array
) -> Kept:
    """`select_threshold_ops`, or its Metal twin where `metal.on_metal`."""
    if on_metal():
        from distill_kernels.select_metal import select_threshold_kernel

        return select_threshold_kernel(logits, labels, k, temperature, block_order, start)
    return select_threshold_ops(logits, labels, k, temperature, block_order, start)


def select_top_k(logits: mx.array, labels: mx.array, k: int, temperature: float) -> Kept:
    """`select_top_k_ops`, or its Metal twin where `metal.on_metal`."""
    if on_metal():
        from distill_kernels.select_metal import select_top_k_kernel

        return select_top_k_kernel(logits, labels, k, temperature)
    return select_top_k_ops(logits, labels, k, temperature)


def log_z_ops(logits: mx.array, temperatures: tuple[float, ...]) -> mx.array:
    """Return log sum_j p_j^(1 / T) of p = softmax(logits) [N, V] for each T: float32 [N, n]."""
    z = logits.astype(mx.float32)
    z = z - z.max(axis=1, keepdims=True)
    log_total = mx.log(_long_sum(mx.exp(z)))
    return mx.stack([mx.log(_long_sum(mx.exp(z / t))) - log_total / t for t in temperatures], axis=1)


def log_z(logits: mx.array, temperatures: tuple[float, ...]) -> mx.array:
    """`log_z_ops`, or its Metal twin where `metal.on_metal`."""
    if on_metal():
        from distill_kernels.select_metal import log_z_kernel

        return log_z_kernel(logits, temperatures)
    return log_z_ops(logits, temperatures)
