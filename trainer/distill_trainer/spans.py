"""Positions that are taught together, because only their product compares with the teacher's: `--cross-vocab span`.

Where two tokenizers cut a stretch of text differently, both sides' log-probs of its tokens add up to one likelihood
each. A span is a row of consecutive positions of a document; its loss stands at the last of them.
"""

from dataclasses import dataclass
from typing import Any

import distill_kernels
from distill_kernels.row_loss import Autodiff
from distill_kernels.span import span_divergence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from logitstore.targets import SparseTargets

Ints = npt.NDArray[np.integer]


def in_whole_spans(spans: Ints, answered: Ints, positions: Ints) -> npt.NDArray[np.bool_]:
    """Which positions belong to a span all of whose positions are answered.

    Args:
        spans: [L - 1]; the last position of the span that each belongs to, -1 for none.
        answered: [m], the positions that are trained and answered.
        positions: [n], those that are asked about.
    """
    sizes, there = (np.bincount(some[some >= 0], minlength=len(spans)) for some in (spans, spans[answered]))
    last = spans[positions]
    return np.asarray((last >= 0) & (there == sizes)[last])


def span_rows(
    spans: Ints, positions: Ints, answered: npt.NDArray[np.bool_], target: SparseTargets | None, first: int
) -> dict[str, npt.NDArray[Any]]:
    """The columns `spans` and `span_log_prob` of a batch's rows that are these positions of a document.

    Args:
        spans: [L - 1]; see `in_whole_spans`.
        positions: [n], rising.
        answered: [n]; only of whole spans.
        target: at a span's last position its label_log_prob is the whole span's. None: nobody answers.
        first: number of the first of these rows in the batch.
    """
    last = np.searchsorted(positions, spans[positions])
    log_prob = np.zeros(len(positions), np.float32)
    if target is not None:
        is_last = answered & (last == np.arange(len(positions)))
        log_prob[is_last] = target.label_log_prob[positions[is_last]]
    return {"spans": np.where(answered, first + last, -1).astype(np.int32), "span_log_prob": log_prob}


@dataclass(frozen=True)
class SpanLoss:
    """`span_divergence` of a batch's spans, at the last row of each, and cross-entropy: like a row loss of all rows."""

    def values(
        self, head: distill_kernels.Head, hidden: mx.array, labels: mx.array, spans: mx.array, log_prob: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return (kd, ce), [N] each; kd is 0 where no span ends. A gradient flows to `hidden` and the head.

        Args:
            hidden: [N, D], or logits [N, V] where the head cannot be taken apart.
            labels, spans, log_prob: [N]; see `Batch`.
        """
        if head.reason is None:
            (ce,) = distill_kernels.chunked(Autodiff(nn.losses.cross_entropy), hidden, head, [labels])
        else:
            ce = nn.losses.cross_entropy(hidden.astype(mx.float32), labels)
        ends = mx.where(spans >= 0, spans, len(labels))
        student = mx.zeros(len(labels) + 1).at[ends].add(-ce)[:-1]
        is_end = spans == mx.arange(len(labels))
        return mx.where(is_end, span_divergence(log_prob, mx.where(is_end, student, -1.0)), 0), ce
