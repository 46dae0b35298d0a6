"""Losses between whole logits: values and hand-written gradients against the formulas in float64."""

import math

from distill_kernels import JSD, TVD, DenseLoss, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, dense_loss_ce
from distill_kernels.divergence import Divergence

import mlx.core as mx
import numpy as np
import pytest

from tests import oracle
from tests.loss_cases import (
    assert_a_masked_row_touches_nothing,
    assert_backward_is_called,
    assert_equals,
    exact,
    on_mlx,
    run,
)
from tests.oracle import Floats, Ints

DIVERGENCES: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(), JSD(0.9), SkewKL(), SkewReverseKL(), TVD()]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


def problem(rows: int, vocab: int) -> tuple[Floats, Floats, Ints]:
    """Return (student's logits, teacher's logits, labels)."""
    rng = np.random.default_rng(0)
    return *exact(rng.normal(0, 2, (2, rows, vocab))), rng.integers(0, vocab, rows)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("vocab", [2, 7, 1000, 4099, 49152])
@every_divergence
def test_value_and_gradient_are_those_of_the_formula(divergence: Divergence, vocab: int, t: float) -> None:
    z, *rows = problem(2, vocab)
    assert_equals(DenseLoss(t, divergence=divergence), z, rows, lambda z: oracle.dense(divergence, z, *rows, t))


@pytest.mark.parametrize("t", [1.0, 2.0])
@every_divergence
def test_the_oracles_gradient_is_that_of_central_differences(divergence: Divergence, t: float) -> None:
    z, *rows = problem(2, 7)
    places = [(n, v) for n in range(2) for v in range(7)]
    slopes = oracle.differences(lambda z: oracle.dense(divergence, z, *rows, t).kd.sum(), z, places)
    np.testing.assert_allclose(oracle.dense(divergence, z, *rows, t).d_kd.ravel(), slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@every_divergence
def test_half_precision_logits_are_computed_in_float32(divergence: Divergence, dtype: mx.Dtype) -> None:
    z, teacher, labels = problem(2, 1000)
    half = mx.array(teacher.astype(np.float32)).astype(dtype)
    teacher = np.array(half.astype(mx.float32)).astype(np.float64)
    loss = DenseLoss(2.0, divergence=divergence)
    assert_equals(loss, z, (teacher, labels), lambda z: oracle.dense(divergence, z, teacher, labels, 2.0), dtype)
    student = mx.array(z.astype(np.float32))
    for whole, cut in zip(
        loss(student, mx.array(teacher.astype(np.float32)), mx.array(labels)),
        loss(student, half, mx.array(labels)),
        strict=True,
    ):
        assert mx.array_equal(whole, cut).item()


@pytest.mark.parametrize("softcap", [None, 5.0])
@every_divergence
def test_scale_and_softcap_are_the_students_and_padding_is_nobodys(
    divergence: Divergence, softcap: float | None
) -> None:
    z, teacher, _ = problem(3, 100)
    labels = np.array([89, 90, 3])
    z[:, 90:] = teacher[:, 90:] = np.nan
    loss = DenseLoss(2.0, scale=1.5, softcap=softcap, vocab_size=90, divergence=divergence)
    final = teacher[:, :90]
    for padded in (teacher, teacher[:, :95], final):  # two heads may be padded to different widths
        assert_equals(loss, z, (padded, labels), lambda z: oracle.dense(divergence, z, final, labels, 2.0))


@every_divergence
def test_tokens_that_both_exclude_count_for_nothing(divergence: Divergence) -> None:
    z, teacher, labels = problem(2, 300)
    labels %= 200
    z[:, 200:] = teacher[:, 200:] = -np.inf
    shorter = z[:, :200], (teacher[:, :200], labels)
    wanted = run(DenseLoss(2.0, divergence=divergence), *shorter)
    ours = run(DenseLoss(2.0, divergence=divergence), z, (teacher, labels))
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(ours[2], np.pad(wanted[2], [(0, 0), (0, 100)]), rtol=1e-5, atol=1e-7)


@every_divergence
def test_a_token_that_one_side_excludes_has_the_limits_value(divergence: Divergence) -> None:
    for side in (0, 1):
        z, teacher, labels = problem(2, 7)
        labels[:] = 0
        (z, teacher)[side][:, 3] = -np.inf
        loss = DenseLoss(2.0, divergence=divergence)
        if divergence == (ForwardKL(), ReverseKL())[side]:
            assert np.isposinf(run(loss, z, (teacher, labels))[0]).all()
        else:
            rows = teacher, labels
            assert_equals(loss, z, rows, lambda z, rows=rows: oracle.dense(divergence, z, *rows, 2.0))


def test_an_infinite_divergence_that_nobody_asks_for_harms_no_gradient() -> None:
    z, teacher, labels = problem(2, 7)
    teacher[:, 3] = -np.inf
    dz = run(DenseLoss(divergence=ReverseKL()), z, (teacher, labels), np.array([[0.0, 0], [1, 1]]))[2]
    np.testing.assert_allclose(dz, oracle.cross_entropy(z, labels)[1], rtol=2e-5, atol=1e-7)


def test_distances_of_200_nats_are_right() -> None:
    z, rows = np.array([[0.0, 200]]), (np.array([[200.0, 0]]), np.array([-1]))
    values = [run(DenseLoss(divergence=d), z, rows) for d in (JSD(), ForwardKL(), ReverseKL(), SkewKL(), TVD())]
    assert [kd[0] for kd, *_ in values] == pytest.approx([math.log(2), 200, 200, math.log(10), 1], rel=1e-7)
    assert all(np.isfinite(dz).all() for *_, dz in values)


@every_divergence
def test_an_exact_student_has_nothing_to_learn(divergence: Divergence) -> None:
    z, _, labels = problem(2, 1000)
    kd, _, dz = run(DenseLoss(2.0, divergence=divergence), z, (z, labels - 1000))
    np.testing.assert_allclose(kd, 0, atol=1e-7)
    np.testing.assert_allclose(dz, 0, atol=1e-7)


@every_divergence
def test_a_masked_row_touches_nothing(divergence: Divergence) -> None:
    z, *rows = problem(3, 300)
    assert_a_masked_row_touches_nothing(DenseLoss(2.0, divergence=divergence), z, rows)


def test_no_gradient_flows_to_the_teacher() -> None:
    z, teacher, labels = on_mlx(problem(2, 7))
    grad = mx.grad(lambda p: dense_loss_ce(z, p, labels, JSD(), 2.0)[0].sum())(teacher)
    assert grad.shape == teacher.shape and not mx.any(grad).item()


def test_the_gradient_is_the_hand_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, *rows = problem(2, 7)
    assert_backward_is_called(DenseLoss(divergence=JSD()), z, rows, monkeypatch)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, teacher, labels = on_mlx(problem(2, 7))
    for bad in (
        (z, teacher[:, :6], labels),
        (z, teacher[:1], labels),
        (z, teacher, labels[:1]),
        (z, teacher[0], labels),
    ):
        with pytest.raises(ValueError, match="must be"):
            DenseLoss()(*bad)
    with pytest.raises(ValueError, match="must be"):
        DenseLoss(vocab_size=6)(z, teacher[:, :5], labels)
