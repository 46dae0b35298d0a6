"""The losses between two tokenizers: merged columns, likelihoods of spans, against float64 formulas."""

from collections.abc import Callable

from distill_kernels import JSD, BucketLoss, Head, LogisticRank, SampledLoss, SparseKL, WeightedLoss
from distill_kernels.merged import MergedLoss
from distill_kernels.span import span_divergence

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.spans import SpanLoss
from tests.oracle import Floats, differences, log_softmax

N, V, K = 3, 40, 6
MASK = np.arange(V) % 5 == 2
CELL = 7


def merged(z: Floats, t: float) -> Floats:
    """z' [N, V], by its definition."""
    found = np.where(MASK, -np.inf, z)
    found[:, CELL] = t * np.log(np.exp(z[:, MASK] / t).sum(axis=1))
    return found


def problem(seed: int = 0) -> tuple[Floats, dict[str, Floats]]:
    rng = np.random.default_rng(seed)
    outside = np.flatnonzero(~MASK)
    ids = np.stack([np.append(rng.permutation(outside)[: K - 1], CELL) for _ in range(N)])
    w = rng.dirichlet(np.ones(K), N)
    labels = np.array([2, 12, 0])  # two of them merged ones, one not the cell
    rows = {"ids": ids, "weights": w, "labels": labels, "log_probs": np.log(w), "log_tail_mass": np.full(N, -1.0)}
    return rng.normal(0, 2, (N, V)), rows


def arrays(rows: dict[str, Floats], names: tuple[str, ...]) -> list[mx.array]:
    kinds = {"ids": np.uint32, "labels": np.int32}
    return [mx.array(rows[name].astype(kinds.get(name, np.float32))) for name in names]


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_kl_with_merged_columns_is_that_of_the_merged_distribution(t: float) -> None:
    z, rows = problem()
    loss = MergedLoss(SparseKL(t), mx.array(MASK), CELL)

    def value(z: Floats) -> Floats:
        q = log_softmax(merged(z, t) / t)
        at = np.take_along_axis(q, rows["ids"], axis=1)
        return t * t * (rows["weights"] * (np.log(rows["weights"]) - at)).sum(axis=1)

    kd, ce = loss(mx.array(z.astype(np.float32)), *arrays(rows, loss.names))
    np.testing.assert_allclose(np.array(kd), value(z), rtol=1e-5)
    np.testing.assert_allclose(np.array(ce), -log_softmax(z)[np.arange(N), rows["labels"]], rtol=1e-5)
    check_gradient(loss, z, rows, value)


@pytest.mark.parametrize(
    "inner",
    [
        BucketLoss(1.0, divergence=JSD(0.3)),
        SampledLoss(2.0, divergence=JSD(0.3)),
        LogisticRank(1.0),
        WeightedLoss(((0.7, SparseKL(2.0)), (0.3, SampledLoss(2.0, divergence=JSD())))),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_any_loss_with_merged_columns_is_that_loss_of_merged_logits(inner: BucketLoss | WeightedLoss) -> None:
    """Value by the loss itself, which others hold to its formula; the gradient by differences of it in float64."""
    z, rows = problem(1)
    loss = MergedLoss(inner, mx.array(MASK), CELL)
    kd, _ = loss(mx.array(z.astype(np.float32)), *arrays(rows, loss.names))
    of_merged = inner(mx.array(merged(z, loss.temperature).astype(np.float32)), *arrays(rows, loss.names))[0]
    np.testing.assert_allclose(np.array(kd), np.array(of_merged), rtol=1e-5)

    def value(z: Floats) -> Floats:
        return np.array(inner(mx.array(merged(z, loss.temperature).astype(np.float32)), *arrays(rows, loss.names))[0])

    check_gradient(loss, z, rows, lambda z: value(z).astype(np.float64), step=3e-3, tolerance=5e-3)


def check_gradient(
    loss: MergedLoss,
    z: Floats,
    rows: dict[str, Floats],
    value: Callable[[Floats], Floats],
    step: float = 1e-5,
    tolerance: float = 1e-5,
) -> None:
    ct_kd, ct_ce = np.array([0.3, 1.0, -0.7]), np.array([0.5, 0.2, 1.0])
    cotangents = [mx.array(c.astype(np.float32)) for c in (ct_kd, ct_ce)]
    given = arrays(rows, loss.names)
    dz = np.array(mx.vjp(lambda z: list(loss(z, *given)), [mx.array(z.astype(np.float32))], cotangents)[1][0])

    def total(z: Floats) -> float:
        ce = -log_softmax(z)[np.arange(N), rows["labels"]]
        return float((ct_kd * value(z)).sum() + (ct_ce * ce).sum())

    expected = np.zeros_like(z)
    for n in range(N):
        for v in range(V):
            moved = [z.copy() for _ in range(2)]
            moved[0][n, v] += step
            moved[1][n, v] -= step
            expected[n, v] = (total(moved[0]) - total(moved[1])) / (2 * step)
    np.testing.assert_allclose(dz, expected, atol=tolerance)


def test_a_student_that_has_the_teachers_mass_everywhere_costs_nothing() -> None:
    z, rows = problem(2)
    q = np.exp(log_softmax(merged(z, 1.0)))
    every = np.flatnonzero(~MASK | (np.arange(V) == CELL))
    full = {"ids": np.tile(every, (N, 1)), "weights": q[:, every], "labels": rows["labels"]}
    loss = MergedLoss(SparseKL(), mx.array(MASK), CELL)
    given = arrays(full, loss.names)
    kd, _ = loss(mx.array(z.astype(np.float32)), *given)
    np.testing.assert_allclose(np.array(kd), 0, atol=1e-6)
    (dz,) = mx.vjp(lambda z: [loss(z, *given)[0]], [mx.array(z.astype(np.float32))], [mx.ones(N)])[1]
    np.testing.assert_allclose(np.array(dz), 0, atol=1e-6)


@pytest.mark.parametrize("of_merged", [1e-6, 1e-3, 0.3])
def test_one_unmapped_thousandth_changes_the_loss_of_a_near_student_little(of_merged: float) -> None:
    """Whatever mass the student has on what the teacher cannot name."""
    z, rows = problem(3)
    z[np.arange(N)[:, None], rows["ids"]] = np.log(rows["weights"]) + 8 + z[np.arange(N)[:, None], rows["ids"]] / 5
    z[:, MASK] += (
        np.log(of_merged / (1 - of_merged))
        - (np.logaddexp.reduce(z[:, MASK], axis=1) - np.logaddexp.reduce(z[:, ~MASK], axis=1))[:, None]
    )
    loss = MergedLoss(SparseKL(), mx.array(MASK), CELL)
    without = rows | {"weights": np.where(rows["ids"] == CELL, 0, rows["weights"])}
    without["weights"] /= without["weights"].sum(axis=1, keepdims=True)
    with_it = without | {"weights": np.where(rows["ids"] == CELL, 1e-3, without["weights"] * (1 - 1e-3))}
    values = [np.array(loss(mx.array(z.astype(np.float32)), *arrays(r, loss.names))[0]) for r in (without, with_it)]
    assert np.abs(values[0] - values[1]).max() < 0.01


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_divergence_of_spans_is_that_of_two_coins(tau: float) -> None:
    rng = np.random.default_rng(0)
    y_t, y_s = -rng.exponential(3, 50), -rng.exponential(3, 50)
    y_t[:2] = 0, -40

    def value(y: Floats) -> Floats:
        a, b = (np.exp((x - 1e-6) / tau) for x in (y_t, y))
        return tau * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))

    given = mx.array(y_t.astype(np.float32))
    found = np.array(span_divergence(given, mx.array(y_s.astype(np.float32)), tau))
    np.testing.assert_allclose(found, value(y_s), rtol=1e-3, atol=1e-4)
    assert (found > -1e-5).all()
    np.testing.assert_allclose(np.array(span_divergence(given, given, tau)), 0, atol=1e-6)
    (slope,) = mx.vjp(lambda y: [span_divergence(given, y, tau)], [mx.array(y_s.astype(np.float32))], [mx.ones(50)])[1]
    expected = differences(lambda y: float(value(y[0]).sum()), y_s[None], [(0, i) for i in range(50)])
    np.testing.assert_allclose(np.array(slope), expected, rtol=2e-3, atol=2e-4)


def test_the_divergence_of_spans_has_the_scale_of_nats() -> None:
    y_t, y_s = mx.array([-2.0]), mx.array([-5.0])
    limit = -2.0 + 5.0 - 2.0 * np.log(5 / 2)
    assert span_divergence(y_t, y_s, 1e3).item() == pytest.approx(limit, rel=5e-3)


def test_the_gradient_of_a_batchs_spans_is_that_of_differences() -> None:
    """Through the sums over each span's rows; cross-entropy beside it; rows of no span take no part."""
    rng = np.random.default_rng(5)
    z = rng.normal(0, 2, (7, V))
    labels, spans = rng.integers(0, V, 7), np.array([1, 1, 2, -1, 6, 6, 6])
    y_t = np.where(spans == np.arange(7), -rng.exponential(3, 7), 0)
    ct_kd, ct_ce = rng.normal(size=(2, 7))

    def values(z: Floats) -> tuple[Floats, Floats]:
        ce = -log_softmax(z)[np.arange(7), labels]
        kd = np.zeros(7)
        for last in (1, 2, 6):
            y_s = -ce[spans == last].sum()
            a, b = (np.exp((y - 1e-6) / 100) for y in (y_t[last], y_s))
            kd[last] = 100 * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))
        return kd, ce

    whole = Head(None, reason="logits are given")  # type: ignore[arg-type]
    given = [mx.array(labels.astype(np.int32)), mx.array(spans.astype(np.int32)), mx.array(y_t.astype(np.float32))]
    loss = lambda z: list(SpanLoss().values(whole, z, *given))  # noqa: E731
    found = loss(mx.array(z.astype(np.float32)))
    for ours, expected in zip(found, values(z), strict=True):
        np.testing.assert_allclose(np.array(ours), expected, rtol=2e-3, atol=2e-3)
    cotangents = [mx.array(c.astype(np.float32)) for c in (ct_kd, ct_ce)]
    dz = np.array(mx.vjp(loss, [mx.array(z.astype(np.float32))], cotangents)[1][0])

    def total(z: Floats) -> float:
        kd, ce = values(z)
        return float(ct_kd @ kd + ct_ce @ ce)

    places = [(n, v) for n in range(7) for v in range(V)]
    np.testing.assert_allclose(dz.ravel(), differences(total, z, places), rtol=2e-3, atol=2e-3)
