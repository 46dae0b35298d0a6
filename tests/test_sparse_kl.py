"""Linear losses: values against the formula in float64, the hand-written gradient against central differences of it."""

from distill_kernels import SoftCE, SparseKL, soft_ce, sparse_kl_ce

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests import loss_cases, oracle
from tests.oracle import Floats, differences, log_softmax


def truth(z: Floats, ids: Floats, w: Floats, labels: Floats, t: float) -> tuple[Floats, Floats]:
    losses = oracle.sparse(z, ids, w, labels, t)
    return losses.kd, losses.ce


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
    for ours, wanted in zip(sparse_kl_ce(*arrays, t), truth(z, ids, w, labels, t), strict=True):
        np.testing.assert_allclose(np.array(ours), wanted, rtol=3e-6, atol=3e-6)

    def loss(z: Floats) -> float:
        kl, ce = truth(z, ids, w, labels, t)
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
    wanted = truth(np.array(rounded).astype(np.float64), ids, w, labels, 2.0)
    np.testing.assert_allclose(np.array(kl), wanted[0], rtol=3e-6)
    np.testing.assert_allclose(np.array(ce), wanted[1], rtol=3e-6)
    exact = gradient(rounded, *rows, cts=(ct_kl, ct_ce), t=2.0)
    np.testing.assert_allclose(gradient(half, *rows, cts=(ct_kl, ct_ce), t=2.0), exact, rtol=eps, atol=1e-7)


def test_padding_and_ids_or_labels_outside_the_vocabulary_count_for_nothing() -> None:
    z, _, _, _, ct_kl, ct_ce = problem(3, 7, 1)
    ids = np.array([[6, 7, 2, 2], [-1, 3, 10**6, 0], [5, 5, 5, 5]])
    w = np.array([[0.5, 0.25, 0.25, 0], [0.5, 0.25, 0.25, 0], [0.0, 0, 0, 0]])
    labels = np.array([6, 7, -100])
    clean = np.array([[6, 2], [3, 0], [0, 0]]), np.array([[0.5, 0.25], [0.25, 0], [0, 0]])
    kl, ce = sparse_kl_ce(*on_mlx(z, ids, w, labels), 1.0)
    np.testing.assert_allclose(np.array(kl), truth(z, *clean, labels, 1.0)[0], rtol=1e-6)
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


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("vocab", "k"), [*loss_cases.SHAPES, (1000, 1000)])
@pytest.mark.parametrize("loss", [SparseKL, SoftCE])
def test_both_losses_of_logits_of_every_dtype(
    loss: type[SparseKL], vocab: int, k: int, dtype: mx.Dtype, t: float
) -> None:
    z, ids, w, labels, *_ = problem(2, vocab, k, 0.7)
    wanted = lambda z: oracle.sparse(z, ids, w, labels, t, loss is SparseKL)  # noqa: E731
    loss_cases.assert_equals(loss(t), z, (ids, w, labels), wanted, dtype)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_oracles_gradient_is_that_of_central_differences(t: float) -> None:
    z, ids, w, labels, *_ = problem(2, 7, 3, 0.7)
    losses = oracle.sparse(z, ids, w, labels, t)
    places = [(n, v) for n in range(2) for v in range(7)]
    for column, gradient in enumerate((losses.d_kd, losses.d_ce)):
        slopes = differences(lambda z, c=column: truth(z, ids, w, labels, t)[c].sum(), z, places)
        np.testing.assert_allclose(gradient.ravel(), slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_scale_softcap_and_a_padded_head_are_part_of_the_loss(softcap: float | None, t: float) -> None:
    z, ids, w, labels, *_ = problem(3, 100, 5)
    ids[:, 0], ids[:, 1], ids[:, 2], labels[:2] = 89, 90, 10**6, [89, 90]
    z[:, 90:] = np.nan
    loss = SparseKL(t, scale=1.5, softcap=softcap, vocab_size=90)
    loss_cases.assert_equals(loss, z, (ids, w, labels), lambda z: oracle.sparse(z, ids, w, labels, t))


def test_a_masked_row_touches_nothing() -> None:
    z, ids, w, labels, *_ = problem(3, 300, 5)
    loss_cases.assert_a_masked_row_touches_nothing(SparseKL(2.0), z, (ids, w, labels))


def test_soft_cross_entropy_is_linear_in_the_weights() -> None:
    z, ids, w, labels = on_mlx(*problem(2, 300, 5)[:4])
    once, thrice = (soft_ce(z, ids, factor * w, labels, 2.0)[0] for factor in (1, 3))
    np.testing.assert_allclose(np.array(thrice), 3 * np.array(once), rtol=1e-6)
    split = mx.concatenate([w / 4, w * 3 / 4], axis=-1)
    again = soft_ce(z, mx.concatenate([ids, ids], axis=-1), split, labels, 2.0)[0]
    np.testing.assert_allclose(np.array(again), np.array(once), rtol=1e-6)


@pytest.mark.parametrize("loss", [SparseKL, SoftCE])
def test_the_gradient_is_the_hand_written_one(loss: type[SparseKL], monkeypatch: pytest.MonkeyPatch) -> None:
    z, ids, w, labels, *_ = problem(2, 7, 3)
    loss_cases.assert_backward_is_called(loss(), z, (ids, w, labels), monkeypatch)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, ids, w, labels = on_mlx(*problem(2, 7, 3)[:4])
    for bad in ((z[0], ids, w, labels), (z, ids[:1], w, labels), (z, ids, w[:, :1], labels), (z, ids, w, labels[:1])):
        with pytest.raises(ValueError, match="must be"):
            sparse_kl_ce(*bad, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        sparse_kl_ce(z, ids, w, labels, 0.0)
