"""Losses on targets as a store keeps them: codes in, so that no float tensor of weights stands between disk and loss.

A code c is the probability exp(-c / 16), 255 is 0. Where the cells of a row are one distribution (the tail and each
head entry), the largest of them has code 0 and stands for what the others leave of 1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import Arrays, RowLoss

import mlx.core as mx

LARGEST, ZERO, STEPS_PER_NAT = 0, 255, 16
DRAWS_WEIGHT = math.exp(4.0)

Kind = Literal["threshold", "cells", "counts", "draws"]
"""What codes stand for: head and a tail that the other entries share equally (`threshold:k`); head and a tail of no
entries (`top-k`, `top-p`); counts of k draws (`random:N`); or weights of draws, up to e^4 (`random:N:t`)."""


@dataclass(frozen=True)
class CodedLoss(RowLoss):
    """A loss on sparse targets over rows (ids, codes, head_count, tail, labels[, row_weights]), which it decodes.

    ids [N, k] uint32, codes [N, k] uint8, head_count [N] and tail [N] uint8: `logitstore.codec.Codes`.
    """

    names: ClassVar = ("ids", "codes", "head_count", "tail", "labels")

    loss: LogitsLoss
    kind: Kind

    def __post_init__(self) -> None:
        if not {"ids", "weights"} <= set(self.loss.names) or "log_probs" in self.loss.names:
            raise ValueError(f"{type(self.loss).__name__} takes {', '.join(self.loss.names)}, which codes do not give")

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`."""
        return self.loss.forward(logits, *self._decoded(rows))

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        return self.loss.backward(logits, *self._decoded(rows), saved=saved, cotangents=cotangents)

    def _decoded(self, rows: Arrays) -> Arrays:
        """The rows of the loss that is wrapped."""
        ids, codes, head_count, tail, *others = rows
        weights, log_tail_mass = decode_ops(codes, head_count, tail, self.kind)
        tails = [log_tail_mass] if "log_tail_mass" in self.loss.names else []
        return (ids, weights, *tails, *others)


def decode_ops(codes: mx.array, head_count: mx.array, tail: mx.array, kind: Kind) -> tuple[mx.array, mx.array]:
    """Return (weights [N, k], log of the tail's mass [N]), float32, in plain MLX operations.

    Args:
        codes: [N, k] uint8; of the head, which comes first.
        head_count: [N].
        tail: [N] uint8; code of the probability outside the head.

    Raises:
        ValueError: the shapes do not fit.
    """
    if codes.ndim != 2 or head_count.shape != codes.shape[:1] or tail.shape != codes.shape[:1]:
        raise ValueError(
            f"codes [N, k], head_count [N] and tail [N] expected, found {codes.shape}, {head_count.shape}, {tail.shape}"
        )
    k = codes.shape[1]
    in_head = mx.arange(k)[None] < head_count[:, None]
    if kind in ("counts", "draws"):
        weights = codes.astype(mx.float32) / k if kind == "counts" else DRAWS_WEIGHT * _probs(codes)
        return mx.where(in_head, weights, 0), mx.full(len(codes), -mx.inf)
    is_largest = in_head & (codes == LARGEST)
    values = mx.where(in_head & ~is_largest, _probs(codes), 0)
    tail_mass = mx.where(tail == LARGEST, 0, _probs(tail))
    rest = 1 - (values.sum(axis=1) + tail_mass)
    # Hundreds of equal cells may leave the largest too little; it is then as large as the next, and all are scaled.
    most = mx.maximum(values.max(axis=1), tail_mass)
    total = mx.where(rest < most / 2, 1 - rest + most, 1)
    rest = mx.where(rest < most / 2, most, rest) / total
    tail_mass = mx.where(tail == LARGEST, rest, tail_mass / total)
    each = tail_mass / mx.maximum(k - head_count.astype(mx.int32), 1) if kind == "threshold" else mx.zeros_like(rest)
    weights = mx.where(in_head, values / total[:, None], each[:, None])
    return mx.where(is_largest, rest[:, None], weights), mx.log(tail_mass)


def _probs(codes: mx.array) -> mx.array:
    return mx.where(codes == ZERO, 0, mx.exp(codes.astype(mx.float32) / -STEPS_PER_NAT))
