"""Which entries of a next-token distribution are kept: logits in, `Selected` out. NumPy, on the CPU.

`distill_kernels.select` is the same algorithm in MLX, for a teacher on a GPU; both draw from the random words that
`randomness` makes. The vocabulary is seen as 64 x B with B = ceil(V / 64): block b holds the ids b, b + B, b + 2B,
... Sorting and cumulative sums are over blocks and kept entries, never over V.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from logitstore.errors import ConfigError
from logitstore.philox import position_words, uniform

BLOCK_SIZE = 64
ROWS_AT_ONCE = 16  # of V = 49,152 floats: 3 MB, the size that stayed in cache and ran fastest
HEAD_MARGIN = 1e-6  # p within this of tau counts as head: no token can then be drawn twice through rounding


@dataclass(frozen=True)
class Selection:
    """`threshold:k` or `top-k:K`: what is kept of every position, as typed after `--select`."""

    kind: Literal["threshold", "top-k"]
    k: int

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Read `threshold:16` or `top-k:50`.

        Raises:
            ConfigError: the text is neither, or k is below 1.
        """
        found = re.fullmatch(r"(threshold|top-k):(-?[0-9]{1,9})", text)
        if found is None:
            raise ConfigError(f"selection {text!r} is not known; type --select threshold:16 or --select top-k:50")
        kind, count = found.groups()
        if int(count) < 1:
            raise ConfigError(f"selection {text!r} keeps {count} entries; type a number of 1 or more, as in {kind}:16")
        return cls(kind, int(count))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.k}"

    def require_vocab(self, vocab_size: int) -> None:
        """Raise ConfigError where more entries are asked for than the vocabulary has tokens."""
        if self.k > vocab_size:
            raise ConfigError(
                f"selection {self} keeps {self.k} entries, but the teacher's vocabulary has {vocab_size:,} tokens; "
                f"type --select {self.kind}:K with K of at most {vocab_size}"
            )


@dataclass(frozen=True, eq=False)
class Randomness:
    """The random numbers of N positions."""

    block_order: npt.NDArray[np.int64]
    """[N, B]; a random order of the vocabulary's blocks."""
    start: npt.NDArray[np.float64]
    """[N] in [0, 1); where systematic sampling starts."""
    rounding: npt.NDArray[np.float64]
    """[N, k + 1] in [0, 1); the codec's stochastic rounding."""


@dataclass(frozen=True, eq=False)
class Selected:
    """The kept entries of N positions at full precision: what the codec takes."""

    ids: npt.NDArray[np.uint32]
    """[N, k]; the head by falling probability, then the sampled tail by rising id, then zeros."""
    head_probs: npt.NDArray[np.float64]
    """[N, k]; probabilities of the head's entries, 0 after them."""
    head_count: npt.NDArray[np.int32]
    """[N]"""
    tail_mass: npt.NDArray[np.float64]
    """[N]; probability outside the head, summed from the logits, never 1 minus the head."""
    label_log_prob: npt.NDArray[np.float64]
    """[N]"""
    entropy: npt.NDArray[np.float64]
    """[N]"""


def block_count(vocab_size: int) -> int:
    """How many blocks of 64 ids cover the vocabulary."""
    return -(-vocab_size // BLOCK_SIZE)


def randomness(
    document_key: bytes, positions: npt.NDArray[np.int64], selection: Selection, vocab_size: int, *, seed: int
) -> Randomness:
    """Draw what `select` and the codec need for these positions of a document."""
    blocks = block_count(vocab_size) if selection.kind == "threshold" else 0
    words = position_words(document_key, positions, blocks + 1 + selection.k + 1, seed=seed)
    return Randomness(
        block_order=np.argsort(words[:, :blocks], axis=1, kind="stable"),
        start=uniform(words[:, blocks]),
        rounding=uniform(words[:, blocks + 1 :]),
    )


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
    E[weight_i] = p_i. `top-k:K` keeps the K largest. Equal logits are ordered by id.

    Args:
        logits: float32 [N, V]; may hold -inf.
        labels: [N], the ids of the tokens that followed.
        temperature: above 0. The label's log-prob and the entropy are those of temperature 1.
        random: from `randomness`, for the same N positions.

    Raises:
        ValueError: NaN or +inf among the logits, or a row with no finite logit.

    Reference: Cohen et al., "Efficient stream sampling for variance-optimal estimation of subset sums", SIAM J. Comput.
    2011 (threshold and weights); Madow, 1949 (systematic sampling).
    """
    parts = [
        _select_rows(logits[rows], labels[rows], selection, temperature, random.block_order[rows], random.start[rows])
        for rows in (slice(i, i + ROWS_AT_ONCE) for i in range(0, len(logits), ROWS_AT_ONCE))
    ]
    return Selected(*(np.concatenate([getattr(part, name) for part in parts]) for name in Selected.__annotations__))


def _select_rows(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    selection: Selection,
    temperature: float,
    block_order: npt.NDArray[np.int64],
    start: npt.NDArray[np.float64],
) -> Selected:
    n, vocab_size = logits.shape
    blocks = block_count(vocab_size)
    rows = np.arange(n)[:, None]

    z = np.empty((n, BLOCK_SIZE * blocks), dtype=np.float32)
    z[:, vocab_size:] = -np.inf
    np.divide(logits, np.float32(temperature), out=z[:, :vocab_size])
    z_max = z.max(axis=1)
    if not np.isfinite(z_max).all():
        bad = int(np.flatnonzero(~np.isfinite(z_max))[0])
        raise ValueError(f"the teacher's logits hold NaN, +inf or nothing finite at row {bad}")
    z -= z_max[:, None]
    p = np.exp(z)  # unnormalised
    entropy, label_log_prob = _entropy_and_label(logits, labels, z, p, temperature)

    top_ids = _top_ids(z.reshape(n, BLOCK_SIZE, blocks), selection.k)
    top_p = p[rows, top_ids].astype(np.float64)
    p[rows, top_ids] = 0
    block_mass = p.reshape(n, BLOCK_SIZE, blocks).sum(axis=1).astype(np.float64)
    rest = block_mass.sum(axis=1)
    # Mass from rank h on, for h = 0..k: a suffix sum from the smallest, so nothing cancels.
    suffix = np.cumsum(np.concatenate([rest[:, None], top_p[:, ::-1]], axis=1), axis=1)[:, ::-1]
    total = suffix[:, :1]

    k = selection.k
    if selection.kind == "top-k":
        head_count = (top_p > 0).sum(axis=1).astype(np.int32)
        ids = np.where(top_p > 0, top_ids, 0)
    else:
        tau = suffix[:, :k] / (k - np.arange(k))
        is_tail = (top_p <= tau * (1 - HEAD_MARGIN)) | (tau == 0)
        head_count = np.where(is_tail.any(axis=1), is_tail.argmax(axis=1), k).astype(np.int32)
        # The ranks that turned out to be tail take part in the draw again.
        in_tail = np.arange(k) >= head_count[:, None]
        p[rows, top_ids] = np.where(in_tail, top_p, 0)
        np.add.at(block_mass, (rows, top_ids % blocks), np.where(in_tail, top_p, 0))
        drawn = _systematic(p.reshape(n, BLOCK_SIZE, blocks), block_mass, block_order, start, k - head_count, k)
        ids = np.where(in_tail, np.maximum(drawn, 0), top_ids)

    in_head = np.arange(k) < head_count[:, None]
    return Selected(
        ids=ids.astype(np.uint32),
        head_probs=np.where(in_head, top_p, 0) / total,
        head_count=head_count,
        tail_mass=np.take_along_axis(suffix, head_count[:, None].astype(np.int64), axis=1)[:, 0] / total[:, 0],
        label_log_prob=label_log_prob,
        entropy=entropy,
    )


def _entropy_and_label(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    z: npt.NDArray[np.float32],
    p: npt.NDArray[np.float32],
    temperature: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Entropy [N] and the label's log-prob [N] at temperature 1, from exp(z) where that is already temperature 1."""
    if temperature != 1:
        z = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(z)
    total = _row_sums(p)
    # 0 · -inf counts as 0.
    surprise = np.einsum("nv,nv->n", p, np.maximum(z, np.float32(-1e4)))
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
    best = np.sort(np.argsort(-z.max(axis=1), axis=1, kind="stable")[:, :k], axis=1)[:, None]
    element = np.arange(BLOCK_SIZE)[:, None]
    candidates = (element * blocks + best).reshape(n, -1)  # by rising id
    values = z[np.arange(n)[:, None, None], element, best].reshape(n, -1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates, order, axis=1)


def _systematic(
    p: npt.NDArray[np.float32],
    block_mass: npt.NDArray[np.float64],
    block_order: npt.NDArray[np.int64],
    start: npt.NDArray[np.float64],
    draws: npt.NDArray[np.int32],
    k: int,
) -> npt.NDArray[np.int64]:
    """Draw draws[n] ids of row n at equal steps along its mass, blocks in the given order.

    Returns [N, k], the ids in the last slots, rising; the slots before them hold -1, as do all of a row without mass.
    """
    n, _, blocks = p.shape
    mass = np.take_along_axis(block_mass, block_order, axis=1)
    ends = np.cumsum(mass, axis=1)
    total = ends[:, -1:]
    points = (start[:, None] + np.arange(k)) * (total / np.maximum(draws, 1)[:, None])
    place = np.stack([np.searchsorted(row, at, side="right") for row, at in zip(ends, points, strict=True)])
    place = np.minimum(place, blocks - 1)
    offset = points - np.take_along_axis(ends - mass, place, axis=1)
    block = np.take_along_axis(block_order, place, axis=1)
    inside = p[np.arange(n)[:, None], :, block].cumsum(axis=2, dtype=np.float64)
    # Rounding may leave a point at the very end of its block: it belongs to the last id there that has mass.
    offset = np.minimum(offset, inside[:, :, -1] * (1 - 1e-9))
    element = (inside <= offset[:, :, None]).sum(axis=2)
    used = (np.arange(k) < draws[:, None]) & (total > 0)
    return np.sort(np.where(used, element * blocks + block, -1), axis=1)
