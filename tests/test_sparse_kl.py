"""sparse_kl_ce: values against the formula in float64, the hand-written gradient against central differences of it."""

from collections.abc import Callable

from distill_kernels import SparseKL, sparse_kl_ce

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_softmax(z: Floats) -> Floats:
    """Return log softmax of the last axis."""
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def oracle(z: Floats, ids: NDArray[np.int64], w: Floats, labels: NDArray[np.int64], t: float) -> tuple[Floats, Floats]:
    """Return (kl, ce) entry by entry, as the formula reads; entries with no weight or no place in z drop out."""
    log_q, log_q1 = log_softmax(z / t), log_softmax(z)
    kl, ce = np.zeros(len(z)), np.zeros(len(z))
    for n in range(len(z)):
        for i, p in zip(ids[n], w[n], strict=True):
            if p > 0 and 0 <= i < z.shape[1]:
                kl[n] += t * t * p * (np.log(p) - log_q[n, i])
        if 0 <= labels[n] < z.shape[1]:
            ce[n] = -log_q1[n, labels[n]]
    return kl, ce


def differences(
    loss: Callable[[Floats], float], z: Floats, places: list[tuple[int, int]], step: float = 1e-4
) -> Floats:
    """Return central finite differences of a scalar loss at some coordinates of z."""
    slopes = []
    for place in places:
        bump = np.zeros_like(z)
        bump[place] = step
        slopes.append((loss(z + bump) - loss(z - bump)) / (2 * step))
    return np.array(slopes)


def problem(rows: int, vocab: int, k: int, total: float = 1.0, seed: int = 0) -> tuple[Floats, ...]:
    """Return (logits, ids, weights that sum to total, labels, ct_kl, ct_ce); values are exact in float32."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (rows, vocab)).astype(np.float32).astype(np.float64)
    ids = np.stack([rng.permutation(vocab)[:k] for _ in range(rows)])
    w = rng.dirichlet(np.ones(k), rows) * total
    return z, ids, w.astype(np.float32).astype(np.float64), rng.integers(0, vocab, rows), *rng.normal(size=(2, rows))


def on_mlx(z: Floats, ids: Floats, w: Floats, labels: Floats, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    return [
        mx.array(z).astype(dtype),
        *map(mx.array, (ids.astype(np.int32), w.astype(np.float32), labels.astype(np.int32))),
    ]


def gradient(z: mx.array, *rows: mx.array, cts: tuple[Floats, Floats], t: float) -> NDArray[np.float32]:
    _, (dz,) = mx.vjp(lambda z: list(sparse_kl_ce(z, *rows, t)), [z], [mx.array(c.astype(np.float32)) for c in cts])
    assert dz.dtype == z.dtype
    return np.array(dz.astype(mx.float32))


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("vocab", "k", "total"), [(7, 1, 1.0), (7, 7, 0.3), (1000, 50, 0.3), (49152, 16, 1.0)])
def test_value_and_gradient_are_those_of_the_formula(vocab: int, k: int, total: float, t: float) -> None:
    z, ids, w, labels, ct_kl, ct_ce = problem(2, vocab, k, total)
    arrays = on_mlx(z, ids, w, labels)
    for ours, truth in zip(sparse_kl_ce(*arrays, t), oracle(z, ids, w, labels, t), strict=True):
        np.testing.assert_allclose(np.array(ours), truth, rtol=3e-6, atol=3e-6)

    def loss(z: Floats) -> float:
        kl, ce = oracle(z, ids, w, labels, t)
        return float(ct_kl @ kl + ct_ce @ ce)

    columns = np.random.default_rng(1).integers(0, vocab, 8)
    places = [(n, int(v)) for n in range(2) for v in {*columns, *ids[n], labels[n]}]
    dz = gradient(*arrays, cts=(ct_kl, ct_ce), t=t)
    np.testing.assert_allclose([dz[p] for p in places], differences(loss, z, places), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("dtype", "eps"), [(mx.bfloat16, 2**-8), (mx.float16, 2**-11)])
def test_half_precision_logits_are_computed_in_float32(dtype: mx.Dtype, eps: float) -> None:
    z, ids, w, labels, ct_kl, ct_ce = problem(3, 1000, 12)
    half, *rows = on_mlx(z, ids, w, labels, dtype)
    rounded = half.astype(mx.float32)
    kl, ce = sparse_kl_ce(half, *rows, 2.0)
    truth = oracle(np.array(rounded).astype(np.float64), ids, w, labels, 2.0)
    np.testing.assert_allclose(np.array(kl), truth[0], rtol=3e-6)
    np.testing.assert_allclose(np.array(ce), truth[1], rtol=3e-6)
    exact = gradient(rounded, *rows, cts=(ct_kl, ct_ce), t=2.0)
    np.testing.assert_allclose(gradient(half, *rows, cts=(ct_kl, ct_ce), t=2.0), exact, rtol=eps, atol=1e-7)


def test_padding_and_ids_or_labels_outside_the_vocabulary_count_for_nothing() -> None:
    z, _, _, _, ct_kl, ct_ce = problem(3, 7, 1)
    ids = np.array([[6, 7, 2, 2], [-1, 3, 10**6, 0], [5, 5, 5, 5]])
    w = np.array([[0.5, 0.25, 0.25, 0], [0.5, 0.25, 0.25, 0], [0.0, 0, 0, 0]])
    labels = np.array([6, 7, -100])
    clean = np.array([[6, 2], [3, 0], [0, 0]]), np.array([[0.5, 0.25], [0.25, 0], [0, 0]])
    kl, ce = sparse_kl_ce(*on_mlx(z, ids, w, labels), 1.0)
    np.testing.assert_allclose(np.array(kl), oracle(z, *clean, labels, 1.0)[0], rtol=1e-6)
    assert kl[2] == 0 and ce[1] == 0 and ce[2] == 0
    dz = gradient(*on_mlx(z, ids, w, labels), cts=(ct_kl, ct_ce), t=1.0)
    np.testing.assert_allclose(dz, gradient(*on_mlx(z, *clean, labels), cts=(ct_kl, ct_ce), t=1.0), atol=1e-7)
    assert not dz[2].any()


def test_unsigned_ids_above_two_to_the_31_are_dropped() -> None:
    z, ids, w, labels = on_mlx(*problem(1, 7, 2)[:4])
    far = mx.array([[ids[0, 0].item(), 2**32 - 1]], dtype=mx.uint32)
    kl, _ = sparse_kl_ce(z, far, w, labels, 1.0)
    only, _ = sparse_kl_ce(z, ids[:, :1], w[:, :1], labels, 1.0)
    assert kl.item() == pytest.approx(only.item(), rel=1e-6)


def test_an_impossible_token_is_harmless_until_it_carries_weight() -> None:
    z, ids, w, labels, ct_kl, ct_ce = problem(1, 7, 3)
    masked = next(v for v in range(7) if v not in (*ids[0], labels[0]))
    z[0, masked] = -np.inf
    ids, w = np.append(ids, [[masked]], axis=1), np.append(w, [[0.0]], axis=1)
    dz = gradient(*on_mlx(z, ids, w, labels), cts=(ct_kl, ct_ce), t=2.0)
    assert np.isfinite(dz).all() and dz[0, masked] == 0
    assert mx.isfinite(sparse_kl_ce(*on_mlx(z, ids, w, labels), 2.0)[0]).item()
    w[0, -1] = 0.1
    assert sparse_kl_ce(*on_mlx(z, ids, w, labels), 2.0)[0].item() == np.inf


def test_a_one_hot_teacher_is_the_cross_entropy() -> None:
    z, _, _, labels, *_ = problem(4, 1000, 1)
    kl, ce = sparse_kl_ce(*on_mlx(z, labels[:, None], np.ones((4, 1)), labels), 1.0)
    np.testing.assert_allclose(np.array(kl), np.array(ce), rtol=1e-6)


def test_an_exact_student_of_a_full_teacher_has_nothing_to_learn() -> None:
    z, *_ = problem(2, 1000, 1)
    for t in (1.0, 2.0):
        p, ids = np.exp(log_softmax(z / t)), np.tile(np.arange(1000), (2, 1))
        arrays = on_mlx(z, ids, p, np.array([-1, -1]))
        np.testing.assert_allclose(np.array(sparse_kl_ce(*arrays, t)[0]), 0, atol=1e-6 * t * t)
        np.testing.assert_allclose(gradient(*arrays, cts=(np.ones(2), np.ones(2)), t=t), 0, atol=1e-7 * t)


def test_the_gradient_is_the_hand_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = on_mlx(*problem(2, 7, 3)[:4])
    monkeypatch.setattr(SparseKL, "backward", lambda _, logits, *_rows, **_saved: mx.full(logits.shape, 5.0))
    assert mx.all(mx.grad(lambda z: sum(sparse_kl_ce(z, *arrays[1:], 1.0)).sum())(arrays[0]) == 5.0).item()


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, ids, w, labels = on_mlx(*problem(2, 7, 3)[:4])
    for bad in ((z[0], ids, w, labels), (z, ids[:1], w, labels), (z, ids, w[:, :1], labels), (z, ids, w, labels[:1])):
        with pytest.raises(ValueError, match="must be"):
            sparse_kl_ce(*bad, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        sparse_kl_ce(z, ids, w, labels, 0.0)
