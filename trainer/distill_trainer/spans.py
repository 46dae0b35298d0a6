"""Positions that are taught together, because only their product compares with the teacher's: `span`, `gold`.

Where two tokenizers cut a stretch of text differently, both sides' log-probs of its tokens add up to one likelihood
each. A span is a row of consecutive positions of a document; its loss stands at the last of them. `--cross-vocab gold`
also compares what each side would have ended the span with.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import distill_kernels
from distill_kernels.gold import LogCells, gold_divergence
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
        target: at a span's last position its label_log_prob is the span's, as `Asked.shifted` says. None: nobody
            answers.
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

    names: ClassVar = ("labels", "spans", "span_log_prob")

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
        is_end = spans == mx.arange(len(labels))
        student = _summed(-ce, spans, spans >= 0)
        return mx.where(is_end, span_divergence(log_prob, mx.where(is_end, student, -1.0)), 0), ce


@dataclass(frozen=True, eq=False)
class GoldLoss:
    """`gold_divergence` of a batch's spans, at the last row of each, and cross-entropy: like a row loss of all rows.

    Attributes:
        unnamed: bool [V]; the student's tokens that are none of the teacher's.
        count: how many they are.
        temperature: T of the teacher's entries.
    """

    names: ClassVar = ("labels", "spans", "span_log_prob", "ids", "weights", "log_tail_mass")

    unnamed: mx.array
    count: int
    temperature: float = 1.0

    def values(
        self,
        head: distill_kernels.Head,
        hidden: mx.array,
        labels: mx.array,
        spans: mx.array,
        log_before: mx.array,
        ids: mx.array,
        weights: mx.array,
        log_tail_mass: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Return (kd, ce), [N] each; kd is 0 where no span ends. A gradient flows to `hidden` and the head.

        Args:
            hidden: [N, D], or logits [N, V] where the head cannot be taken apart.
            labels, spans: [N]; see `Batch`.
            log_before: [N]; the teacher's log-prob of a span without its last token, at its last row.
            ids, weights: [N, k]; its entries at the last rows, as `distill_kernels.gold` has them.
            log_tail_mass: [N]; of them.
        """
        cells = LogCells(self.unnamed, self.count, self.temperature)
        if head.reason is None:
            log_q, log_q_rest, ce = distill_kernels.chunked(cells, hidden, head, [ids, weights, labels])
        else:
            log_q, log_q_rest, ce = cells(hidden, ids, weights, labels)
        is_end = spans == mx.arange(len(labels))
        before = _summed(-ce, spans, (spans >= 0) & ~is_end)
        kd = gold_divergence(
            weights, ids < len(self.unnamed), log_tail_mass, log_before, log_q, log_q_rest, before, self.temperature
        )
        return mx.where(is_end, kd, 0), ce


OfSpans = SpanLoss | GoldLoss


def _summed(values: mx.array, spans: mx.array, among: mx.array) -> mx.array:
    """Add the values of some rows up at the last row of the span that each belongs to: all [N]."""
    ends = mx.where(among, spans, len(spans))
    return mx.zeros(len(spans) + 1).at[ends].add(values)[:-1]
