"""Losses on the order of kept tokens: values and hand-written gradients against the formulas in float64."""

import math
from collections.abc import Callable

from distill_kernels import HingeRank, LogisticRank, hinge_rank_ce, logistic_rank_ce
from distill_kernels.ranking import RankLoss

import mlx.core as mx
import numpy as np
import pytest

from tests import oracle
from tests.loss_cases import (
    SHAPES,
    assert_a_masked_row_touches_nothing,
    assert_backward_is_called,
    assert_equals,
    exact,
    on_mlx,
    problem,
    run,
)
from tests.oracle import Floats, Ints, Losses

Oracle = Callable[[Floats, Ints, Floats, Ints, float], Losses]


def hinge_of_a_tenth(z: Floats, ids: Ints, p: Floats, labels: Ints, t: float) -> Losses:
    return oracle.hinge(z, ids, p, labels, t, 0.1)


LOSSES: list[tuple[type[RankLoss], dict[str, float], Oracle]] = [
    (HingeRank, {}, oracle.hinge),
    (HingeRank, {"margin": 0.1}, hinge_of_a_tenth),
    (LogisticRank, {}, oracle.logistic),
]
every_loss = pytest.mark.parametrize(("kind", "own", "wanted"), LOSSES, ids=["hinge", "hinge 0.1", "logistic"])


def rows_of(vocab: int, k: int, t: float, rows: int = 2) -> tuple[Floats, tuple[Ints, Floats, Ints]]:
    z, ids, p, _, labels = problem(rows, vocab, k, t)
    return z, (ids, p, labels)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "k"), SHAPES)
@every_loss
def test_value_and_gradient_are_those_of_the_formula(
    kind: type[RankLoss], own: dict[str, float], wanted: Oracle, vocab: int, k: int, t: float
) -> None:
    z, rows = rows_of(vocab, k, t)
    assert_equals(kind(t, **own), z, rows, lambda z: wanted(z, *rows, t))


@pytest.mark.parametrize("t", [1.0, 2.0])
@every_loss
def test_the_oracles_gradient_is_that_of_central_differences(
    kind: type[RankLoss], own: dict[str, float], wanted: Oracle, t: float
) -> None:
    del kind, own
    z, rows = rows_of(7, 4, t)
    places = [(n, v) for n in range(2) for v in range(7)]
    slopes = oracle.differences(lambda z: wanted(z, *rows, t).kd.sum(), z, places)
    np.testing.assert_allclose(wanted(z, *rows, t).d_kd.ravel(), slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@every_loss
def test_half_precision_logits_are_computed_in_float32(
    kind: type[RankLoss], own: dict[str, float], wanted: Oracle, dtype: mx.Dtype
) -> None:
    z, rows = rows_of(1000, 12, 2.0)
    assert_equals(kind(2.0, **own), z, rows, lambda z: wanted(z, *rows, 2.0), dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
@every_loss
def test_scale_softcap_and_a_padded_head_are_part_of_the_loss(
    kind: type[RankLoss], own: dict[str, float], wanted: Oracle, softcap: float | None
) -> None:
    z, (ids, p, _) = rows_of(100, 6, 2.0, rows=3)
    ids[:, 0], ids[:, 1], ids[:, 2], labels = 89, 90, 10**6, np.array([89, 90, 3])
    z[:, 90:] = np.nan
    loss = kind(2.0, scale=1.5, softcap=softcap, vocab_size=90, **own)
    assert_equals(loss, z, (ids, p, labels), lambda z: wanted(z, ids, p, labels, 2.0))


@every_loss
def test_a_row_without_a_pair_costs_nothing(kind: type[RankLoss], own: dict[str, float], wanted: Oracle) -> None:
    del wanted
    z, (_, _, labels) = rows_of(7, 1, 1.0, rows=4)
    ids = np.array([[1, 2, 2], [1, 2, 3], [1, 9, -1], [0, 0, 0]])  # one entry, ties, one inside the vocabulary, none
    p = exact(np.array([[0.5, 0, 0], [0.3, 0.3, 0.3 + 5e-7], [0.5, 0.2, 0.1], [0, 0, 0]]))
    kd, _, dz = run(kind(**own), z, (ids, p, labels))
    assert not kd.any()
    np.testing.assert_allclose(dz, oracle.cross_entropy(z, labels)[1], rtol=1e-5, atol=1e-7)


@every_loss
def test_impossible_tokens_have_the_limits_value(kind: type[RankLoss], own: dict[str, float], wanted: Oracle) -> None:
    z, (ids, p, labels) = rows_of(7, 3, 1.0)
    others = [next(v for v in range(7) if v not in (*ids[n], labels[n])) for n in range(2)]
    z[0, others[0]] = z[1, others[1]] = -np.inf
    if kind is HingeRank or ids[1, 2] != labels[1]:
        z[1, ids[1, 2]], labels[1] = -np.inf, ids[1, 0]  # the last of the ranking
    assert_equals(kind(**own), z, (ids, p, labels), lambda z: wanted(z, ids, p, labels, 1.0))


def test_two_impossible_tokens_are_a_tie_and_one_ranked_first_is_infinitely_wrong() -> None:
    rows = np.array([[0, 1], [0, 1]]), np.array([[0.6, 0.3], [0.6, 0.3]]), np.array([2, 2])
    kd, _, dz = run(LogisticRank(), np.array([[-np.inf, -np.inf, 0], [-np.inf, 0, 0]]), rows)
    assert kd[0] == np.float32(math.log(2)) and np.isposinf(kd[1]) and np.isfinite(dz).all()


@every_loss
def test_a_masked_row_touches_nothing(kind: type[RankLoss], own: dict[str, float], wanted: Oracle) -> None:
    del wanted
    z, rows = rows_of(300, 5, 2.0, rows=3)
    assert_a_masked_row_touches_nothing(kind(2.0, **own), z, rows)


def test_an_exact_student_has_no_hinge() -> None:
    _, ids, p, _, labels = problem(2, 300, 5, 2.0)
    z = problem(2, 300, 300, 2.0)[0]
    teacher = np.random.default_rng(0).normal(0, 2, (2, 2, 300))[1]
    assert run(HingeRank(2.0), teacher, (ids, p, labels))[0] == pytest.approx([0, 0], abs=1e-7)
    assert (run(HingeRank(2.0), z, (ids, p, labels))[0] > 1e-4).all()


@every_loss
def test_the_gradient_is_the_hand_written_one(
    kind: type[RankLoss], own: dict[str, float], wanted: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    del wanted
    assert_backward_is_called(kind(**own), *rows_of(7, 3, 1.0), monkeypatch)


def test_the_functions_are_the_losses_with_their_options() -> None:
    z, rows = rows_of(7, 3, 2.0)
    arrays, weights = (mx.array(z.astype(np.float32)), *on_mlx(rows)), mx.array([0.0, 2.0])
    for ours, loss in (
        (hinge_rank_ce(*arrays, 0.2, 2.0, weights, softcap=4.0), HingeRank(2.0, softcap=4.0, margin=0.2)),
        (logistic_rank_ce(*arrays, 2.0, weights, softcap=4.0), LogisticRank(2.0, softcap=4.0)),
    ):
        kd, ce, _ = run(loss, z, rows)
        np.testing.assert_allclose(np.array(ours), np.array([kd, ce]) * [0, 2], rtol=1e-6)
