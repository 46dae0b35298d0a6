"""The student's hidden states brought near the teacher's: `--hidden-loss`.

For a pair of layers, at a position: a = P h_s in D dimensions, the student's residual stream after its layer, and b the
teacher's.

    mse     sum_d (a_d - b_d)^2 / D
    cosine  1 - <a, b> / (|a| |b|)
    l1      sum_d |a_d - b_d| / D

and the mean over the pairs. P is the identity where both are as wide, else a matrix [D_t, D_s] of the pair's own,
drawn from the run's seed and trained with the student.

Reference: Romero et al., "FitNets", 2015 (the projector); Jiao et al., "TinyBERT", 2020, equation 8.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module

from distill_trainer.batches import Batch, Beside
from distill_trainer.kinds import HiddenKind
from distill_trainer.layer_map import Pairs
from distill_trainer.method import Answers, read_by_teacher
from logitstore.trace import traced

States = Callable[[Batch, Answers], Beside]
"""The teacher's hidden states at a batch's N trained positions: one array [N, n, D], of the n layers of the pairs."""


class Projectors(Module):
    """A matrix for every pair whose widths differ, named teacher_T_student_S."""

    def __init__(self, pairs: Pairs, student_width: int, teacher_width: int, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if student_width != teacher_width:
            for number, pair in enumerate(pairs):
                linear = nn.Linear(student_width, teacher_width, bias=False)
                drawn = np.random.default_rng([seed, number]).normal(
                    0, 1 / math.sqrt(student_width), linear.weight.shape
                )
                linear.weight = mx.array(drawn.astype(np.float32))
                self[_name(pair)] = linear

    def project(self, pair: tuple[int, int], hidden: mx.array) -> mx.array:
        """P h of [N, D_s], or h where there is no P."""
        name = _name(pair)
        projected: mx.array = self[name](hidden) if name in self else hidden
        return projected


@dataclass(frozen=True, eq=False)
class HiddenLoss:
    """The method: `states` says what the teacher had."""

    kind: HiddenKind
    weight: float
    pairs: Pairs
    student: Module
    states: States
    module: Projectors
    name: str = "hidden"

    def beside(self, batch: Batch, answers: Answers) -> Beside:
        return self.states(batch, answers)

    def watching(self) -> AbstractContextManager[dict[int, mx.array]]:
        return traced(self.student, sorted({layer for _, layer in self.pairs}))

    def losses(self, seen: dict[int, mx.array], batch: Batch, beside: Beside) -> mx.array:
        (teacher,) = beside.arrays
        total = mx.zeros(len(batch.rows))
        for number, pair in enumerate(self.pairs):
            own = seen[pair[1]]
            own = own.reshape(-1, own.shape[-1])[batch.rows].astype(mx.float32)
            total += distance(self.kind, self.module.project(pair, own), teacher[:, number])
        return total / len(self.pairs)


def distance(kind: HiddenKind, a: mx.array, b: mx.array) -> mx.array:
    """How far rows a [N, D] lie from rows b [N, D], float32 [N]; a row of zeros has the cosine 0 with any other."""
    if kind == "mse":
        return mx.square(a - b).mean(axis=-1)
    if kind == "l1":
        return mx.abs(a - b).mean(axis=-1)
    squares = mx.maximum(mx.square(a).sum(axis=-1), 1e-20), mx.maximum(mx.square(b).sum(axis=-1), 1e-20)
    return 1 - (a * b).sum(axis=-1) * mx.rsqrt(squares[0]) * mx.rsqrt(squares[1])


def width_of(model: Module) -> int:
    """D of a model's residual stream, which is run for it on one token; it should be in eval mode."""
    with traced(model, (0,)) as found:
        model(mx.array([[0]]))
    return int(found[0].shape[-1])


def answered_states(numbers: Sequence[int], width: int) -> States:
    """From targets that hold hidden states, a store's or a live teacher's answers.

    Args:
        numbers: of each pair's layer, its place in `SparseTargets.hidden`.
        width: D of these.
    """

    def states(batch: Batch, answers: Answers) -> Beside:
        documents, positions = np.divmod(np.array(batch.rows), batch.tokens.shape[1])
        found = np.zeros((len(documents), len(numbers), width), np.float32)
        there = np.zeros(len(documents), bool)
        for number, targets in enumerate(answers):
            if targets is not None and targets.hidden is not None:
                rows = np.flatnonzero((documents == number) & (positions < len(targets)))
                found[rows] = targets.hidden[positions[rows]][:, list(numbers)]
                there[rows] = True
        return Beside(mx.where(mx.array(there), batch.each_weight, 0), (mx.array(found),))

    return states


def live_states(teacher: Module, pairs: Pairs) -> States:
    """From a teacher that is run on what it answered of the batch."""
    layers = [layer for layer, _ in pairs]

    def states(batch: Batch, answers: Answers) -> Beside:
        tokens, rows, weights = read_by_teacher(batch, answers)
        with traced(teacher, sorted(set(layers))) as found:
            teacher(tokens)  # nobody asks for its logits, so they are not computed
        states = [found[layer].reshape(-1, found[layer].shape[-1])[rows] for layer in layers]
        beside = Beside(weights, (mx.stack(states, axis=1).astype(mx.float32),))
        mx.eval(beside)
        return beside

    return states


def _name(pair: tuple[int, int]) -> str:
    return f"teacher_{pair[0]}_student_{pair[1]}"
