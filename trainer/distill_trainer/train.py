"""Train a student: documents and targets in, an mlx-lm model or adapter out. Reads from top to bottom."""

import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import distill_kernels
from distill_kernels import on_tier

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

from distill_trainer.batches import Batch, Weighing, collate, epochs
from distill_trainer.checkpoint import Checkpoints, cut_metrics
from distill_trainer.choosing import choose
from distill_trainer.config import TrainConfig
from distill_trainer.cross_vocab import crossing_of
from distill_trainer.draw import Draw
from distill_trainer.gradients import clipped
from distill_trainer.held_out import due, hold_out, read_held_out
from distill_trainer.interrupts import uninterrupted
from distill_trainer.live_teacher import DONE, SILENT
from distill_trainer.loss_values import loss_values, outputs
from distill_trainer.losses import AnyLoss
from distill_trainer.method import Method, learner, reported, save_own, with_methods, with_teacher
from distill_trainer.methods import methods_of
from distill_trainer.objective import Objective
from distill_trainer.on_policy import OnPolicy, on_policy, weighing_of
from distill_trainer.optimizer import make_optimizer
from distill_trainer.output import (
    CONFIG,
    SUMMARY,
    append_metrics,
    output_folder,
    require_new,
    require_room,
    require_run,
    writing,
)
from distill_trainer.packing import padding, require_apart
from distill_trainer.pages import save_run_page
from distill_trainer.parallel import ALONE, Processes, processes
from distill_trainer.report import TrainReport
from distill_trainer.spans import OfSpans
from distill_trainer.student import load_student, make_trainable, save_student, trainable
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.targets import Count, TargetSource
from distill_trainer.trackers import tracked
from distill_trainer.two_prompts import read_both
from distill_trainer.weights import weighted
from logitstore.errors import MissingTargetsError, ModelError, ProcessLostError, StoreError, TeacherLostError
from logitstore.model import LoadedModel
from logitstore.prefetch import prefetched
from logitstore.sequences import TokenizeReport, TokenSequence, require_ids_below
from logitstore.targets import SparseTargets

AHEAD = 2
"""Batches whose targets are read while a step is computed."""
PROBED = 1000
"""Batches whose padding is counted before the first step."""


def train(config: TrainConfig, say: Callable[[str], object] = lambda _: None) -> TrainReport:
    """Train a student and save it to `config.out`.

    After the first step, Ctrl-C, a store that fails, a teacher that is lost or a miss ends the run early, and what was
    learned and a checkpoint are saved; before it, nothing is left behind. With `config.resume` a run goes on from its
    last checkpoint as if it had never stopped. Among several processes, the first alone speaks and writes.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`.
    """
    among = processes()
    among.require_shares(config)
    if config.resume or among.first:
        (require_run if config.resume else require_new)(Path(config.out))
    if not among.first:
        config, say = replace(config, quiet=True, report_to=()), lambda _: None
    say = _between_bars(say)
    teachers = open_stores(config, say)
    student = load_student(config)
    report = TokenizeReport()
    sequences = read_both(config, config.dataset, config.split, config.columns, student.tokenizer, report)
    say(report.describe("--max-seq-length"))
    sequences = weighted(sequences, config, student.tokenizer, say)
    config.combination.say(teachers, sequences, say)
    vocab_size = student.model(mx.array([[0]])).shape[-1]
    crossing = crossing_of(config, teachers, student, vocab_size, sequences, say)
    sequences, draw = choose(config, teachers, sequences, say)
    held_out = read_held_out(config, student.tokenizer, sequences, say)
    require_ids_below(vocab_size, [*sequences, *held_out], f"student {student.name}")
    if crossing is not None:
        teachers = crossing.teachers
        sequences, held_out = crossing.over(sequences, say), crossing.over_held_out(held_out, say)

    folder = output_folder(Path(config.out), new=not config.resume) if among.first else nullcontext(Path(config.out))
    with folder as out:
        crosses = crossing is not None
        asked = target_source(config, teachers, student.tokenizer, say, crosses=crosses)
        with asked if config.distils else nullcontext() as source:
            if source is not None:
                if not crosses:
                    require_ids_below(source.recipe.vocab_size, [*sequences, *held_out], "the teacher")
                say_coverage(source, sequences, config, say)
            methods = methods_of(config, student, source, say)
            make_trainable(student, config, write_base=among.first)
            own = on_policy(config, student, sequences, source, say)
            if config.pack:
                require_apart(student.model, student.name)
                say_padding(config, sequences, draw, among, say)
            parameters = trainable(learner(student.model, methods)).values()
            result_bytes = sum(parameter.nbytes for parameter in parameters)
            # three checkpoints for a moment, each with an optimizer's two moments; two are there when a run goes on
            checkpoints_bytes = (3 if config.resume else 9) * result_bytes if config.save_every else 0
            if among.first:
                require_room(out, result_bytes + checkpoints_bytes)
            optimizer = make_optimizer(
                config.optimizer, config.optimizer_config, config.learning_rate, config.lr_schedule
            )
            run, failure = TrainReport(), None
            run.across = None if crossing is None else {"method": crossing.method, "teaches": crossing.teaches}
            objective = Objective(config, None if source is None else source.recipe, crossing=crossing)
            stores = teachers.stores
            checkpoints = Checkpoints(config, student, optimizer, objective, stores, sequences, held_out, methods)
            if config.resume:
                checkpoints.restore(run)
                say(f"going on after step {run.steps:,}")
            if among.first:
                with writing(out):
                    (out / CONFIG).write_text(json.dumps(replace(config, resume=False).to_json(), indent=1) + "\n")
                cut_metrics(out, run.steps)
            if among.size > 1:
                say(f"{among.size} processes share each batch of {config.batch_size:,} documents")
            say(f"training {sum(parameter.size for parameter in parameters):,} parameters for {config.iters:,} steps")
            head = distill_kernels.split_head(student.model)
            if head.reason:
                say(f"every step holds whole logits, because the LM head cannot be taken apart: {head.reason}")
            try:
                parts = Parts(
                    config, head, optimizer, objective, sequences, draw, tuple(held_out), source, own, methods, among
                )
                tracking = tracked(config.report_to, config.project_name, out, config.to_json(), run.steps, say)
                with among.together(), tracking as track:
                    run_steps(parts, checkpoints, run, track)
            except (KeyboardInterrupt, MissingTargetsError, StoreError, TeacherLostError, ProcessLostError) as error:
                if not run.steps:
                    raise
                run.interrupted, failure = True, error
        with uninterrupted(last=True):
            if among.first:
                save_run(config, student, methods, checkpoints, run)
        if among.first:
            shown, samples = held_out or sequences, 0 if run.interrupted else config.report_samples
            save_run_page(config, student, shown, say, samples)
        if not isinstance(failure, ProcessLostError):  # a ring that has lost one never answers again
            among.wait()
    if isinstance(failure, ProcessLostError) and not among.first:
        raise failure
    if isinstance(failure, MissingTargetsError | StoreError | TeacherLostError | ProcessLostError):
        resumes = isinstance(failure, TeacherLostError | MissingTargetsError)
        go_on = "; --resume goes on from there" if resumes else ""
        raise type(failure)(f"{failure}; what was learned in {run.steps:,} steps is saved in {out}{go_on}") from failure
    return run


def _between_bars(say: Callable[[str], object]) -> Callable[[str], object]:
    """Lines that do not run into a progress bar, which is drawn again below them."""

    def line(text: str) -> None:
        with tqdm.external_write_mode():
            say(text)

    return line


def save_run(
    config: TrainConfig,
    student: LoadedModel,
    methods: Sequence[Method],
    checkpoints: Checkpoints,
    run: TrainReport,
) -> None:
    """Write the student, what methods trained of their own, the summary, and the last or an interrupted checkpoint."""
    out = Path(config.out)
    run.load_with = save_student(student, config)
    summary = asdict(run) | {"tokens_per_second": run.tokens_per_second}
    with writing(out):
        save_own(methods, out)
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    if run.steps and (run.interrupted or config.save_every):
        checkpoints.save(run)


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
    step = nn.value_and_grad(
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


def batch_loss(head: distill_kernels.Head, losses: AnyLoss, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Mean over trained positions of kd_weight · KL + ce_weight · CE; mean KL where there are targets; mean CE.

    Where positions have weights w, these are sum(w l) / sum(w); kd_weight and ce_weight hold them already.
    The logits of a chunk of positions exist at a time, never [batch, length, vocab].
    """
    if head.reason is None and not isinstance(losses, OfSpans):
        constants = [getattr(batch, name) for name in losses.names]
        shares = batch.kd_weight / batch.weight, batch.ce_weight / batch.weight
        total, (kl, ce) = distill_kernels.chunked_sum(on_tier(losses), outputs(head, batch), head, constants, shares)
    else:
        kl, ce = loss_values(head, losses, batch)
        each = mx.where(batch.kd_weight > 0, batch.kd_weight * kl, 0) + batch.ce_weight * ce
        total = each.mean() if batch.row_weights is None else each.sum() / batch.weight
    answered, there = batch.kd_weight > 0, batch.answered_weight
    if batch.row_weights is None:
        return total, mx.where(answered, kl, 0).sum() / mx.maximum(there, 1), ce.mean()
    kl, ce = kl * batch.row_weights, ce * batch.row_weights
    return total, mx.where(answered, kl, 0).sum() / mx.where(there > 0, there, 1), ce.sum() / batch.weight


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


def say_coverage(
    source: TargetSource, sequences: list[TokenSequence], config: TrainConfig, say: Callable[[str], object]
) -> None:
    """Say before the first step how many documents the stores lack, and what will be done about them.

    Raises:
        MissingTargetsError: there are some, and the policy is "error".
    """
    missing = source.missing(sequences)
    if config.store:
        there = len(sequences) - missing
        on_miss = f"the teacher is asked, {SILENT[config.miss_policy]}" if source.asks else config.miss_policy
        if source.asks_services:
            on_miss = f"the service's teacher is asked, else: {on_miss}"
        say(f"{there:,} of {len(sequences):,} documents are in the store, {missing:,} miss; on a miss: {on_miss}")
    else:
        say(f"without a store all of {missing:,} documents miss: the teacher is asked, {SILENT[config.miss_policy]}")
    beyond = source.beyond(sequences) if config.max_teacher_length else 0
    if beyond:
        say(
            f"{beyond:,} trained positions lie beyond the first {config.max_teacher_length:,} tokens that the teacher "
            f"reads: they are {DONE.get(config.miss_policy, DONE['hard-only'])}"
        )
    if missing and config.miss_policy == "error" and not source.asks_services:
        raise MissingTargetsError(
            f"{missing:,} of {len(sequences):,} documents are not in the store (is --max-seq-length "
            f"{config.max_seq_length} the --max-length that it was built with?); "
            "type --teacher T to ask it live, or --on-miss hard-only or skip"
        )


def say_padding(
    config: TrainConfig,
    sequences: list[TokenSequence],
    draw: Draw | None,
    among: Processes,
    say: Callable[[str], object],
) -> None:
    """Say how much of the run's first batches is padding, packed and not."""
    lengths = [len(sequence.trained) for sequence in sequences]
    order = islice(epochs(lengths, config.batch_size, config.seed, draw), min(PROBED, config.iters))
    batches = [[lengths[i] for i in among.share(numbers)] for _, numbers in order]
    packed, plain = padding(batches, config.max_seq_length), padding(batches, None)
    say(f"padding: {100 * packed:.1f} % of positions packed, {100 * plain:.1f} % without --pack")
