"""Train a student: documents and targets in, an mlx-lm model or adapter out. Reads from top to bottom."""

import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL, on_tier

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

from distill_trainer.batches import Batch, Weighing, collate, epochs
from distill_trainer.config import TrainConfig
from distill_trainer.losses import Loss, loss_of
from distill_trainer.output import (
    CONFIG,
    METRICS,
    SUMMARY,
    append_metrics,
    output_folder,
    require_new,
    require_room,
    writing,
)
from distill_trainer.student import load_student, make_trainable, save_student, trainable
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.targets import Count, TargetSource
from logitstore.documents import read_documents
from logitstore.errors import MissingTargetsError, ModelError, StoreError
from logitstore.prefetch import prefetched
from logitstore.sequences import TokenizeReport, TokenSequence, read_sequences, require_ids_below
from logitstore.targets import SparseTargets

AHEAD = 2
"""Batches whose targets are read while a step is computed."""


@dataclass
class TrainReport:
    """What a run did."""

    load_with: str = ""
    """The line of Python that loads the result."""
    steps: int = 0
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    """Time in steps, targets included; loading and saving apart."""
    count: Count = field(default_factory=Count)
    final: dict[str, Any] = field(default_factory=dict)
    """The last step's metrics."""
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.trained_tokens / self.elapsed_s if self.elapsed_s else 0.0


def train(config: TrainConfig, say: Callable[[str], object] = lambda _: None) -> TrainReport:
    """Train a student and save it to `config.out`.

    After the first step, Ctrl-C or a store that fails ends the run early and what was learned is saved; before it,
    nothing is left behind.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`.
    """
    require_new(Path(config.out))
    stores = open_stores(config)
    rows = read_documents(config.dataset, split=config.split)
    student = load_student(config)
    report = TokenizeReport()
    sequences = read_sequences(rows, student.tokenizer, config.max_seq_length, report, quiet=config.quiet)
    say(report.describe("--max-seq-length"))
    vocab_size = student.model(mx.array([[0]])).shape[-1]
    require_ids_below(vocab_size, sequences, f"student {student.name}")

    with output_folder(Path(config.out)) as out:
        asked = target_source(config, stores, student.tokenizer) if config.alpha > 0 else nullcontext()
        with asked as source:
            if source is not None:
                require_ids_below(source.recipe.vocab_size, sequences, "the teacher")
                say_coverage(source, sequences, config, say)
            make_trainable(student, config)
            parameters = trainable(student.model).values()
            require_room(out, sum(parameter.nbytes for parameter in parameters))
            with writing(out):
                (out / CONFIG).write_text(json.dumps(config.to_json(), indent=1) + "\n")
                (out / METRICS).touch()
            say(f"training {sum(parameter.size for parameter in parameters):,} parameters for {config.iters:,} steps")
            if reason := distill_kernels.split_head(student.model).reason:
                say(f"every step holds whole logits, because the LM head cannot be taken apart: {reason}")
            run, failure = TrainReport(), None
            try:
                run_steps(config, student.model, sequences, source, out, run)
            except (KeyboardInterrupt, StoreError) as error:
                if not run.steps:
                    raise
                run.interrupted, failure = True, error
        run.load_with = save_student(student, config)
        summary = asdict(run) | {"tokens_per_second": run.tokens_per_second}
        with writing(out):
            (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    if isinstance(failure, StoreError):
        raise type(failure)(f"{failure}; what was learned in {run.steps:,} steps is saved in {out}") from failure
    return run


def run_steps(
    config: TrainConfig,
    model: nn.Module,
    sequences: list[TokenSequence],
    source: TargetSource | None,
    out: Path,
    report: TrainReport,
) -> None:
    """The loop: batch, targets, loss, step, metrics. `report` is kept up to date along the way."""
    head = distill_kernels.split_head(model)
    losses = SparseKL() if source is None else loss_of(config.loss, source.recipe, source.temperature, "the teacher")
    optimizer = optim.Adam(learning_rate=config.learning_rate, bias_correction=True)
    weighing = Weighing(config.alpha, config.miss_policy)
    answers = answered_batches(config, sequences, source)
    if source is None or source.on_miss != "online":  # else two threads would share the GPU
        answers = prefetched(answers, AHEAD)
    step = nn.value_and_grad(model, lambda batch: batch_loss(head, losses, batch))

    with closing(answers), tqdm(total=config.iters, desc="train", unit="step", disable=config.quiet) as bar:
        while report.steps < config.iters:
            started = time.perf_counter()
            chosen, targets, count = next(answers)
            report.count += count
            taught = count.hits + (count.misses if weighing.on_miss == "online" else 0)
            batch = collate(chosen, targets, weighing)
            n, loss, kd_loss, ce_loss = 0, None, None, None
            if batch is not None:
                n = len(batch.rows)
                means, gradients = step(batch)
                optimizer.update(model, gradients)
                mx.eval(trainable(model), optimizer.state, means)
                loss, kd_loss, ce_loss = (float(mean.item()) for mean in means)
                if not math.isfinite(loss):
                    raise ModelError(
                        f"the loss of step {report.steps + 1} is {loss}, expected a number; "
                        f"type --learning-rate below {config.learning_rate:g}"
                    )
            elapsed_s = time.perf_counter() - started

            report.steps += 1
            report.trained_tokens += n
            report.elapsed_s += elapsed_s
            report.final = {
                "step": report.steps,
                "loss": loss,
                "kd_loss": kd_loss if taught else None,
                "ce_loss": ce_loss,
                "hits": count.hits,
                "misses": count.misses,
                "trained_tokens": n,
                "learning_rate": config.learning_rate,
                "tokens_per_second": n / elapsed_s,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
            append_metrics(out, report.final)
            bar.set_postfix(loss="-" if loss is None else f"{loss:.3f}", refresh=False)
            bar.update()


def answered_batches(
    config: TrainConfig, sequences: list[TokenSequence], source: TargetSource | None
) -> Generator[tuple[list[TokenSequence], list[SparseTargets | None], Count]]:
    """Endless batches of documents and their targets; each epoch reads the next of several stored draws."""
    for epoch, numbers in epochs([len(s.trained) for s in sequences], config.batch_size, config.seed):
        chosen = [sequences[i] for i in numbers]
        yield chosen, *(source.answer(chosen, epoch) if source else ([None] * len(chosen), Count()))


def batch_loss(head: distill_kernels.Head, losses: Loss, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Mean over trained positions of kd_weight · KL + ce_weight · CE; mean KL where there are targets; mean CE.

    The logits of a chunk of positions exist at a time, never [batch, length, vocab].
    """
    constants = [getattr(batch, name) for name in losses.names]
    loss = on_tier(losses)
    if head.reason is None:
        hidden = head.trunk(batch.tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.rows]
        shares = batch.kd_weight / len(batch.rows), batch.ce_weight / len(batch.rows)
        total, (kl, ce) = distill_kernels.chunked_sum(loss, hidden, head, constants, shares)
    else:
        logits = head.model(batch.tokens)
        kl, ce = loss(logits.reshape(-1, logits.shape[-1])[batch.rows], *constants)
        total = (mx.where(batch.kd_weight > 0, batch.kd_weight * kl, 0) + batch.ce_weight * ce).mean()
    answered = batch.kd_weight > 0
    return total, mx.where(answered, kl, 0).sum() / mx.maximum(answered.sum(), 1), ce.mean()


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
        say(f"{there:,} of {len(sequences):,} documents are in the store; on a miss: {config.miss_policy}")
    if missing and config.miss_policy == "error":
        raise MissingTargetsError(
            f"{missing:,} of {len(sequences):,} documents are not in the store (is --max-seq-length "
            f"{config.max_seq_length} the --max-length that it was built with?); "
            "type --teacher T to ask it live, or --on-miss hard-only or skip"
        )
