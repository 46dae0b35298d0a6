"""Divergences from a sample with its own probabilities: the formula, its hand-written gradient, and no bias."""

from distill_kernels import JSD, TVD, ForwardKL, ReverseKL, SampledLoss, SkewKL, SkewReverseKL, sampled_loss_ce
from distill_kernels.divergence import Divergence

import mlx.core as mx
import numpy as np
import pytest

from logitstore.cpu_selection import select
from logitstore.selection import Selection, randomness
from tests import oracle
from tests.loss_cases import (
    SHAPES,
    assert_a_masked_row_touches_nothing,
    assert_backward_is_called,
    assert_equals,
    exact,
    on_mlx,
    problem,
)
from tests.oracle import Floats, Ints, log_softmax

DIVERGENCES: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(0.3), SkewKL(), SkewReverseKL(), TVD()]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
Rows = tuple[Ints, Floats, Floats, Ints]


def sample(rows: int, vocab: int, k: int, t: float) -> tuple[Floats, Rows]:
    z, ids, p, _, labels = problem(rows, vocab, k, t)
    chance = np.random.default_rng(3).uniform(0.2, 1, p.shape)
    return z, (ids, exact(p / chance), exact(np.log(p)), labels)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "k"), SHAPES)
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.3), SkewKL(), TVD()], ids=str)
def test_value_and_gradient_are_those_of_the_formula(divergence: Divergence, vocab: int, k: int, t: float) -> None:
    """Not of the other two, whose slope leaves out a multiple of q that is noise here: see the test of means."""
    z, rows = sample(2, vocab, k, t)
    assert_equals(SampledLoss(t, divergence=divergence), z, rows, lambda z: oracle.sampled(divergence, z, *rows, t))


@every_divergence
def test_its_mean_over_samples_is_the_whole_divergence(divergence: Divergence) -> None:
    vocab, n, selection = 40, 4000, Selection.parse("threshold:8")
    rng = np.random.default_rng(0)
    z, teacher = exact(rng.normal(0, 1.5, (2, 1, vocab)))
    draws = randomness(b"x" * 16, np.arange(n), selection, vocab, seed=0)
    kept = select(np.repeat(teacher, n, axis=0).astype(np.float32), np.zeros(n, np.int64), selection, 1.0, draws)
    log_p = log_softmax(teacher)[0]
    tau = kept.tail_mass / np.maximum(8 - kept.head_count, 1)
    in_head = np.arange(8) < kept.head_count[:, None]
    w = np.where(in_head, np.exp(log_p)[kept.ids], tau[:, None])
    labels = np.zeros(n, np.int64)
    rows = on_mlx([kept.ids.astype(np.int64), w, log_p[kept.ids], labels])
    logits = mx.broadcast_to(mx.array(z.astype(np.float32)), (n, vocab))
    ones = [mx.ones(n), mx.zeros(n)]
    (kd, _), (dz,) = mx.vjp(lambda z: list(sampled_loss_ce(z, *rows, divergence=divergence)), [logits], ones)
    truth = oracle.dense(divergence, z, teacher, labels[:1], 1.0)
    for found, wanted in ((np.array(kd)[:, None], truth.kd), (np.array(dz), truth.d_kd[0])):
        error = found.std(axis=0) / np.sqrt(n)
        assert np.abs((found.mean(axis=0) - wanted) / (error + 1e-6)).max() < 4.5


def test_a_masked_row_touches_nothing() -> None:
    z, rows = sample(3, 100, 5, 1.0)
    assert_a_masked_row_touches_nothing(SampledLoss(divergence=TVD()), z, rows)


def test_the_gradient_is_the_hand_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = sample(2, 7, 3, 1.0)
    assert_backward_is_called(SampledLoss(), z, rows, monkeypatch)


def test_probabilities_of_another_shape_are_refused() -> None:
    z, (ids, w, log_p, labels) = sample(2, 7, 3, 1.0)
    with pytest.raises(ValueError, match=r"log_probs must be \[2, 3\] like ids, found \[2, 2\]"):
        SampledLoss()(mx.array(z.astype(np.float32)), *on_mlx([ids, w, log_p[:, :2], labels]))
