"""Selection as Metal kernels: one reading of the logits, then the few blocks again that decide.

Beside what is kept, a row's scratch is three floats a block, and the logits of its candidate blocks.
"""

from distill_kernels.metal import MOST_THREADS, SIMD, VARIABLE, as_ids, dense, launch, threads_per_row
from distill_kernels.metal_source import COMMON, ROW
from distill_kernels.select import BLOCK_SIZE, Kept
from distill_kernels.select_source import BLOCKS, LOG_Z, MOMENTS
from distill_kernels.select_source_entries import DRAWN, ENTRIES, KEYS

import mlx.core as mx

MOST_KEPT = 1024
"""Entries of a row at most: with the sums over them they fill 28 of the 32 KiB of threadgroup memory."""
FEW_THREADS = 256
"""Enough for what is left of a row after its first reading; several rows then share a core."""


def select_threshold_kernel(
    logits: mx.array, labels: mx.array, k: int, temperature: float, block_order: mx.array, start: mx.array
) -> Kept:
    """The Metal twin of `select_threshold_ops`.

    Raises:
        ValueError: k is not in 1 .. 1,024.
        RuntimeError: there is no Metal here.
    """
    random = {"block_order": dense(block_order, mx.uint32), "start": dense(start, mx.int32)}
    return _select("threshold", logits, labels, k, temperature, random)


def select_top_k_kernel(logits: mx.array, labels: mx.array, k: int, temperature: float) -> Kept:
    """The Metal twin of `select_top_k_ops`.

    Raises:
        ValueError: k is not in 1 .. 1,024.
        RuntimeError: there is no Metal here.
    """
    return _select("top_k", logits, labels, k, temperature, {})


def log_z_kernel(logits: mx.array, temperatures: tuple[float, ...]) -> mx.array:
    """The Metal twin of `log_z_ops`: every temperature in one reading of the logits.

    Raises:
        RuntimeError: there is no Metal here.
    """
    (n, vocab_size), count = logits.shape, len(temperatures)
    inputs = {
        "logits": logits,
        "temperatures": mx.array([1.0, *temperatures], mx.float32),
        "sizes": mx.array([vocab_size], mx.uint32),
    }
    made = launch(
        "log_z",
        inputs,
        {"log_z": ((n, count), mx.float32)},
        ROW + LOG_Z,
        COMMON,
        rows=n,
        threads=threads_per_row(vocab_size),
        template=[("COUNT", count + 1)],
    )
    return made[0]


def _select(
    kind: str, logits: mx.array, labels: mx.array, k: int, temperature: float, random: dict[str, mx.array]
) -> Kept:
    """First `BLOCKS`, then `ENTRIES` on what it found; a draw takes random numbers."""
    if not 1 <= k <= MOST_KEPT:
        raise ValueError(f"{k:,} entries a row, expected 1 to {MOST_KEPT:,}; type {VARIABLE}=ops")
    n, vocab_size = logits.shape
    blocks = -(-vocab_size // BLOCK_SIZE)
    # Draws read up to k blocks more. Where that could be a second reading of all, all are candidates, and kept.
    whole = 2 * k > blocks
    candidates = blocks if whole else k
    inputs = {
        "logits": logits,
        "temperatures": mx.array([temperature], mx.float32),
        "sizes": mx.array([vocab_size, blocks, k, candidates], mx.uint32),
    }
    best, mass, largest, label_log_prob, entropy = launch(
        "select_blocks",
        {**inputs, "labels": as_ids(labels)},
        {
            "best": ((n, blocks), mx.float32),
            "mass": ((n, blocks), mx.float32),
            "largest": ((n,), mx.float32),
            "label_log_prob": ((n,), mx.float32),
            "entropy": ((n,), mx.float32),
        },
        ROW + BLOCKS,
        COMMON + MOMENTS,
        rows=n,
        threads=_even_threads(blocks),
        template=[("TEMPERED", temperature != 1)],
    )
    most_kept = 1 << (k - 1).bit_length()
    threads = max(SIMD, most_kept, min(FEW_THREADS, SIMD * -(-blocks // SIMD)))
    ids, probs, head_count, tail_mass, *_ = launch(
        f"select_{kind}",
        {**inputs, "best": best, "mass": mass, "largest": largest, **random},
        {
            "ids": ((n, k), mx.uint32),
            "probs": ((n, k), mx.float32),
            "head_count": ((n,), mx.int32),
            "tail_mass": ((n,), mx.float32),
            "values": ((n, candidates * BLOCK_SIZE), mx.float32),
            "rest": ((n, blocks), mx.float32),
        },
        ROW + ENTRIES + (DRAWN if random else ""),
        COMMON + MOMENTS + KEYS,
        rows=n,
        threads=threads,
        template=[("K", most_kept), ("THREADS", threads), ("WHOLE", whole), ("DRAWS", bool(random))],
    )
    return Kept(ids, probs, head_count, tail_mass, label_log_prob, entropy)


def _even_threads(blocks: int) -> int:
    """One block a thread, or as many rounds as it takes, with no more threads than keep the last round full."""
    rounds = -(-blocks // MOST_THREADS)
    return SIMD * -(-blocks // (rounds * SIMD))
