"""What a student learns from each way of keeping a teacher: equal steps, equal batches, held-out text.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python tools/bench_quality.py OUT_DIR [--seeds 0,1,2,3,4] [--steps N]
    .venv/bin/python tools/bench_quality.py OUT_DIR --world smollm2 --seeds 0

Distilled students learn from the teacher alone (alpha 1), at temperature 1. `full online` is the KL of the whole
distributions, the teacher asked in every step; `top-k, renormalised` is what many tools train on: the kept entries,
made to sum to 1. A finished run is a line of OUT_DIR/WORLD/runs.jsonl, is not run again, and is shown, so that two
processes may share the seeds. Writes OUT_DIR/bench_quality_WORLD.{txt,json,svg}. Either takes about 40 minutes.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_kernels import BucketKL, DenseLoss, LogitsLoss, SparseKL

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from distill_trainer.batches import Weighing, collate, epochs
from distill_trainer.evaluate import evaluate
from distill_trainer.targets import TargetSource
from distill_trainer.teachers import in_order
from logitstore.build import BuildConfig, build
from logitstore.contract import Store
from logitstore.figure import Figure, Table
from logitstore.forward import document_logits
from logitstore.plots import Axis, Series, chart
from logitstore.sequences import TokenSequence
from logitstore.store import open_store
from logitstore.teacher import Teacher
from tools.bench_layouts import file_bytes
from tools.bench_parts import Found, Target, Titled, mean_and_error
from tools.bench_store import target_table
from tools.quality_world import World, small_world, smollm2_world

WORLDS: dict[str, tuple[Callable[[Path, int], World], int]] = {
    "small": (small_world, 200),
    "smollm2": (smollm2_world, 30),
}
"""Each with its usual number of steps."""
WITHIN_NATS = 0.01
DIGITS = 4
"""Of figures."""
FIGURES = ("kl", "ce", "agreement", "ece")


@dataclass(frozen=True)
class Method:
    """A way to learn."""

    name: str
    loss: LogitsLoss
    select: str | None = None
    """What is kept of the teacher; None: nothing, or all."""
    renormalised: bool = False


CROSS_ENTROPY = "cross-entropy"
METHODS = (
    Method(CROSS_ENTROPY, SparseKL()),
    Method("top-12, renormalised", SparseKL(), "top-k:12", renormalised=True),
    Method("top-12, tail bucket", BucketKL(), "top-k:12"),
    Method("random:50", SparseKL(), "random:50"),
    Method("threshold:12", SparseKL(), "threshold:12"),
    Method("threshold:16", SparseKL(), "threshold:16"),
    Method("full online", DenseLoss()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="small")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="separated by commas")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 2:
        parser.error(f"--steps is {arguments.steps}, expected at least 2: one to warm up")
    make, steps = WORLDS[arguments.world]
    world = make(arguments.out, arguments.steps or steps)

    teacher = Teacher(str(world.teacher), quiet=True)
    stores = {select: _store(world, arguments.out, select) for select in {m.select for m in METHODS} - {None}}
    runs = arguments.out / world.name / "runs.jsonl"
    done = read_runs(runs)
    for seed in map(int, arguments.seeds.split(",")):
        for method in METHODS:
            if any((run["method"], run["seed"], run["steps"]) == (method.name, seed, world.steps) for run in done):
                continue
            store = stores.get(method.select or "")
            figures = learn(world, teacher, method, store, seed)
            done.append({"method": method.name, "seed": seed, "steps": world.steps, **figures})
            with runs.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    done = sorted((run for run in read_runs(runs) if run["steps"] == world.steps), key=lambda run: run["seed"])
    sizes = {m.name: file_bytes(Path(stores[m.select].path)) / stores[m.select].positions for m in METHODS if m.select}
    show(found(world, done, sizes), arguments.out, world, done, sizes)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that are finished."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learn(world: World, teacher: Teacher, method: Method, store: Store | None, seed: int) -> dict[str, float]:
    """Train a student, and hold it against its teacher on the held-out text."""
    student = world.student(seed)
    source = None if store is None else TargetSource(in_order([store]), store.manifest.recipe, "error")
    optimizer = world.optimizer()

    def loss(tokens: mx.array, rows: mx.array, *constants: mx.array) -> mx.array:
        logits = student.model(tokens)
        kd, ce = method.loss(logits.reshape(-1, logits.shape[-1])[rows], *constants)
        return (ce if method.name == CROSS_ENTROPY else kd).mean()

    step = nn.value_and_grad(student.model, loss)
    order = epochs([len(s.trained) for s in world.train], world.batch_size, seed)
    for _ in tqdm(range(world.steps), desc=f"{method.name}, seed {seed}", unit="step", leave=False):
        epoch, numbers = next(order)
        chosen = [world.train[i] for i in numbers]
        answers = source.answer(chosen, epoch)[0] if source else [None] * len(chosen)
        batch = collate(chosen, answers, Weighing(1.0, "hard-only"))
        assert batch is not None
        weights = batch.weights / batch.weights.sum(axis=-1, keepdims=True) if method.renormalised else batch.weights
        kept = {"ids": batch.ids, "weights": weights, "log_tail_mass": batch.log_tail_mass, "labels": batch.labels}
        constants = (
            [all_logits(teacher, chosen), batch.labels]
            if isinstance(method.loss, DenseLoss)
            else [kept[name] for name in method.loss.names]
        )
        _, gradients = step(batch.tokens, batch.rows, *constants)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(student.model, gradients)
        mx.eval(student.model.parameters(), optimizer.state)
    result = evaluate({"student": student}, teacher, world.held_out, quiet=True)["student"]
    return {"kl": result.kl, "ce": math.log(result.perplexity), "agreement": result.agreement, "ece": result.ece}


def all_logits(teacher: Teacher, chosen: Sequence[TokenSequence]) -> mx.array:
    """The teacher's whole logits at the trained positions of some documents, [N, V]."""
    parts = document_logits(teacher.head, [s.token_ids for s in chosen])
    rows = [
        mx.concatenate(list(every))[mx.array(np.flatnonzero(s.trained))] for s, every in zip(chosen, parts, strict=True)
    ]
    return mx.concatenate(rows)


def _store(world: World, out: Path, select: str) -> Store:
    path = out / world.name / f"{select.replace(':', '-')}.zarr"
    build(BuildConfig(str(world.teacher), str(world.data), path, select=select, max_seq_length=512))
    return open_store(path)


def found(world: World, runs: Sequence[dict[str, Any]], sizes: dict[str, float]) -> Found:
    """The table, the plot and what must be reached."""
    values = {
        m.name: np.array([[run[name] for name in FIGURES] for run in runs if run["method"] == m.name]) for m in METHODS
    }
    full, ce = values["full online"][:, 0], values[CROSS_ENTROPY][:, 0]
    rows = []
    for name, found in values.items():
        size = f"{sizes[name]:.1f}" if name in sizes else "-"
        rows.append(
            (
                name,
                size,
                *(mean_and_error(figure, DIGITS) for figure in found.T),
                mean_and_error(found[:, 0] - full, DIGITS, signed=True),
            )
        )
    header = ("method", "bytes/token", "KL", "CE", "agreement", "ECE", "KL above full online")
    positions = sum(int(s.trained.sum()) for s in world.held_out)
    remark = (
        f"{world.name}: {world.steps} steps of {world.batch_size} documents, {len(full)} seeds; held out: "
        f"{len(world.held_out)} documents, {positions:,} positions. KL(teacher || student) and cross-entropy in nats a "
        "position; mean and its standard error over seeds; the last column: mean of differences between students of "
        "the same seed, which saw the same batches."
    )
    threshold = values["threshold:16"][:, 0]
    targets = (
        Target.at_most(
            "threshold:16, KL above full online, nats", WITHIN_NATS, float((threshold - full).mean()), ".4f"
        ),
        Target.at_least("cross-entropy's KL above threshold:16's, nats", 0, float((ce - threshold).mean()), ".4f"),
    )
    return Found([Titled("What students learn", remark, Table(header, tuple(rows)))], targets, [figure(values, sizes)])


def figure(values: dict[str, Any], sizes: dict[str, float]) -> Figure:
    """Bytes a token against held-out KL; what has no store stands as a line."""
    means = {name: float(found[:, 0].mean()) for name, found in values.items()}
    stored = [name for name in values if name in sizes]
    ends = min(sizes.values()), max(sizes.values())
    lines = [
        Series(name, [(size, means[name]) for size in ends], guide=True) for name in (CROSS_ENTROPY, "full online")
    ]
    return chart(
        [Series("from a store", [(sizes[name], means[name]) for name in stored], stored, joined=False), *lines],
        "Bytes per token against held-out KL",
        Axis("bytes per token"),
        Axis("KL(teacher || student), nats"),
    )


def show(found: Found, out: Path, world: World, runs: Sequence[dict[str, Any]], sizes: dict[str, float]) -> None:
    """Print and write everything."""
    text = "\n".join([*(table.text() for table in found.tables), target_table(list(found.targets)).text()])
    print(text)
    name = f"bench_quality_{world.name}"
    (out / f"{name}.txt").write_text(text, encoding="utf-8")
    (out / f"{name}.svg").write_text(found.figures[0].document(), encoding="utf-8")
    (out / f"{name}.json").write_text(
        json.dumps({"steps": world.steps, "bytes_per_token": sizes, "runs": list(runs)}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
