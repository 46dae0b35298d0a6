"""Train a student: documents and targets in, an mlx-lm model or adapter out. Reads from top to bottom."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import distill_kernels
from distill_kernels import BucketKL, RowLoss, SparseKL

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

from distill_trainer.batches import Batch, Weighing, collate, epochs
from distill_trainer.config import TrainConfig
from distill_trainer.student import load_student, save_student, trainable_parameters
from distill_trainer.targets import Count, TargetSource, require_one_recipe, require_same_tokenizer
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, DatasetError, MissingTargetsError
from logitstore.journal import ShardWriter
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.sequences import TokenizeReport, TokenSequence, tokenize
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.vocabulary import vocabulary_of
from logitstore.zarr_store import ZarrStore

LOGIT_ROWS = 256
"""Positions whose logits exist at one time: 50 MB of float32 at V = 49,152."""


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
    final: dict[str, float] = field(default_factory=dict)
    """The last step's metrics."""
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.trained_tokens / self.elapsed_s if self.elapsed_s else 0.0


def train(config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> TrainReport:
    """Train a student and save it to `config.out`. Ctrl-C ends the run early and saves what was learned.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; type --out with a new folder")
    stores = open_stores(config)
    student = load_student(config)
    report = TokenizeReport()
    rows = read_documents(config.dataset, split=config.split)
    sequences = list(tokenize(rows, student.tokenizer, config.max_seq_length, report))
    if not sequences:
        raise DatasetError(
            f"{config.dataset} has no document with two tokens and a trained position; type --dataset with another"
        )
    say(
        f"{len(sequences):,} documents, {report.trained_positions:,} trained positions"
        + (f"; {report.truncated_documents:,} cut at --max-seq-length" if report.truncated_documents else "")
    )

    with ExitStack() as stack:
        source = target_source(config, stores, student.tokenizer, stack) if config.alpha > 0 else None
        if source is not None:
            say_coverage(source, sequences, config, say)
        out.mkdir(parents=True, exist_ok=True)
        (out / "distill_train.json").write_text(json.dumps(config.to_json(), indent=1) + "\n")
        say(f"training {trainable_parameters(student.model):,} parameters for {config.iters:,} steps")
        run = run_steps(config, student.model, sequences, source, out)
    run.load_with = save_student(student, config)
    (out / "summary.json").write_text(
        json.dumps(asdict(run) | {"tokens_per_second": run.tokens_per_second}, indent=1) + "\n"
    )
    return run


def run_steps(
    config: TrainConfig, model: nn.Module, sequences: list[TokenSequence], source: TargetSource | None, out: Path
) -> TrainReport:
    """The loop: batch, targets, loss, step, metrics."""
    report = TrainReport()
    head = distill_kernels.split_head(model)
    losses = row_loss(source.recipe if source else None)
    optimizer = optim.Adam(learning_rate=config.learning_rate, bias_correction=True)
    weighing = Weighing(config.alpha, config.miss_policy)
    batches = epochs([len(s.trained) for s in sequences], config.batch_size, config.seed)
    step = nn.value_and_grad(model, lambda batch: batch_loss(head, losses, batch))

    with (
        (out / "metrics.jsonl").open("w") as metrics,
        tqdm(total=config.iters, desc="train", unit="step", disable=config.quiet) as bar,
    ):
        try:
            while report.steps < config.iters:
                started = time.perf_counter()
                chosen = [sequences[i] for i in next(batches)]
                targets, count = source.answer(chosen) if source else ([None] * len(chosen), Count())
                report.count += count
                batch = collate(chosen, targets, weighing)
                n, loss, kd_loss, ce_loss = 0, mx.array(0.0), mx.array(0.0), mx.array(0.0)
                if batch is not None:
                    n = len(batch.rows)
                    (loss, kd_loss, ce_loss), gradients = step(batch)
                    optimizer.update(model, gradients)
                    mx.eval(model.parameters(), optimizer.state, loss, kd_loss, ce_loss)
                elapsed_s = time.perf_counter() - started

                report.steps += 1
                report.trained_tokens += n
                report.elapsed_s += elapsed_s
                report.final = {
                    "step": report.steps,
                    "loss": loss.item(),
                    "kd_loss": kd_loss.item(),
                    "ce_loss": ce_loss.item(),
                    "hits": count.hits,
                    "misses": count.misses,
                    "trained_tokens": n,
                    "learning_rate": config.learning_rate,
                    "tokens_per_second": n / elapsed_s,
                    "peak_memory_gb": mx.get_peak_memory() / 1e9,
                }
                metrics.write(json.dumps(report.final) + "\n")
                metrics.flush()
                bar.set_postfix(loss=f"{report.final['loss']:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def batch_loss(head: distill_kernels.Head, losses: RowLoss, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Mean over trained positions of kd_weight · KL + ce_weight · CE; then the mean KL where there are targets, the mean CE.

    The logits of a chunk of positions exist at a time, never [batch, length, vocab].
    """
    constants = (batch.ids, batch.weights)
    constants += (batch.log_tail_mass, batch.labels) if isinstance(losses, BucketKL) else (batch.labels,)
    if head.reason is None:
        hidden = head.trunk(batch.tokens)
        kl, ce = distill_kernels.chunked(
            losses, hidden.reshape(-1, hidden.shape[-1])[batch.rows], head, constants, LOGIT_ROWS
        )
    else:
        logits = head.model(batch.tokens)
        kl, ce = losses(logits.reshape(-1, logits.shape[-1])[batch.rows], *constants)
    loss = (batch.kd_weight * kl + batch.ce_weight * ce).mean()
    answered = batch.kd_weight > 0
    return loss, mx.where(answered, kl, 0).sum() / mx.maximum(answered.sum(), 1), ce.mean()


def row_loss(recipe: Recipe | None) -> RowLoss:
    """The loss that a selection serves: unbiased weights take the linear KL, a truncated teacher the tail bucket."""
    if recipe is None:
        return SparseKL()
    return BucketKL(recipe.temperature) if recipe.selection.kind == "top-k" else SparseKL(recipe.temperature)


def open_stores(config: TrainConfig) -> list[ZarrStore]:
    """Open the stores that are there; the first may be begun by the run itself when it writes back.

    Raises:
        StoreError: as `open_store`; stores that differ; a temperature or selection that the store does not have.
    """
    paths = list(config.store)
    if config.write_back and not Path(paths[0]).exists():
        paths.pop(0)
    stores = [open_store(path) for path in paths]
    require_one_recipe(stores)
    for store in stores[:1]:
        recipe = store.manifest.recipe
        if config.temperature is not None and config.temperature != recipe.temperature:
            raise ConfigError(
                f"{store.path} was built at temperature {recipe.temperature:g}, this run asks for {config.temperature:g}; "
                f"leave --temperature out, or type `logitstore build --temperature {config.temperature:g}` for another store"
            )
        if config.select is not None and Selection.parse(config.select) != recipe.selection:
            raise ConfigError(
                f"{store.path} was built with --select {recipe.selection}, this run asks for {config.select}; "
                f"leave --select out, or type `logitstore build --select {config.select}` for another store"
            )
    return stores


def target_source(config: TrainConfig, stores: list[ZarrStore], tokenizer: object, stack: ExitStack) -> TargetSource:
    """Put together who answers: stores, live teacher, and the writer that keeps its answers.

    Raises:
        IncompatibleStoreError: store, teacher and student do not belong together.
    """
    fingerprint = vocabulary_of(tokenizer).fingerprint()
    for store in stores:
        require_same_tokenizer(store, fingerprint, config.student)
    teacher = None
    if config.teacher is not None and (config.miss_policy == "online" or not stores):
        teacher = Teacher(config.teacher, config.adapter_path, quiet=config.quiet)
    if teacher is None:
        return TargetSource(stores, stores[0].manifest.recipe, config.miss_policy)

    if stores:
        recipe = stores[0].manifest.recipe
        wanted = teacher.manifest(recipe.selection, recipe.temperature, recipe.seed)
        stores[0].manifest.require_compatible(wanted, stores[0].path)
    else:
        selection = Selection.parse(config.select or "threshold:16")
        wanted = teacher.manifest(selection, config.temperature or 1.0, seed=0)
        if teacher.vocabulary.fingerprint() != fingerprint:
            raise ConfigError(
                f"teacher {config.teacher} and student {config.student} have different tokenizers; "
                "type --student with a model of the teacher's tokenizer"
            )
    writer = None
    if config.write_back:
        path = Path(config.store[0])
        if not path.exists():
            stores.insert(0, ZarrStore.create(path, wanted, teacher.vocabulary))
        writer = stack.enter_context(ShardWriter(stores[0], "write-back"))
    source = TargetSource(stores, wanted.recipe, config.miss_policy, teacher, writer)
    stack.callback(source.close)
    return source


def say_coverage(
    source: TargetSource, sequences: list[TokenSequence], config: TrainConfig, say: Callable[[str], None]
) -> None:
    """Say before the first step how many documents the stores lack, and what will be done about them.

    Raises:
        MissingTargetsError: there are some, and the policy is "error".
    """
    missing = source.missing(sequences)
    if config.store:
        say(
            f"{len(sequences) - missing:,} of {len(sequences):,} documents are in the store; on a miss: {config.miss_policy}"
        )
    if missing and config.miss_policy == "error":
        raise MissingTargetsError(
            f"{missing:,} of {len(sequences):,} documents are not in the store (is --max-seq-length {config.max_seq_length} "
            "the --max-length that it was built with?); type --teacher T to ask it live, or --on-miss hard-only or skip"
        )
