"""bucket_kl_ce: values against the formula in float64, the hand-written gradient against central differences of it."""

from distill_kernels import BucketKL, bucket_kl_ce

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def log_softmax(z: Floats) -> Floats:
    """Return log softmax of the last axis."""
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def oracle(z: Floats, ids: Ints, p: Floats, log_tail: Floats, labels: Ints, t: float) -> tuple[Floats, Floats]:
    """Return (kl, ce): the kept cells one by one, then one cell for every id that no entry with weight names."""
    log_q, log_q1 = log_softmax(z / t), log_softmax(z)
    kl, ce = np.zeros(len(z)), np.zeros(len(z))
    for n in range(len(z)):
        kept = {i: w for i, w in zip(ids[n], p[n], strict=True) if w > 0 and 0 <= i < z.shape[1]}
        kl[n] = sum(w * (np.log(w) - log_q[n, i]) for i, w in kept.items())
        rest = np.delete(np.arange(z.shape[1]), list(kept))
        if np.exp(log_tail[n]) > 0:
            kl[n] += np.exp(log_tail[n]) * (log_tail[n] - np.logaddexp.reduce(log_q[n, rest]))
        if 0 <= labels[n] < z.shape[1]:
            ce[n] = -log_q1[n, labels[n]]
    return t * t * kl, ce


def problem(rows: int, vocab: int, k: int, t: float, seed: int = 0) -> tuple[Floats, Ints, Floats, Floats, Ints]:
    """Return (student logits, ids, top-k probabilities of a teacher at T, log tail mass, labels)."""
    rng = np.random.default_rng(seed)
    z, teacher = rng.normal(0, 2, (2, rows, vocab)).astype(np.float32).astype(np.float64)
    log_p = log_softmax(teacher / t)
    order = np.argsort(-log_p, axis=-1)
    rest = np.take_along_axis(log_p, order[:, k:], axis=-1)
    log_tail = np.logaddexp.reduce(rest, axis=-1) if k < vocab else np.full(rows, -np.inf)
    p = np.exp(np.take_along_axis(log_p, order[:, :k], axis=-1)).astype(np.float32).astype(np.float64)
    return z, order[:, :k], p, log_tail, rng.integers(0, vocab, rows)


def on_mlx(z: Floats, ids: Ints, p: Floats, log_tail: Floats, labels: Ints) -> list[mx.array]:
    floats, ints = np.float32, np.int32
    return [
        mx.array(a.astype(d)) for a, d in ((z, floats), (ids, ints), (p, floats), (log_tail, floats), (labels, ints))
    ]


def gradient(z: mx.array, *rows: mx.array, cts: Floats, t: float) -> NDArray[np.float32]:
    _, (dz,) = mx.vjp(lambda z: list(bucket_kl_ce(z, *rows, t)), [z], [mx.array(c.astype(np.float32)) for c in cts])
    assert dz.dtype == z.dtype
    return np.array(dz.astype(mx.float32))


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("vocab", "k"), [(7, 1), (7, 7), (1000, 50), (49152, 12)])
def test_value_and_gradient_are_those_of_the_formula(vocab: int, k: int, t: float) -> None:
    z, *rows = problem(2, vocab, k, t)
    rng = np.random.default_rng(1)
    cts = rng.normal(size=(2, 2))
    for ours, truth in zip(bucket_kl_ce(*on_mlx(z, *rows), t), oracle(z, *rows, t), strict=True):
        np.testing.assert_allclose(np.array(ours), truth, rtol=3e-6, atol=3e-6)

    places = [(n, int(v)) for n in range(2) for v in {*rng.integers(0, vocab, 8), *rows[0][n], rows[3][n]}]
    slopes = []
    for place in places:
        bump = np.zeros_like(z)
        bump[place] = 1e-4
        (kl2, ce2), (kl1, ce1) = oracle(z + bump, *rows, t), oracle(z - bump, *rows, t)
        slopes.append((cts[0] @ (kl2 - kl1) + cts[1] @ (ce2 - ce1)) / 2e-4)
    dz = gradient(*on_mlx(z, *rows), cts=cts, t=t)
    np.testing.assert_allclose([dz[p] for p in places], slopes, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: mx.Dtype) -> None:
    z, *rows = on_mlx(*problem(3, 1000, 12, 2.0))
    half = z.astype(dtype)
    exact = half.astype(mx.float32)
    for a, b in zip(bucket_kl_ce(half, *rows, 2.0), bucket_kl_ce(exact, *rows, 2.0), strict=True):
        assert a.dtype == mx.float32 and mx.allclose(a, b, rtol=1e-6, atol=0).item()
    cts = np.ones((2, 3))
    np.testing.assert_allclose(
        gradient(half, *rows, cts=cts, t=2.0), gradient(exact, *rows, cts=cts, t=2.0), rtol=2**-8, atol=1e-7
    )


@pytest.mark.parametrize("k", [12, 1000])
def test_an_exact_student_has_nothing_to_learn(k: int) -> None:
    for t in (1.0, 2.0):
        z, *_ = problem(2, 1000, k, t)
        log_p = log_softmax(z / t)
        ids = np.argsort(-log_p, axis=-1)
        tail = np.logaddexp.reduce(np.take_along_axis(log_p, ids[:, k:], -1), axis=-1)
        rows = ids[:, :k], np.exp(np.take_along_axis(log_p, ids[:, :k], -1)), tail, np.array([-1, -1])
        np.testing.assert_allclose(np.array(bucket_kl_ce(*on_mlx(z, *rows), t)[0]), 0, atol=1e-6 * t * t)
        np.testing.assert_allclose(gradient(*on_mlx(z, *rows), cts=np.ones((2, 2)), t=t), 0, atol=2e-7 * t)


def test_it_is_a_lower_bound_of_the_whole_divergence() -> None:
    z, teacher = np.random.default_rng(0).normal(0, 2, (2, 3, 1000))
    log_p, log_q = log_softmax(teacher), log_softmax(z)
    whole = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    ids = np.argsort(-log_p, axis=-1)
    for k in (1, 12, 500):
        head, tail = (np.take_along_axis(log_p, part, -1) for part in (ids[:, :k], ids[:, k:]))
        rows = ids[:, :k], np.exp(head), np.logaddexp.reduce(tail, axis=-1), np.zeros(3)
        kl = np.array(bucket_kl_ce(*on_mlx(z, *rows), 1.0)[0])
        assert (kl > 0).all() and (kl < whole).all()


def test_a_tail_of_1e_minus_20_keeps_its_digits() -> None:
    z = np.array([[60.0, 14, 13, 12]])
    rows = np.array([[0]]), np.array([[0.5]]), np.log(np.array([0.5])), np.array([1])
    ours = bucket_kl_ce(*on_mlx(z, *rows), 1.0)[0].item()
    assert ours == pytest.approx(oracle(z, *rows, 1.0)[0][0], rel=1e-6) and ours > 20
    dz = gradient(*on_mlx(z, *rows), cts=np.array([[1.0], [0.0]]), t=1.0)[0]
    np.testing.assert_allclose(dz, [0.5, *-0.5 * np.exp(log_softmax(z[0, 1:]))], rtol=1e-6)


def test_padding_and_ids_outside_the_vocabulary_count_for_nothing() -> None:
    z = problem(2, 7, 1, 1.0)[0]
    tail, labels, cts = np.log(np.array([0.25, 1.0])), np.array([6, 9]), np.ones((2, 2))
    messy = np.array([[6, 7, 2, 2, -5], [3, 3, 3, -1, 8]]), np.array([[0.25, 0.25, 0.25, 0, 0.5], [0, 0, 0, 0, 0.0]])
    clean = np.array([[6, 2], [0, 0]]), np.array([[0.25, 0.25], [0, 0]])
    kl, ce = bucket_kl_ce(*on_mlx(z, *messy, tail, labels), 1.0)
    np.testing.assert_allclose(np.array(kl), oracle(z, *clean, tail, labels, 1.0)[0], rtol=1e-6, atol=1e-6)
    assert ce[1] == 0
    dz, wanted = (gradient(*on_mlx(z, *rows, tail, labels), cts=cts, t=1.0) for rows in (messy, clean))
    np.testing.assert_allclose(dz, wanted, atol=1e-7)
    np.testing.assert_allclose(dz[1], 0, atol=1e-7)


def test_an_impossible_token_is_harmless_until_it_carries_weight() -> None:
    z, ids, p, tail, labels = problem(1, 7, 2, 1.0)
    free = [v for v in range(7) if v not in (*ids[0], labels[0])]
    z[0, free[0]] = -np.inf
    for t in (1.0, 2.0):
        arrays = on_mlx(z, ids, p, tail, labels)
        dz = gradient(*arrays, cts=np.ones((2, 1)), t=t)
        assert np.isfinite(dz).all() and dz[0, free[0]] == 0 and mx.isfinite(bucket_kl_ce(*arrays, t)[0]).item()
    z[0, ids[0, 0]] = -np.inf
    assert bucket_kl_ce(*on_mlx(z, ids, p, tail, labels), 1.0)[0].item() == np.inf


def test_the_gradient_is_the_hand_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, *rows = on_mlx(*problem(2, 7, 3, 1.0))
    monkeypatch.setattr(BucketKL, "backward", lambda _, logits, *_rows, **_saved: mx.full(logits.shape, 5.0))
    assert mx.all(mx.grad(lambda z: sum(bucket_kl_ce(z, *rows, 1.0)).sum())(z) == 5.0).item()


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, ids, p, tail, labels = on_mlx(*problem(2, 7, 3, 1.0))
    for bad in ((z, ids[:1], p, tail, labels), (z, ids, p, tail[:1], labels), (z, ids, p, tail, p)):
        with pytest.raises(ValueError, match="must be"):
            bucket_kl_ce(*bad, 1.0)
