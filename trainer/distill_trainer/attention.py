"""The student's attention maps brought near those of a live teacher: `--attention-loss`.

For a pair of layers, at position t: a_j and b_j, j = 0 .. t, are what the student's and the teacher's heads on average
attend to token j; each sums to 1.

    mse     sum_j (a_j - b_j)^2 / (t + 1)
    kl      sum_j b_j log(b_j / a_j), a_j taken as 1e-9 where it is less

and the mean over the pairs. Heads are averaged, so their numbers may differ; padding is seen by no position.

Reference: Jiao et al., "TinyBERT", 2020, equation 7 (mse of attention); Wang et al., "MiniLM", 2020, equation 1 (KL).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module

from distill_trainer.attention_maps import attention_maps
from distill_trainer.batches import Batch, Beside
from distill_trainer.kinds import AttentionKind
from distill_trainer.layer_map import Pairs
from distill_trainer.method import Answers, read_by_teacher

LEAST = 1e-9


@dataclass(frozen=True, eq=False)
class AttentionLoss:
    """The method; it trains nothing of its own."""

    kind: AttentionKind
    weight: float
    pairs: Pairs
    student: Module
    teacher: Module
    module: Module = field(default_factory=Module)
    name: str = "attention"

    def beside(self, batch: Batch, answers: Answers) -> Beside:
        tokens, rows, weights = read_by_teacher(batch, answers)
        with attention_maps(self.teacher, sorted({layer for layer, _ in self.pairs})) as found:
            self.teacher(tokens)  # nobody asks for its logits, so they are not computed
        unread = [(0, 0), (0, batch.tokens.shape[1] - tokens.shape[1])]
        beside = Beside(weights, tuple(mx.pad(_rows(found[layer], rows), unread) for layer, _ in self.pairs))
        mx.eval(beside)
        return beside

    def watching(self) -> AbstractContextManager[dict[int, mx.array]]:
        return attention_maps(self.student, sorted({layer for _, layer in self.pairs}))

    def losses(self, seen: dict[int, mx.array], batch: Batch, beside: Beside) -> mx.array:
        visible = batch.rows % batch.tokens.shape[1] + 1
        total = mx.zeros(len(batch.rows))
        for (_, layer), teacher in zip(self.pairs, beside.arrays, strict=True):
            total += distance(self.kind, _rows(seen[layer], batch.rows), teacher, visible)
        return total / len(self.pairs)


def distance(kind: AttentionKind, a: mx.array, b: mx.array, visible: mx.array) -> mx.array:
    """How far a student's rows a [N, T] lie from a teacher's b [N, T], float32 [N].

    Args:
        visible: [N]; t + 1 of each row.
    """
    if kind == "mse":
        return mx.square(a - b).sum(axis=-1) / visible
    return mx.where(b > 0, b * (mx.log(mx.where(b > 0, b, 1)) - mx.log(mx.maximum(a, LEAST))), 0).sum(axis=-1)


def _rows(maps: mx.array, rows: mx.array) -> mx.array:
    return maps.reshape(-1, maps.shape[-1])[rows]
