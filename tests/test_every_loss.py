"""Each loss that can be asked for: its gradient through a whole student, and that students learn by it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import JSD, TVD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from distill_trainer.batches import Weighing, collate
from distill_trainer.losses import NAMES
from distill_trainer.objective import Objective
from distill_trainer.train import batch_loss
from logitstore.model import load_model
from logitstore.store import open_store
from tests import oracle
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CORPUS

TRAINED, HELD_OUT = CORPUS[:4], CORPUS[4:]


@dataclass(frozen=True)
class Case:
    """A loss, what serves it, and its float64 formula of (logits, ids, weights, log tail or log-probs, labels)."""

    name: str
    store: str
    formula: Callable[..., oracle.Losses]

    def oracle(self, z: oracle.Floats, batch: Any) -> oracle.Losses:
        rows = {name: np.array(getattr(batch, name), np.float64) for name in ("weights", "log_tail_mass", "log_probs")}
        ids, labels = (np.array(getattr(batch, name), np.int64) for name in ("ids", "labels"))
        given: dict[str, Any] = {"ids": ids, "labels": labels, "t": 1.0}
        if self.store == "top-k:50":
            given |= {"p": rows["weights"]}
            if self.name not in ("hinge-rank", "logistic-rank"):
                given |= {"log_tail": rows["log_tail_mass"]}
        elif self.name in ("kl", "soft-ce"):
            given |= {"weights": rows["weights"]}
        else:
            given |= {"w": rows["weights"], "log_p": rows["log_probs"]}
        return self.formula(z=z, **given)


KINDS = {
    "reverse-kl": ReverseKL(), "jsd": JSD(), "skew-kl": SkewKL(), "skew-reverse-kl": SkewReverseKL(), "tvd": TVD(),
}  # fmt: skip
CASES = [
    Case("kl", "threshold:16", oracle.sparse),
    Case("soft-ce", "threshold:16", partial(oracle.sparse, less_entropy=False)),
    Case("kl", "top-k:50", partial(oracle.bucket, ForwardKL())),
    Case("taid", "top-k:50", partial(oracle.taid, at=0.4)),
    Case("hinge-rank", "top-k:50", oracle.hinge),
    Case("logistic-rank", "top-k:50", oracle.logistic),
    *(Case(name, "top-k:50", partial(oracle.bucket, kind)) for name, kind in KINDS.items()),
    *(Case(name, "threshold:16", partial(oracle.sampled, kind)) for name, kind in KINDS.items()),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    world.build(world.folder / "threshold-16", select="threshold:16", tail_log_probs=True)
    world.build(world.folder / "top-k-50", select="top-k:50")
    write_jsonl(world.folder / "train.jsonl", [{"text": text} for text in TRAINED])
    write_jsonl(world.folder / "valid.jsonl", [{"text": text} for text in HELD_OUT])
    return world


def _norm(tree: Any) -> mx.array:
    return mx.sqrt(mx.stack([mx.square(leaf).sum() for _, leaf in tree_flatten(tree)]).sum())


def test_no_loss_is_left_out() -> None:
    assert {case.name for case in CASES} == set(NAMES)


@pytest.mark.parametrize(
    "case",
    # From a sample these two leave out a part of their own value's gradient, whose mean is 0: `sampled_loss_ce`.
    [case for case in CASES if case.store == "top-k:50" or case.name not in ("reverse-kl", "skew-reverse-kl")],
    ids=lambda case: f"{case.name} {case.store}",
)
def test_a_gradient_through_the_whole_student_is_that_of_differences_in_float64(world: World, case: Case) -> None:
    """Along the gradient and as much noise, in all weights at once: model and formula in float64."""
    store = open_store(world.folder / case.store.replace(":", "-"))
    sequences = world.sequences()[:2]
    batch = collate(sequences, [store.get(s.token_ids) for s in sequences], Weighing(1.0, "error"))
    assert batch is not None
    student = load_model(world.student)
    student.model.unfreeze()
    head = distill_kernels.split_head(student.model)
    config = world.config(world.folder / "none", store=(str(store.path),), loss=(case.name,))
    loss = Objective(config, store.manifest.recipe, str(store.path)).at(1)
    _, gradient = nn.value_and_grad(student.model, lambda batch: batch_loss(head, loss, batch)[0])(batch)
    rng = np.random.default_rng(0)
    noise = tree_map(lambda g: mx.array(rng.normal(0, 1, g.shape).astype(np.float32)), gradient)
    direction = tree_map(lambda g, n: g / _norm(gradient) + n / _norm(noise), gradient, noise)
    found = sum(
        (np.array(g, np.float64) * np.array(d, np.float64)).sum()
        for (_, g), (_, d) in zip(tree_flatten(gradient), tree_flatten(direction), strict=True)
    )

    weights = dict(tree_flatten(student.model.parameters()))
    moves = dict(tree_flatten(direction))

    def logits(step: float) -> oracle.Floats:
        moved = [(name, p.astype(mx.float64) + step * moves[name].astype(mx.float64)) for name, p in weights.items()]
        student.model.update(tree_unflatten(moved))
        z = student.model(batch.tokens)
        return np.array(z.reshape(-1, z.shape[-1])[batch.rows], np.float64)

    with mx.stream(mx.cpu):
        step = 1e-4
        before, there, after = logits(-step), logits(0.0), logits(step)
    if case.name == "taid":  # its target is a constant, which differences of values would move
        expected = (case.oracle(there, batch).d_kd * (after - before) / (2 * step)).sum(axis=1).mean()
    else:
        values = [case.oracle(z, batch).kd.mean() for z in (after, before)]
        expected = (values[0] - values[1]) / (2 * step)
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)


LEARNT = [
    (case, live)
    for case in CASES
    for live in (False, True)
    if not (live and case.store == "threshold:16" and case.name in KINDS)  # a live teacher keeps no tail log-probs
]


@pytest.mark.parametrize(("case", "live"), LEARNT, ids=[f"{c.name} {c.store} {'live' if v else ''}" for c, v in LEARNT])
def test_students_learn_by_it_what_they_have_not_seen(world: World, tmp_path: Path, case: Case, live: bool) -> None:
    store = str(world.folder / case.store.replace(":", "-"))
    source = {"teacher": str(world.teacher), "select": case.store} if live else {"store": (store,)}
    learning = {"alpha": 1.0, "loss": (case.name,), "fine_tune_type": "full", "learning_rate": 2e-3, "iters": 10}
    shown = {"dataset": str(world.folder), "valid_split": "valid", "steps_per_eval": 1}
    _, lines = world.train(tmp_path / "o", **learning, **shown, **source)
    assert lines[-1]["valid_kd_loss"] < lines[0]["valid_kd_loss"]
