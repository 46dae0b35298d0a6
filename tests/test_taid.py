"""TAID's loss against its formula in float64, and its rule for t against numbers computed by hand."""

from pathlib import Path
from typing import Any

from distill_kernels import BucketKL, DenseLoss, ForwardKL, TaidLoss, WeightedLoss, chunked_sum, split_head

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Weighing, collate
from distill_trainer.taid import Taid, interpolated, started
from logitstore.errors import IncompatibleStoreError
from logitstore.model import load_model
from logitstore.store import open_store
from tests import oracle
from tests.loss_cases import (
    SHAPES,
    assert_a_masked_row_touches_nothing,
    assert_equals,
    exact,
    on_mlx,
    problem,
    run,
    top_k,
)
from tests.oracle import log_softmax
from tests.runs import World, make_world
from tests.test_fused_head import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    world.build(world.store, select="top-k:24")
    return world


@pytest.mark.parametrize("at", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "k"), [*SHAPES[:-1], (300, 300)])
def test_value_and_gradient_are_those_of_the_formula(vocab: int, k: int, t: float, at: float) -> None:
    z, *rows = problem(2, vocab, k, t)
    assert_equals(TaidLoss(t, interpolation=at), z, rows, lambda z: oracle.taid(z, *rows, t, at))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: mx.Dtype) -> None:
    z, *rows = problem(3, 1000, 12, 2.0)
    assert_equals(TaidLoss(2.0, interpolation=0.3), z, rows, lambda z: oracle.taid(z, *rows, 2.0, 0.3), dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scale_softcap_and_a_padded_head_are_part_of_the_loss(softcap: float | None) -> None:
    z, ids, p, tail, _ = problem(3, 100, 5, 2.0)
    ids[:, 0], ids[:, 1], ids[:, 2] = 89, 90, 10**6  # the last of the vocabulary, the first padding, beyond the head
    ids[:, 3:] %= 80
    rows = (ids, p, tail, np.array([89, 90, 3]))
    loss = TaidLoss(2.0, scale=1.5, softcap=softcap, vocab_size=90, interpolation=0.4)
    z[:, 90:] = np.nan
    assert_equals(loss, z, rows, lambda z: oracle.taid(z, *rows, 2.0, 0.4))
    assert not run(loss, z, rows)[2][:, 90:].any()


@pytest.mark.parametrize("at", [0.0, 0.4, 1.0])
def test_every_extreme_has_the_value_and_gradient_of_the_formula(at: float) -> None:
    z = np.tile(exact(np.random.default_rng(0).normal(0, 2, 5)), (6, 1))
    z[1, 4] = z[2, 1] = -np.inf  # in the tail; one kept token
    z[3, 0] = 60.0  # the tail's q is 1e-26
    ids = np.array([[0, 1, 9]] * 4 + [[0, -1, 9], [0, 0, 0]])
    p = exact(np.array([[0.5, 0.25, 0]] * 4 + [[1.0, 0.5, 0], [0, 0, 0]]))
    rows = (ids, p, exact(np.log([0.25, 0.25, 0.25, 0.25, 1e-30, 1.0])), np.array([0, 1, -100, 2, 0, 4]))
    loss = TaidLoss(interpolation=at)
    if at == 1:  # the truth where q = 0 < p: infinite
        assert np.isposinf(run(loss, z, rows)[0][2])
        z[2] = 0
    assert_equals(loss, z, rows, lambda z: oracle.taid(z, *rows, 1.0, at))


def test_the_oracles_gradient_is_that_of_central_differences_with_the_target_held() -> None:
    z, *rows = problem(2, 7, 3, 2.0)
    places = [(n, v) for n in range(2) for v in range(7)]
    found = oracle.taid(z, *rows, 2.0, 0.4)
    moving = oracle.differences(lambda z: oracle.taid(z, *rows, 2.0, 0.4).kd.sum(), z, places)
    assert not np.allclose(found.d_kd.ravel(), moving, rtol=1e-2)  # else the target would not be detached
    ids, p, tail, labels = rows
    q = np.exp(log_softmax(z / 2.0))
    kept_q = np.take_along_axis(q, ids, -1)
    cells = np.concatenate([kept_q, 1 - kept_q.sum(axis=1, keepdims=True)], axis=1)
    target = cells**0.6 * np.concatenate([p, np.exp(tail)[:, None]], axis=1) ** 0.4
    target /= target.sum(axis=1, keepdims=True)

    def held(z: np.ndarray) -> float:
        return float(oracle.bucket(ForwardKL(), z, ids, target[:, :3], np.log(target[:, 3]), labels, 2.0).kd.sum())

    np.testing.assert_allclose(found.d_kd.ravel(), oracle.differences(held, z, places), rtol=1e-5, atol=1e-9)


def test_at_1_it_is_the_bucket_kl_and_at_0_there_is_nothing_to_learn() -> None:
    z, *rows = problem(3, 1000, 12, 2.0)
    for ours, wanted in zip(run(TaidLoss(2.0), z, rows), run(BucketKL(2.0), z, rows), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    kd, _, dz = run(TaidLoss(2.0, interpolation=0.0), z, rows, np.array([np.ones(3), np.zeros(3)]))
    np.testing.assert_allclose(kd, 0, atol=1e-6)
    np.testing.assert_allclose(dz, 0, atol=1e-6)


def test_with_the_whole_vocabulary_kept_it_is_the_papers_interpolation_of_logits() -> None:
    rng = np.random.default_rng(0)
    z, teacher = exact(rng.normal(0, 2, (2, 3, 300)))
    labels, cts = np.zeros(3, dtype=np.int64), np.array([np.ones(3), np.zeros(3)])
    kd, _, dz = run(TaidLoss(interpolation=0.4), z, (*top_k(teacher, 300, 1.0), labels), cts)
    wanted = run(DenseLoss(), z, (0.6 * z + 0.4 * teacher, labels), cts)
    np.testing.assert_allclose(kd, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(dz, wanted[2], rtol=1e-4, atol=1e-7)


def test_a_masked_row_touches_nothing() -> None:
    z, *rows = problem(3, 300, 5, 2.0)
    assert_a_masked_row_touches_nothing(TaidLoss(2.0, softcap=9.0, vocab_size=290, interpolation=0.4), z, rows)


def test_through_the_fused_head_it_is_the_same_loss() -> None:
    model = tiny()
    model.freeze()
    head, loss = split_head(model), TaidLoss(interpolation=0.4)
    hidden = mx.array(exact(np.random.default_rng(1).normal(0, 1, (40, 32))).astype(np.float32))
    rows, shares = on_mlx(problem(40, 96, 5, 1.0)[1:]), (mx.full(40, 0.7), mx.full(40, 0.3))

    def whole(hidden: mx.array) -> mx.array:
        return sum((w * x).sum() for w, x in zip(shares, loss(head(hidden), *rows), strict=True))

    def fused(hidden: mx.array) -> mx.array:
        return chunked_sum(loss, hidden, head, rows, shares, per_chunk=16)[0]

    for ours, wanted in zip(mx.value_and_grad(fused)(hidden), mx.value_and_grad(whole)(hidden), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [-0.1, 1.1, float("nan")])
def test_an_interpolation_outside_0_to_1_is_refused(at: float) -> None:
    with pytest.raises(ValueError, match="interpolation must lie in"):
        TaidLoss(interpolation=at)


def test_t_follows_the_papers_rule() -> None:
    first = Taid(0.4, 0.4).after(2.0, 1, 1000)
    assert first == Taid(0.4, 0.4, 2.0, 0.0)
    second = first.after(1.0, 2, 1000)
    # d = 1/2, m = 0.005, sigmoid(0.005) = 0.50125, t = 0.4 + 5e-4 * 0.50125 * 0.6; the line is at 0.4012
    assert second.momentum == pytest.approx(0.005) and second.loss == 1.0
    assert second.t == pytest.approx(0.4012)
    ahead = Taid(0.4, 0.9, 1.0, 0.005).after(1.5, 3, 1000)
    # d = -1/2, m = 0.00495 - 0.005 = -0.00005, sigmoid = 0.4999875, t = 0.9 + 5e-4 * 0.4999875 * 0.1
    assert ahead.momentum == pytest.approx(-0.00005)
    assert ahead.t == pytest.approx(0.900024999375, abs=1e-13)


def test_t_rises_to_the_teacher_whatever_the_losses_do() -> None:
    rng, state, seen = np.random.default_rng(0), Taid(0.2, 0.2), []
    for step, loss in enumerate([0.0, -1e-8, *rng.exponential(size=97), 1e30], 1):
        state = state.after(float(loss), step, 100)
        seen.append(state.t)
    assert seen == sorted(seen) and seen[0] == 0.2 and seen[-1] == 1.0


def test_the_term_of_a_sum_moves_and_the_others_stay() -> None:
    loss = WeightedLoss(((0.5, TaidLoss(interpolation=0.2)), (1.0, BucketKL())))
    assert started(loss) == Taid(0.2, 0.2) and started(BucketKL()) is None
    assert interpolated(loss, 0.7) == WeightedLoss(((0.5, TaidLoss(interpolation=0.7)), (1.0, BucketKL())))


@pytest.mark.parametrize("how", ["store", "live"])
def test_a_run_with_taid_ends_at_the_teacher_and_shows_t(tmp_path: Path, world: World, how: str) -> None:
    where: dict[str, Any] = {"store": (str(world.store),)} if how == "store" else {"teacher": str(world.teacher)}
    options = {"fine_tune_type": "full", "learning_rate": 3e-3, "alpha": 1.0, "iters": 40, "select": "top-k:24"}
    _, steps = world.train(tmp_path / "o", loss=("taid",), **options, **where)
    t = [step["taid_t"] for step in steps]
    assert t[:2] == [0.4, 0.4] and t == sorted(t) and t[-1] == pytest.approx(0.4 + 0.6 * 39 / 40, abs=0.02)
    if how == "store":
        kept = open_store(world.store)
        batch = collate(world.sequences(), [kept.get(s.token_ids) for s in world.sequences()], Weighing(1.0, "error"))
        assert batch is not None
        before, after = (
            batch_loss(split_head(load_model(path).model), BucketKL(), batch)[1].item()
            for path in (world.student, tmp_path / "o")
        )
        assert after < 0.5 * before


def test_the_first_step_of_a_run_is_the_loss_at_its_start(tmp_path: Path, world: World) -> None:
    _, (step, *_) = world.train(tmp_path / "o", store=(str(world.store),), loss=("taid:0.3",), batch_size=6)
    kept = open_store(world.store)
    batch = collate(world.sequences(), [kept.get(s.token_ids) for s in world.sequences()], Weighing(0.9, "error"))
    assert batch is not None
    found = batch_loss(split_head(load_model(world.student).model), TaidLoss(interpolation=0.3), batch)
    assert (step["taid_t"], step["kd_loss"]) == (0.3, pytest.approx(found[1].item(), rel=1e-5))


def test_a_sample_cannot_serve_it(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "sample.zarr")
    with pytest.raises(
        IncompatibleStoreError,
        match=r"sample.zarr cannot serve --loss taid: a sample .* `logitstore build --select top-k",
    ):
        world.train(tmp_path / "o", store=(str(tmp_path / "sample.zarr"),), loss=("taid",), student="nowhere")
    with pytest.raises(IncompatibleStoreError, match=r"the teacher cannot .*; type --select top-k:50, or --loss kl"):
        world.train(tmp_path / "o", teacher=str(world.teacher), loss=("taid",))
