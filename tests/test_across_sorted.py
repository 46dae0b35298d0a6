"""The losses of `--cross-vocab uld` and `gold` against float64 formulas: values, gradients, what costs nothing."""

from dataclasses import dataclass

from distill_kernels import JSD, BucketLoss, Head
from distill_kernels.sorted_l1 import SortedL1

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.spans import GoldLoss
from tests.oracle import Floats, Ints, differences, log_softmax

V, K = 40, 6
REAL = np.arange(V) < 36
UNNAMED = REAL & (np.arange(V) % 3 == 2)
WHOLE = Head(None, reason="logits are given")  # type: ignore[arg-type]


def float32(*arrays: Floats) -> list[mx.array]:
    return [mx.array(np.asarray(a, np.float32)) for a in arrays]


def sorted_l1(z: Floats, weights: Floats, tail: Floats, t: float, among: Ints = REAL) -> Floats:
    """kd [N], by its definition, position by position."""
    found = np.zeros(len(z))
    for row, q in enumerate(np.exp(log_softmax(z / t))):
        p = sorted(weights[row][weights[row] > 0], reverse=True)
        largest = sorted(q[among], reverse=True)[: len(p)]
        rest = tail[row] + sum(p[len(largest) :])
        cells = [abs(a - b) for a, b in zip(p, largest, strict=False)]
        found[row] = t * t * (sum(cells) + abs(rest - (1 - sum(largest))))
    return found


def truncated(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Weights [n, K] in no order, the last row's fewer, and what is left [n]."""
    p = rng.dirichlet(np.full(K + 1, 0.7), n)
    weights, tail = p[:, :K].copy(), p[:, K].copy()
    tail[-1] += weights[-1, 4:].sum()
    weights[-1, 4:] = 0
    return weights, tail


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_sorted_l1_and_its_gradient_are_those_of_the_formula(t: float) -> None:
    rng = np.random.default_rng(0)
    z, (weights, tail) = rng.normal(0, 2, (4, V)), truncated(rng, 4)
    z[1, 38] = 9  # padding, which is never ranked, with most of the mass
    labels = np.array([3, 38, 0, 11])
    loss = SortedL1(mx.array(REAL), int(REAL.sum()), t)
    given = [*float32(weights, np.log(tail)), mx.array(labels.astype(np.int32))]
    ct_kd, ct_ce = rng.normal(size=(2, 4))

    def total(z: Floats) -> float:
        ce = -log_softmax(z)[np.arange(4), labels]
        return float(ct_kd @ sorted_l1(z, weights, tail, t) + ct_ce @ ce)

    kd, ce = loss(mx.array(z.astype(np.float32)), *given)
    np.testing.assert_allclose(np.array(kd), sorted_l1(z, weights, tail, t), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(ce), -log_softmax(z)[np.arange(4), labels], rtol=1e-5)
    dz = np.array(mx.vjp(lambda z: list(loss(z, *given)), float32(z), float32(ct_kd, ct_ce))[1][0])
    places = [(n, v) for n in range(4) for v in range(V)]
    np.testing.assert_allclose(dz.ravel(), differences(total, z, places), atol=2e-5)


def test_a_teacher_that_kept_more_than_the_student_has_is_held_against_what_there_is() -> None:
    rng = np.random.default_rng(1)
    z, weights = rng.normal(0, 1, (3, V)), rng.dirichlet(np.ones(50), 3)
    loss = SortedL1(mx.array(REAL), int(REAL.sum()))
    kd, _ = loss(*float32(z, weights, np.full(3, -np.inf)), mx.zeros(3, mx.int32))
    np.testing.assert_allclose(np.array(kd), sorted_l1(z, weights, np.zeros(3), 1.0), rtol=1e-5)


def test_sorted_l1_is_at_most_that_of_whole_distributions_and_0_for_the_teachers_in_another_order() -> None:
    rng = np.random.default_rng(2)
    z, p = rng.normal(0, 2, (5, V)), np.exp(log_softmax(rng.normal(0, 2, (5, V))))
    whole = np.abs(-np.sort(-p) + np.sort(-np.exp(log_softmax(z)))).sum(axis=1)
    every, labels = SortedL1(mx.array(np.ones(V, np.bool_)), V), mx.zeros(5, mx.int32)
    for k in (1, 5, 20, V):
        weights = -np.sort(-p)[:, :k]
        with np.errstate(divide="ignore"):
            log_tail = np.log(np.maximum(1 - weights.sum(axis=1), 0) if k < V else np.zeros(5))
        kd = np.array(every(*float32(z, weights, log_tail), labels)[0])
        assert (kd <= whole + 1e-6).all()
        if k == V:
            np.testing.assert_allclose(kd, whole, rtol=1e-5)
        permuted = np.log(rng.permuted(p, axis=1))
        np.testing.assert_allclose(np.array(every(*float32(permuted, weights, log_tail), labels)[0]), 0, atol=2e-6)


@dataclass
class Spans:
    """Seven rows: spans of two, one and three rows, and a row of none; ids >= V are ranks."""

    z: Floats
    ids: Ints
    weights: Floats
    tail: Floats
    before: Floats
    labels: Ints
    spans: Ints

    @classmethod
    def random(cls, seed: int = 0) -> "Spans":
        rng = np.random.default_rng(seed)
        named = np.flatnonzero(REAL & ~UNNAMED)
        weights, tail = truncated(rng, 7)
        ids = np.stack([rng.permutation(named)[:K] for _ in range(7)])
        for row, unnamed in ((1, 2), (2, 1), (6, 3)):  # in any order; the last row's last entries are empty
            ids[row, :unnamed] = V + np.argsort(np.argsort(-weights[row, :unnamed]))
        spans = np.array([1, 1, 2, -1, 6, 6, 6])
        before = np.where((spans == np.arange(7)) & (np.arange(7) != 2), -rng.exponential(1, 7), 0)
        return cls(rng.normal(0, 1, (7, V)), ids, weights, tail, before, rng.integers(0, 36, 7), spans)

    def found(self, t: float = 1.0, unnamed: Ints = UNNAMED) -> tuple[list[mx.array], GoldLoss]:
        given = [mx.array(self.labels.astype(np.int32)), mx.array(self.spans.astype(np.int32)), *float32(self.before)]
        given += [mx.array(self.ids.astype(np.uint32)), *float32(self.weights, np.log(self.tail))]
        return given, GoldLoss(mx.array(unnamed), int(unnamed.sum()), t)

    def kd(self, z: Floats, t: float = 1.0, unnamed: Ints = UNNAMED) -> Floats:
        """By the definition, span by span, with dictionaries."""
        kd, label = np.zeros(7), log_softmax(z)[np.arange(7), self.labels]
        for last in sorted(set(self.spans.tolist()) - {-1}):
            q = np.exp(log_softmax(z[last] / t))
            r_t, r_s = np.exp(self.before[last]), np.exp(sum(label[np.flatnonzero(self.spans == last)[:-1]]))
            entries = [(i, w) for i, w in zip(self.ids[last], self.weights[last], strict=True) if w > 0]
            by_name = {i: w for i, w in entries if i < V}
            nameless = sorted((w for i, w in entries if i >= V), reverse=True)
            theirs = sorted(q[unnamed], reverse=True)[: len(nameless)]
            theirs += [0.0] * (len(nameless) - len(theirs))
            of_names = sum(q[i] for i in by_name)
            cells = [(r_t * w, r_s * q[i]) for i, w in by_name.items()]
            cells.append((r_t * (sum(nameless) + self.tail[last]), r_s * (1 - of_names)))
            jsd = sum(sum(x * np.log(2 * x / (a + b)) for x in (a, b) if x > 0) / 2 for a, b in cells)
            l1 = sum(abs(r_t * a - r_s * b) for a, b in zip(nameless, theirs, strict=True))
            l1 += abs(r_t * self.tail[last] - r_s * (1 - of_names - sum(theirs)))
            share = sum(by_name.values()) / sum(w for _, w in entries)
            kd[last] = t * t * (share * jsd + (1 - share) * l1)
        return kd


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("unnamed", [UNNAMED, np.arange(V) == 5], ids=["many", "one"])
def test_gold_and_its_gradient_are_those_of_the_formula(t: float, unnamed: Ints) -> None:
    """Through the sums over a span's earlier rows too; also where the student has fewer nameless tokens than it"""
    spans, rng = Spans.random(), np.random.default_rng(9)
    given, loss = spans.found(t, unnamed)
    values = lambda z: list(loss.values(WHOLE, z, *given))  # noqa: E731
    kd, ce = values(*float32(spans.z))
    np.testing.assert_allclose(np.array(kd), spans.kd(spans.z, t, unnamed), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(ce), -log_softmax(spans.z)[np.arange(7), spans.labels], rtol=1e-5)
    ct_kd, ct_ce = rng.normal(size=(2, 7))
    dz = np.array(mx.vjp(values, float32(spans.z), float32(ct_kd, ct_ce))[1][0])

    def total(z: Floats) -> float:
        return float(ct_kd @ spans.kd(z, t, unnamed) - ct_ce @ log_softmax(z)[np.arange(7), spans.labels])

    places = [(n, v) for n in range(7) for v in range(V)]
    np.testing.assert_allclose(dz.ravel(), differences(total, spans.z, places), atol=2e-5)


def test_gold_with_a_name_for_every_token_is_the_jsd_with_a_cell_for_the_rest() -> None:
    spans = Spans.random(3)
    spans.ids = np.where(spans.ids >= V, spans.ids - V + 36, spans.ids)
    spans.spans, spans.before = np.arange(7), np.zeros(7)
    given, loss = spans.found(2.0, np.zeros(V, np.bool_))
    kd, _ = loss.values(WHOLE, *float32(spans.z), *given)
    labels, _, _, ids, weights, log_tail = given
    expected, _ = BucketLoss(2.0, divergence=JSD(0.5))(*float32(spans.z), ids, weights, log_tail, labels)
    np.testing.assert_allclose(np.array(kd), np.array(expected), rtol=2e-5, atol=1e-7)


def test_gold_costs_nothing_where_the_student_says_what_the_teacher_says() -> None:
    """Its entries, its tail, its products; the tokens without a name in any order. Value and gradient."""
    spans = Spans.random(4)
    log_q = log_softmax(spans.z)
    for row, q in enumerate(np.exp(log_q)):
        ranked = np.sort(q[UNNAMED])[::-1]
        ids = spans.ids[row]
        of_rank = ranked[np.maximum(ids - V, 0)]
        spans.weights[row] = np.where(ids >= V, of_rank, q[np.where(ids < V, ids, 0)])
        spans.tail[row] = 1 - spans.weights[row].sum()
    label = log_q[np.arange(7), spans.labels]
    spans.before = np.array([0, label[0], 0, 0, 0, 0, label[4] + label[5]])
    given, loss = spans.found()
    kd, _ = loss.values(WHOLE, *float32(spans.z), *given)
    np.testing.assert_allclose(np.array(kd), 0, atol=1e-6)
    spans.ids = np.where(spans.ids >= V, 36, spans.ids)  # of L1 the slope jumps at equality: names alone
    spans.weights *= spans.ids != 36
    spans.tail = 1 - spans.weights.sum(axis=1)
    given, loss = spans.found()
    (dz,) = mx.vjp(lambda z: [loss.values(WHOLE, z, *given)[0]], float32(spans.z), [mx.ones(7)])[1]
    np.testing.assert_allclose(np.array(dz), 0, atol=1e-6)


@pytest.mark.parametrize("of_unnamed", [1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("method", ["uld", "gold"])
def test_one_unmapped_thousandth_changes_the_loss_little(method: str, of_unnamed: float) -> None:
    """Whatever mass the student has on what the teacher has no name for."""
    rng = np.random.default_rng(6)
    spans = Spans.random(6)
    spans.spans, spans.before = np.arange(7), np.zeros(7)
    spans.ids = np.stack([rng.permutation(np.flatnonzero(REAL & ~UNNAMED))[:K] for _ in range(7)])
    lse = [np.log(np.exp(spans.z[:, mask]).sum(axis=1)) for mask in (UNNAMED, ~UNNAMED)]
    spans.z[:, UNNAMED] += (np.log(of_unnamed / (1 - of_unnamed)) - lse[0] + lse[1])[:, None]
    values = []
    for lost in (0.0, 1e-3):
        spans.weights[:, 0] = lost
        spans.weights[:, 1:] *= (1 - lost - spans.tail)[:, None] / spans.weights[:, 1:].sum(axis=1, keepdims=True)
        spans.ids[:, 0] = V
        given, loss = spans.found()
        if method == "gold":
            values.append(np.array(loss.values(WHOLE, *float32(spans.z), *given)[0]))
        else:
            uld = SortedL1(mx.array(REAL), int(REAL.sum()))
            values.append(np.array(uld(*float32(spans.z), *given[4:], given[0])[0]))
    assert 0 < np.abs(values[0] - values[1]).max() < 0.01


def test_padding_of_the_students_head_changes_nothing_where_it_has_no_mass() -> None:
    spans = Spans.random(7)
    spans.z[:, ~REAL] = -np.inf
    narrow = Spans(**vars(spans) | {"z": spans.z[:, REAL], "ids": np.where(spans.ids >= V, spans.ids - 4, spans.ids)})
    found = []
    for wide, real in ((spans, REAL), (narrow, REAL[REAL])):
        given, gold = wide.found(1.0, UNNAMED[: len(real)])
        uld = SortedL1(mx.array(real), 36)
        of_gold = lambda z, given=given, gold=gold: gold.values(WHOLE, z, *given)[0]  # noqa: E731
        of_uld = lambda z, given=given, uld=uld: uld(z, *given[4:], given[0])[0]  # noqa: E731
        for loss in (of_gold, of_uld):
            (value,), (dz,) = mx.vjp(lambda z, loss=loss: [loss(z)], float32(wide.z), [mx.ones(7)])
            found.append((np.array(value), np.array(dz)[:, :36]))
            assert not np.array(dz)[:, 36:].any()
    for one, two in zip(found[:2], found[2:], strict=True):
        for ours, narrower in zip(one, two, strict=True):
            np.testing.assert_allclose(ours, narrower, rtol=1e-5, atol=1e-6)


def test_a_span_that_the_student_finds_impossible_has_a_finite_loss_and_gradient() -> None:
    spans = Spans.random(8)
    spans.z[0, spans.labels[0]] = -300
    spans.tail[2], spans.weights[2] = 0, np.where(np.arange(K) == 0, 1, 0)
    spans.z[2, :] = np.where(np.arange(V) == 20, 200, -200)
    with np.errstate(divide="ignore"):
        given, loss = spans.found()
    values, (dz,) = mx.vjp(lambda z: list(loss.values(WHOLE, z, *given)), float32(spans.z), float32(*np.ones((2, 7))))
    assert all(np.isfinite(np.array(a)).all() for a in (*values, dz))
