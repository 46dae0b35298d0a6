"""Losses with a tail bucket: values and hand-written gradients against the formulas in float64, and every extreme."""

import math

from distill_kernels import JSD, TVD, BucketKL, BucketLoss, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, bucket_kl_ce
from distill_kernels.divergence import Divergence

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
    top_k,
)
from tests.oracle import log_softmax

DIVERGENCES: list[Divergence] = [
    ForwardKL(), ReverseKL(), JSD(), JSD(0.9), SkewKL(), SkewReverseKL(), SkewKL(0.7), SkewReverseKL(0.7), TVD(),
]  # fmt: skip
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "k"), [*SHAPES, (1000, 1000)])
@every_divergence
def test_value_and_gradient_are_those_of_the_formula(divergence: Divergence, vocab: int, k: int, t: float) -> None:
    z, *rows = problem(2, vocab, k, t)
    loss = BucketLoss(t, divergence=divergence)
    assert_equals(loss, z, rows, lambda z: oracle.bucket(divergence, z, *rows, t))


@pytest.mark.parametrize("t", [1.0, 2.0])
@every_divergence
def test_the_oracles_gradient_is_that_of_central_differences(divergence: Divergence, t: float) -> None:
    z, *rows = problem(2, 7, 3, t)
    places = [(n, v) for n in range(2) for v in range(7)]
    truth = oracle.differences(lambda z: oracle.bucket(divergence, z, *rows, t).kd.sum(), z, places)
    ce = oracle.differences(lambda z: oracle.bucket(divergence, z, *rows, t).ce.sum(), z, places)
    np.testing.assert_allclose(oracle.bucket(divergence, z, *rows, t).d_kd.ravel(), truth, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(oracle.bucket(divergence, z, *rows, t).d_ce.ravel(), ce, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@every_divergence
def test_half_precision_logits_are_computed_in_float32(divergence: Divergence, dtype: mx.Dtype) -> None:
    z, *rows = problem(3, 1000, 12, 2.0)
    loss = BucketLoss(2.0, divergence=divergence)
    assert_equals(loss, z, rows, lambda z: oracle.bucket(divergence, z, *rows, 2.0), dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
@every_divergence
def test_scale_softcap_and_a_padded_head_are_part_of_the_loss(divergence: Divergence, softcap: float | None) -> None:
    z, ids, p, tail, _ = problem(3, 100, 5, 2.0)
    ids[:, 0], ids[:, 1], ids[:, 2] = 89, 90, 10**6  # the last of the vocabulary, the first padding, beyond the head
    ids[:, 3:] %= 80
    labels = np.array([89, 90, 3])
    loss = BucketLoss(2.0, scale=1.5, softcap=softcap, vocab_size=90, divergence=divergence)
    z[:, 90:] = np.nan
    assert_equals(loss, z, (ids, p, tail, labels), lambda z: oracle.bucket(divergence, z, ids, p, tail, labels, 2.0))
    assert not run(loss, z, (ids, p, tail, labels))[2][:, 90:].any()


def test_a_softcap_makes_an_impossible_token_possible() -> None:
    z, *rows = problem(2, 7, 3, 1.0)
    z[:, 3] = -np.inf
    assert_equals(BucketLoss(softcap=2.0), z, rows, lambda z: oracle.bucket(ForwardKL(), z, *rows, 1.0))


@every_divergence
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_every_extreme_has_the_value_and_gradient_of_the_formula(divergence: Divergence, t: float) -> None:
    z = np.tile(exact(np.random.default_rng(0).normal(0, 2, 5)), (7, 1))
    z[1, 4] = z[2, 1] = z[3, :2] = z[4, 2:5] = -np.inf  # in the tail; one kept token; all kept; all of the tail
    z[5, 0] = 60.0  # the tail's q is 1e-26
    ids = np.array([[0, 1, 9]] * 5 + [[0, -1, 9], [0, 0, 0]])
    p = np.array([[0.5, 0.25, 0]] * 4 + [[0.5, 0.25, 0.2], [1e-30, 0.5, 0], [0, 0, 0]])
    p, tail = exact(p), exact(np.log([0.25, 0.25, 0.25, 0.25, 0.05, 1.0, 1.0]))
    labels = np.array([0, 1, -100, 2, 0, 0, 4])
    loss = BucketLoss(t, divergence=divergence)
    if divergence == ForwardKL():  # the truth where q = 0 < p: infinite, with the slope M q - p
        kd, _, dz = run(loss, z, (ids, p, tail, labels), np.array([np.ones(7), np.zeros(7)]))
        assert np.isinf(kd[2:5]).all() and np.isfinite(np.delete(kd, [2, 3, 4])).all()
        mass, q = np.array([[1], [1], [0.8]]), np.exp(log_softmax(z / t))[2:5]
        np.testing.assert_allclose(dz[2:5, :2], t * (mass * q[:, :2] - p[2:5, :2]), rtol=1e-5, atol=1e-7)
        z[2:5] = 0
    rows = (ids, p, tail, labels)
    assert_equals(loss, z, rows, lambda z: oracle.bucket(divergence, z, *rows, t))


@every_divergence
def test_a_one_hot_teacher_is_right_or_infinite(divergence: Divergence) -> None:
    z, ids, _, _, labels = problem(2, 7, 1, 1.0)
    rows = (ids, np.ones((2, 1)), np.full(2, -np.inf), labels)
    if divergence == ReverseKL():  # the truth: the student thinks possible what its teacher excludes
        assert np.isposinf(run(BucketLoss(divergence=divergence), z, rows)[0]).all()
    else:
        assert_equals(BucketLoss(divergence=divergence), z, rows, lambda z: oracle.bucket(divergence, z, *rows, 1.0))


def test_an_infinite_divergence_that_nobody_asks_for_harms_no_gradient() -> None:
    z, ids, _, _, labels = problem(2, 7, 1, 1.0)
    rows = (ids, np.ones((2, 1)), np.full(2, -np.inf), labels)
    dz = run(BucketLoss(divergence=ReverseKL()), z, rows, np.array([[0.0, 0], [1, 1]]))[2]
    np.testing.assert_allclose(dz, oracle.cross_entropy(z, labels)[1], rtol=2e-5, atol=1e-7)


@every_divergence
def test_a_masked_row_touches_nothing(divergence: Divergence) -> None:
    z, *rows = problem(3, 300, 5, 2.0)
    assert_a_masked_row_touches_nothing(BucketLoss(2.0, softcap=9.0, vocab_size=290, divergence=divergence), z, rows)


@every_divergence
def test_an_exact_student_has_nothing_to_learn(divergence: Divergence) -> None:
    z = problem(2, 1000, 1, 1.0)[0]
    for t, k in ((1.0, 12), (2.0, 12), (2.0, 1000)):
        rows = *top_k(z, k, t), np.array([-1, -1])
        kd, _, dz = run(BucketLoss(t, divergence=divergence), z, rows)
        np.testing.assert_allclose(kd, 0, atol=1e-6 * t * t)
        if divergence != TVD():  # its slope jumps at p = q
            np.testing.assert_allclose(dz, 0, atol=5e-7 * t)


@every_divergence
def test_it_is_a_lower_bound_of_the_whole_divergence(divergence: Divergence) -> None:
    z, teacher = exact(np.random.default_rng(0).normal(0, 2, (2, 3, 1000)))
    labels = np.zeros(3, dtype=np.int64)
    whole = oracle.dense(divergence, z, teacher, labels, 1.0).kd
    for k in (1, 12, 500):
        kd = run(BucketLoss(divergence=divergence), z, (*top_k(teacher, k, 1.0), labels))[0]
        assert (kd > 0).all() and (kd < whole + 1e-6).all()


@every_divergence
def test_mass_that_leaks_out_of_the_kept_set_is_charged(divergence: Divergence) -> None:
    teacher = np.log(np.array([[0.45, 0.45, *[0.1 / 8] * 8]]))
    student = teacher + np.array([[0, 0, *[4.0] * 8]])
    renormalised = [np.exp(log_softmax(z[:, :2])) for z in (teacher, student)]
    np.testing.assert_allclose(*renormalised)  # so the loss of mlx-lm's DWQ is 0
    whole = oracle.dense(divergence, student, teacher, np.array([0]), 1.0).kd[0]
    kd = run(BucketLoss(divergence=divergence), student, (*top_k(teacher, 2, 1.0), np.array([0])))[0]
    assert kd[0] == pytest.approx(whole, rel=1e-5)  # exact: within the tail the two agree
    assert whole > 0.1 and (divergence != ForwardKL() or whole > 1.4)


def test_a_jensen_shannon_divergence_at_200_nats_is_log_2() -> None:
    z, rows = np.array([[0.0, 200, 0]]), (np.array([[0]]), np.ones((1, 1)), np.array([-200.0]), np.array([1]))
    kd, _, dz = run(BucketLoss(divergence=JSD()), z, rows)
    assert kd[0] == np.float32(math.log(2)) and np.isfinite(dz).all()


def test_a_tail_of_1e_minus_20_keeps_its_digits() -> None:
    z = np.array([[60.0, 14, 13, 12]])
    rows = np.array([[0]]), np.array([[0.5]]), exact(np.log(np.array([0.5]))), np.array([-1])
    kd, _, dz = run(BucketKL(), z, rows)
    assert kd[0] == pytest.approx(oracle.bucket(ForwardKL(), z, *rows, 1.0).kd[0], rel=1e-6) and kd[0] > 20
    np.testing.assert_allclose(dz[0], [0.5, *-0.5 * np.exp(log_softmax(z[0, 1:]))], rtol=1e-6)


@every_divergence
def test_padding_and_ids_outside_the_vocabulary_count_for_nothing(divergence: Divergence) -> None:
    z = problem(2, 7, 1, 1.0)[0]
    tail, labels, loss = np.log(np.array([0.25, 1.0])), np.array([6, 9]), BucketLoss(divergence=divergence)
    messy = np.array([[6, 7, 2, 2, -5], [3, 3, 3, -1, 8]]), np.array([[0.25, 0.25, 0.25, 0, 0.5], [0, 0, 0, 0, 0.0]])
    clean = np.array([[6, 2], [0, 0]]), np.array([[0.25, 0.25], [0, 0]])
    for ours, wanted in zip(run(loss, z, (*messy, tail, labels)), run(loss, z, (*clean, tail, labels)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-7)
    kd, ce, _ = run(loss, z, (*messy, tail, labels))
    assert abs(kd[1]) <= 1e-7 and ce[1] == 0  # a mixture of equals may be off in its last bit


def test_an_impossible_token_is_harmless_until_it_carries_weight() -> None:
    z, ids, p, tail, labels = problem(1, 7, 2, 1.0)
    free = [v for v in range(7) if v not in (*ids[0], labels[0])]
    z[0, free[0]] = -np.inf
    for t in (1.0, 2.0):
        kd, _, dz = run(BucketKL(t), z, (ids, p, tail, labels))
        assert np.isfinite(dz).all() and dz[0, free[0]] == 0 and np.isfinite(kd).all()
    z[0, ids[0, 0]] = -np.inf
    assert run(BucketKL(), z, (ids, p, tail, labels))[0][0] == np.inf


def test_the_gradient_is_the_hand_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, *rows = problem(2, 7, 3, 1.0)
    assert_backward_is_called(BucketLoss(divergence=JSD()), z, rows, monkeypatch)


def test_the_function_is_the_loss_with_its_options() -> None:
    z, *rows = problem(2, 7, 3, 2.0)
    weights = mx.array([0.0, 2.0])
    ours = bucket_kl_ce(mx.array(z.astype(np.float32)), *on_mlx(rows), 2.0, row_weights=weights, softcap=4.0)
    kd, ce, _ = run(BucketLoss(2.0, softcap=4.0), z, rows)
    np.testing.assert_allclose(np.array(ours), np.array([kd, ce]) * [0, 2], rtol=1e-6)


def test_shapes_and_options_that_do_not_fit_are_refused() -> None:
    z, ids, p, tail, labels = [mx.array(a) for a in on_mlx(problem(2, 7, 3, 1.0))]
    bad_rows = ((z, ids[:1], p, tail, labels), (z, ids, p, tail[:1], labels), (z, ids, p, tail, p), (z, ids, p, tail))
    for bad in (*bad_rows, (z[0], ids, p, tail, labels), (z, ids, p, tail, labels, p), (z, ids, p, tail, labels, p, p)):
        with pytest.raises(ValueError, match="must be"):
            BucketKL()(*bad)
    with pytest.raises(ValueError, match=r"must be .* 8"):
        BucketKL(vocab_size=8)(z, ids, p, tail, labels)
    for options in ({"temperature": 0.0}, {"scale": -1.0}, {"softcap": 0.0}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            BucketLoss(**options)
    for kind in (JSD, SkewKL, SkewReverseKL):
        with pytest.raises(ValueError, match="inside"):
            kind(1.0)
