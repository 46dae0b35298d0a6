"""What is measured of a student beside its teacher at some positions: sums, which add up over chunks and documents.

p is the teacher's distribution, q the student's, both whole and at temperature 1; natural logarithms.
"""

import math
from dataclasses import dataclass

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX
from distill_kernels.row_ops import at_ids, log_sum_exp, row_sum

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore.errors import ModelError

BINS = 15
"""Of confidence, equally wide: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4."""
TOP = 5


@dataclass(frozen=True)
class Sums:
    """Of n positions. Two of them add up to those of both."""

    positions: int
    per_position: npt.NDArray[np.float64]
    """[6]; sums of KL(p || q), KL(q || p), agreement, top-5 agreement, sum min(p, q) and -log q(label)."""
    bins: npt.NDArray[np.float64]
    """[BINS, 3]; positions, sum of confidence and of correct predictions, by the student's confidence."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.positions + other.positions, self.per_position + other.per_position, self.bins + other.bins)


NOTHING = Sums(0, np.zeros(6), np.zeros((BINS, 3)))


@dataclass(frozen=True)
class Compared:
    """The teacher's rows of some positions, to hold students' against."""

    log_p: mx.array
    """float32 [n, V]"""
    labels: mx.array
    """int32 [n]; the tokens that followed."""

    @classmethod
    def of(cls, logits: mx.array, labels: npt.NDArray[np.int32]) -> "Compared":
        """From logits [n, V] of any float dtype."""
        return cls(log_softmax(logits), mx.array(labels))

    def with_student(self, logits: mx.array) -> Sums:
        """The sums of a student's logits [n, V]: float32, added up in float64."""
        log_p, log_q = self.log_p, log_softmax(logits)
        p, q = mx.exp(log_p), mx.exp(log_q)
        best = log_q.argmax(axis=-1)
        rows = [
            row_sum(mx.where(p > 0, p * (log_p - log_q), 0)),
            row_sum(mx.where(q > 0, q * (log_q - log_p), 0)),
            (best == log_p.argmax(axis=-1)).astype(mx.float32),
            common(top(log_p), top(log_q)),
            row_sum(mx.minimum(p, q)),
            -at_ids(log_q, self.labels[:, None])[:, 0],
        ]
        sums = np.array(mx.stack(rows)).sum(axis=1, dtype=np.float64)
        return Sums(len(self.labels), sums, calibration(log_q, self.labels))


def calibration(log_q: mx.array, labels: mx.array) -> npt.NDArray[np.float64]:
    """Positions, sum of confidence and of correct predictions by bins of confidence max q, [BINS, 3].

    Args:
        log_q: float32 [n, V]; a student's log-probs.
        labels: int32 [n].
    """
    correct = np.array(log_q.argmax(axis=-1) == labels)
    confidence = np.nan_to_num(np.array(mx.exp(log_q.max(axis=-1)), np.float64))  # `perplexity` tells what is none
    numbers = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins = np.zeros((BINS, 3))
    np.add.at(bins, numbers, np.stack([np.ones(len(correct)), confidence, correct], axis=1))
    return bins


def expected_calibration_error(bins: npt.NDArray[np.float64]) -> float:
    """sum over bins of n_b / n · |accuracy_b - confidence_b|."""
    counts, confidence, correct = bins.T
    return float(np.abs(correct - confidence).sum() / counts.sum())


def reliability(bins: npt.NDArray[np.float64]) -> tuple[tuple[int, float, float], ...]:
    """Of each bin: positions, mean confidence, share of them where the likeliest token was the label."""
    counts, confidence, correct = bins.T
    each = np.maximum(counts, 1)
    columns = counts.astype(int).tolist(), (confidence / each).tolist(), (correct / each).tolist()
    return tuple(zip(*columns, strict=True))


def perplexity(nll: float, student: str) -> float:
    """exp of a mean of -log q(label), infinite where that is beyond a float.

    Raises:
        ModelError: it is no number, because the student's logits are none.
    """
    if math.isnan(nll):
        raise ModelError(f"student {student} gives logits that are no numbers; type --student with another")
    return math.exp(nll) if nll < 700 else math.inf


def log_softmax(logits: mx.array) -> mx.array:
    """Of logits [n, V], float32."""
    z = logits.astype(mx.float32)
    return z - log_sum_exp(z)[:, None]


def top(log_probs: mx.array) -> mx.array:
    """The ids of the TOP likeliest tokens of each row, [n, TOP]."""
    return mx.argpartition(-log_probs, TOP - 1, axis=-1)[:, :TOP]


def common(one: mx.array, other: mx.array) -> mx.array:
    """Which share of ids [n, TOP] the rows have in common, [n]."""
    return (one[:, :, None] == other[:, None, :]).any(axis=-1).astype(mx.float32).mean(axis=-1)
