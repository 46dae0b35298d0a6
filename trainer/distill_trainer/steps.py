"""The steps of a run: batches, targets, loss, gradient, metrics, checkpoint. Reads from top to bottom."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import distill_kernels

import mlx.core as mx
import mlx.optimizers as optim
from tqdm import tqdm

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Weighing, collate, epochs
from distill_trainer.checkpoint import Checkpoints
from distill_trainer.config import TrainConfig
from distill_trainer.draw import Draw
from distill_trainer.gradients import clipped, value_and_gradient
from distill_trainer.held_out import due, hold_out
from distill_trainer.interrupts import uninterrupted
from distill_trainer.method import Method, learner, reported, with_methods, with_teacher
from distill_trainer.objective import Objective
from distill_trainer.on_policy import OnPolicy, weighing_of
from distill_trainer.output import append_metrics
from distill_trainer.parallel import ALONE, Processes
from distill_trainer.report import TrainReport
from distill_trainer.student import trainable
from distill_trainer.targets import Count, TargetSource
from logitstore.errors import ModelError
from logitstore.prefetch import prefetched
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets

AHEAD = 2
"""Batches whose targets are read while a step is computed."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What the steps of a run are made of, as `train` has put it together."""

    config: TrainConfig
    head: distill_kernels.Head
    optimizer: optim.Optimizer
    objective: Objective
    sequences: Sequence[TokenSequence]
    draw: Draw | None = None
    held_out: Sequence[TokenSequence] = ()
    source: TargetSource | None = None
    own: OnPolicy | None = None
    """Lets the student, as it is by then, complete some of the documents."""
    methods: Sequence[Method] = ()
    among: Processes = ALONE


def run_steps(
    parts: Parts, checkpoints: Checkpoints, report: TrainReport, track: Callable[[Mapping[str, Any]], None]
) -> None:
    """The loop: batches, targets, loss, step, metrics, checkpoint. `report` says where it begins, and is kept up."""
    config, head, objective, source, methods = parts.config, parts.head, parts.objective, parts.source, parts.methods
    optimizer, among = parts.optimizer, parts.among
    model = learner(head.model, methods)
    on_miss = "hard-only" if source is None else source.on_miss
    # before a second thread reads the stores; one process measures, and the others wait for it in their next step
    watched = hold_out(config, parts.held_out, source, objective) if among.first else None
    answers = answered_batches(parts, skip=report.steps * config.grad_accumulation_steps)
    asks = source is not None and source.asks
    if not asks:  # else two threads would share the GPU
        left = (config.iters - report.steps) * config.grad_accumulation_steps  # nobody is asked for what is not used
        answers = prefetched(islice(answers, left), AHEAD)
    step = value_and_gradient(
        model, lambda losses, batch: with_methods(partial(batch_loss, head, losses), methods, batch)
    )
    longest = config.max_seq_length if config.pack else None
    bar = tqdm(total=config.iters, initial=report.steps, desc="train", unit="step", disable=config.quiet)

    with closing(answers), bar:
        while report.steps < config.iters:
            started = time.perf_counter()
            answered = [next(answers) for _ in range(config.grad_accumulation_steps)]
            with uninterrupted():
                among.go_on()
                among.seed(config.seed, report.steps + 1)
                alpha = config.alpha_schedule.at(report.steps + 1, config.iters)
                weighing = Weighing(alpha, on_miss, config.entropy_weight)
                collated = [
                    with_teacher(collate(chosen, targets, weighing_of(weighing, each), longest), methods, targets)
                    for chosen, targets, each in answered
                    if chosen
                ]
                batches = [batch for batch in collated if batch is not None]
                count = sum((each for _, _, each in answered), start=Count())
                met = sum(cast(int, batch.taught.item()) for batch in batches) if objective.crosses and alpha else 0
                count, (n, met) = among.total(count, sum(len(batch.rows) for batch in batches), met)
                by_teacher = (count.misses - count.unasked - count.failed - count.by_service) * asks
                answered_rows = count.hits + count.by_service + by_teacher
                taught = alpha > 0 and (met if objective.crosses else answered_rows) > 0
                loss, kd_loss, ce_loss, norm = None, None, None, None
                terms: list[float] = []
                if n:
                    losses = partial(step, objective.at(report.steps + 1))
                    means, gradients = among.mean_gradient(losses, batches, model, len(methods))
                    gradients, unclipped = clipped(gradients, config.max_grad_norm)
                    optimizer.update(model, gradients)
                    mx.eval(trainable(model), optimizer.state, means)
                    loss, kd_loss, ce_loss, *terms = (cast(float, mean.item()) for mean in means)
                    norm = None if unclipped is None else cast(float, unclipped.item())
                    documents = [sequence for chosen, _, _ in answered for sequence in chosen]
                    require_finite("loss", loss, report.steps + 1, documents, config)
                    require_finite("gradient's norm", norm, report.steps + 1, documents, config)
                elapsed_s = time.perf_counter() - started

                report.steps += 1
                report.trained_tokens += n
                report.elapsed_s += elapsed_s
                report.count += count
                report.final = {
                    "step": report.steps,
                    "loss": loss,
                    "kd_loss": kd_loss if taught else None,
                    "ce_loss": ce_loss,
                    "hits": count.hits,
                    "misses": count.misses,
                    **({"failed": count.failed} if asks else {}),
                    **({"by_service": count.by_service} if source is not None and source.asks_services else {}),
                    **({"on_policy": count.on_policy, "generated": count.generated} if parts.own else {}),
                    **({"unasked": count.unasked} if config.max_teacher_length else {}),
                    **({"taught": met} if objective.crosses else {}),
                    "trained_tokens": n,
                    "alpha": alpha,
                    "learning_rate": optimizer.learning_rate.item() if config.lr_schedule else config.learning_rate,
                    "grad_norm": norm,
                    "tokens_per_second": n / elapsed_s,
                    "peak_memory_gb": mx.get_peak_memory() / 1e9,
                    **objective.shown(report.steps),
                    **reported(methods, batches, terms),
                }
                objective.learned(report.steps, report.final["kd_loss"])
                if watched is not None and due(config, report.steps):
                    report.valid = watched.measure(head)
                    report.final |= report.valid
                if among.first:
                    append_metrics(Path(config.out), report.final)
                track(report.final)
                shown = {"loss": loss, "valid": report.valid.get("valid_loss")} if watched else {"loss": loss}
                bar.set_postfix({k: "-" if v is None else f"{v:.3f}" for k, v in shown.items()}, refresh=False)
                bar.update()
                if among.first:
                    checkpoints.after(report)


def answered_batches(
    parts: Parts, skip: int = 0
) -> Generator[tuple[list[TokenSequence], list[SparseTargets | None], Count]]:
    """Endless batches of documents, this process's share of each, and their targets.

    Each epoch reads the next of several stored draws.

    Args:
        skip: batches that have been taken already.
    """
    config, source, among = parts.config, parts.source, parts.among
    order = epochs([len(s.trained) for s in parts.sequences], config.batch_size, config.seed, parts.draw)
    for number, (epoch, numbers) in enumerate(islice(order, skip, None), skip):
        temperature = parts.objective.temperature(number // config.grad_accumulation_steps + 1)
        documents = [parts.sequences[i] for i in numbers]
        chosen, generated = list(among.share(documents)), Count()
        if parts.own is not None:
            chosen, generated = parts.own.batch(documents, number, among)
        nothing: list[SparseTargets | None] = [None] * len(chosen)
        targets, count = source.answer(chosen, epoch, temperature) if source else (nothing, Count())
        yield chosen, targets, count + generated


def require_finite(
    what: str, value: float | None, step: int, documents: Sequence[TokenSequence], config: TrainConfig
) -> None:
    """Check a number of a step.

    Raises:
        ModelError: it is none; with the documents of the step.
    """
    if value is not None and not math.isfinite(value):
        where = ", ".join(sequence.where for sequence in documents)
        raise ModelError(f"the {what} of step {step} is {value} on {where}, expected a number; {config.slower}")
