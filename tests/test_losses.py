"""`--loss`: what it takes, what it refuses, and what comes of it."""

from pathlib import Path
from typing import Any

from distill_kernels import (
    TVD,
    BucketLoss,
    HingeRank,
    LogitsLoss,
    ReverseKL,
    SampledLoss,
    SoftCE,
    SparseKL,
    TaidLoss,
    WeightedLoss,
)

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.losses import LIVE, NAMES, Term, loss_of
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.recipe import SUMMED, Recipe
from logitstore.selection import Selection
from tests import oracle
from tests.loss_cases import on_mlx, problem, run
from tests.runs import World, make_world


def recipe(select: str, **options: Any) -> Recipe:
    return Recipe(Selection.parse(select), (1.0,), seed=0, vocab_size=384, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("kl", Term("kl")),
        ("kl=0.7", Term("kl", None, 0.7)),
        ("jsd:0.3", Term("jsd", 0.3)),
        ("skew-kl:.2=2", Term("skew-kl", 0.2, 2.0)),
        ("taid:0.2", Term("taid", 0.2)),
        ("hinge-rank:-1", Term("hinge-rank", -1.0)),
    ],
)
def test_a_loss_is_a_name_a_number_and_a_weight(text: str, term: Term) -> None:
    assert Term.parse(text) == term


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reverse_kl", r"names no loss; did you mean reverse-kl\? type --loss kl\|reverse-kl"),
        ("", "names no loss; type --loss kl"),
        ("kl:2", "gives kl a number, and it has none; type --loss kl$"),
        ("jsd:x", "'x' is no number; type --loss NAME"),
        ("jsd:1", "has beta 1, expected a number between 0 and 1; type --loss jsd:0.5"),
        ("taid:1", "has t_start 1, expected a number between 0 and 1; type --loss taid:0.5"),
        ("kl=0", "weighs 0, expected a number above 0; type --loss kl=1"),
        ("jsd:0.3=nan", "weighs nan, expected a number above 0; type --loss jsd:0.3=1"),
        ("kl=", "'' is no number"),
    ],
)
def test_a_loss_that_is_none_says_what_to_type(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Term.parse(text)


@pytest.mark.parametrize(
    ("select", "options", "kinds"),
    [
        ("threshold:16", {}, {"kl": SparseKL, "soft-ce": SoftCE}),
        ("random:50", {}, {"kl": SparseKL, "soft-ce": SoftCE}),
        (
            "threshold:16",
            {"tail_log_probs": True},
            {"kl": SparseKL, "soft-ce": SoftCE, **dict.fromkeys(SUMMED, SampledLoss)},
        ),
        (
            "top-k:50",
            {},
            {"kl": BucketLoss, "taid": TaidLoss, "hinge-rank": HingeRank, **dict.fromkeys(SUMMED, BucketLoss)},
        ),
    ],
)
def test_a_store_serves_what_its_manifest_says_and_refuses_the_rest_with_the_flag(
    select: str, options: dict[str, Any], kinds: dict[str, type[LogitsLoss]]
) -> None:
    kept = recipe(select, **options)
    served = {*kept.serves["losses"], *(() if kept.selection.unbiased else ("taid", "hinge-rank", "logistic-rank"))}
    for name in NAMES:
        if name in served:
            loss = loss_of([name], kept, 2.0, "s.zarr")
            assert isinstance(loss, kinds.get(name, LogitsLoss)) and loss.temperature == 2
        else:
            with pytest.raises(
                IncompatibleStoreError, match=f"s.zarr cannot serve --loss {name}: .*`logitstore build --"
            ):
                loss_of([name], kept, 2.0, "s.zarr")


def test_a_truncated_teacher_that_is_nearly_certain_teaches_by_reverse_kl() -> None:
    """Its tail of 1e-9 is kept as none, which the student's would be held against as infinitely too much."""
    z, ids, _, _, labels = problem(2, 100, 5, 1.0)
    p = np.array([[1 - 1e-9, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0]])
    kept = recipe("top-k:5")
    wanted = oracle.bucket(ReverseKL(), z, ids, p, np.full(2, -254 / 16), labels, 1.0)
    for terms in (["reverse-kl"], ["reverse-kl", "kl=1e-9"]):
        loss = loss_of(terms, kept, 1.0, "s.zarr")
        kd, _, dz = run(loss, z, (ids, p, np.full(2, -np.inf), labels), np.array([np.ones(2), np.zeros(2)]))
        np.testing.assert_allclose(kd, wanted.kd, rtol=2e-5)
        np.testing.assert_allclose(dz, wanted.d_kd, rtol=2e-5, atol=2e-6)


def test_several_losses_are_their_weighted_sum_and_one_cross_entropy() -> None:
    z, ids, p, log_tail, labels = problem(3, 100, 5, 1.0)
    loss = loss_of(["kl=0.5", "tvd=2", "logistic-rank"], recipe("top-k:5"), 1.0, "s.zarr")
    assert isinstance(loss, WeightedLoss) and loss.names == ("ids", "weights", "log_tail_mass", "labels")
    logits, rows = mx.array(z.astype(np.float32)), on_mlx([ids, p, log_tail, labels])
    apart = [(0.5, BucketLoss()), (2.0, BucketLoss(divergence=TVD())), (1.0, loss.terms[2][1])]
    found = mx.vjp(lambda z: list(loss(z, *rows)), [logits], [mx.ones(3), mx.full(3, 3.0)])
    kd, d_kd, ce, d_ce = mx.zeros(3), mx.zeros_like(logits), mx.zeros(3), mx.zeros_like(logits)
    for weight, term in apart:
        own = [row for name, row in zip(loss.names, rows, strict=True) if name in term.names]
        (value, ce), (dz,) = mx.vjp(lambda z, t=term, o=own: list(t(z, *o)), [logits], [mx.ones(3), mx.zeros(3)])
        d_ce = mx.vjp(lambda z, t=term, o=own: list(t(z, *o)), [logits], [mx.zeros(3), mx.ones(3)])[1][0]
        kd, d_kd = kd + weight * value, d_kd + weight * dz
    for ours, wanted in zip((*found[0], *found[1]), (kd, ce, d_kd + 3 * d_ce), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "taid"])  # its target moves away: test_taid.py
def test_every_loss_teaches_a_student(tmp_path: Path, world: World, name: str) -> None:
    kept = {"select": "threshold:16", "tail_log_probs": True} if name == "soft-ce" else {"select": "top-k:24"}
    world.build(tmp_path / "s.zarr", **kept)
    options = {"fine_tune_type": "full", "learning_rate": 3e-3, "alpha": 1.0, "iters": 40, "loss": (name,)}
    _, steps = world.train(tmp_path / "o", store=(str(tmp_path / "s.zarr"),), **options)
    first, last = (np.mean([s["kd_loss"] for s in part]) for part in (steps[:5], steps[-5:]))
    assert last < (0.9 if name in ("soft-ce", "logistic-rank", "tvd") else 0.7) * first


@pytest.mark.parametrize("name", ["reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "tvd"])
def test_a_sample_with_its_own_probabilities_teaches_too(tmp_path: Path, world: World, name: str) -> None:
    world.build(tmp_path / "s.zarr", tail_log_probs=True)
    options = {"fine_tune_type": "full", "learning_rate": 1e-3, "alpha": 1.0, "iters": 40, "loss": (name,)}
    _, steps = world.train(tmp_path / "o", store=(str(tmp_path / "s.zarr"),), **options)
    assert np.mean([s["kd_loss"] for s in steps[-5:]]) < 0.8 * np.mean([s["kd_loss"] for s in steps[:5]])


def test_a_live_teacher_is_told_to_select_what_the_loss_needs() -> None:
    recipe = Recipe(Selection.parse("threshold:16"), (1.0,), 0, 50)
    with pytest.raises(IncompatibleStoreError, match="type --select top-k:50, or --loss kl"):
        loss_of(["reverse-kl"], recipe, 1.0, LIVE)


def test_a_store_that_cannot_serve_the_loss_is_refused_before_the_student_is_loaded(
    tmp_path: Path, world: World
) -> None:
    with pytest.raises(IncompatibleStoreError, match=r"store.zarr cannot serve --loss tvd: .*--tail-log-probs"):
        world.train(tmp_path / "o", store=(str(world.store),), loss=("tvd",), student="nowhere")
    assert not (tmp_path / "o").exists()
