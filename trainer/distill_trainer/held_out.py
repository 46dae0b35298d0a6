"""Loss on held-out documents while a student is trained: `--valid-split` or `--valid-dataset`.

Targets come from the run's own source under its own miss policy, once, before the first step; they are kept as batches
until the run ends. The student is in eval mode while it is measured, and nothing random is drawn, so a run learns the
same with and without held-out documents.

All steps are measured by the loss of the run's last step, whatever its schedules, and all positions weigh the same,
whatever training weighs them: so the figures of steps compare, and those of runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import distill_kernels

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.config import TrainConfig
from distill_trainer.loss_values import loss_values
from distill_trainer.losses import AnyLoss
from distill_trainer.objective import Objective
from distill_trainer.targets import Count, TargetSource
from distill_trainer.two_prompts import read_both
from logitstore.errors import MissingTargetsError
from logitstore.key import document_key
from logitstore.sequences import TokenizeReport, TokenSequence

Figures = dict[str, float | int | None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out documents with their targets."""

    batches: tuple[Batch, ...]
    """Collated with alpha 1: kd_weight says which positions have targets, ce_weight which are of labels alone."""
    domains: tuple[tuple[str, ...], ...]
    """Of each batch's documents; empty where none are told apart."""
    losses: AnyLoss
    alpha: float
    count: Count

    def measure(self, head: distill_kernels.Head) -> Figures:
        """Means over trained positions, and the same for each domain under NAME/DOMAIN.

        valid_loss: alpha KL + (1 - alpha) CE, CE alone where there are no targets; valid_kd_loss: KL where there are;
        valid_ce_loss: CE.
        """
        sums: dict[str, npt.NDArray[np.float64]] = {"": np.zeros(5)}
        training = head.model.training
        head.model.eval()
        try:
            for batch, domains in zip(self.batches, self.domains, strict=True):
                rows = self._rows(head, batch)
                sums[""] += rows.sum(axis=1)
                documents = np.array(batch.rows) // batch.tokens.shape[1]
                for domain in sorted(set(domains)):
                    of_domain = np.array([each == domain for each in domains])[documents]
                    sums[f"/{domain}"] = sums.get(f"/{domain}", 0) + rows[:, of_domain].sum(axis=1)
        finally:
            head.model.train(training)
        figures: Figures = {"valid_hits": self.count.hits, "valid_misses": self.count.misses}
        if self.count.failed:
            figures["valid_failed"] = self.count.failed
        for domain, (total, kd, ce, answered, positions) in sorted(sums.items()):
            figures[f"valid_loss{domain}"] = total / positions if positions else None
            figures[f"valid_kd_loss{domain}"] = kd / answered if answered else None
            figures[f"valid_ce_loss{domain}"] = ce / positions if positions else None
        return figures

    def _rows(self, head: distill_kernels.Head, batch: Batch) -> npt.NDArray[np.float64]:
        """Of N positions the loss, the KL, the cross-entropy, and whether there are targets; and N ones: [5, N]."""
        kd, hard = (np.array(v.astype(mx.float32), np.float64) for v in loss_values(head, self.losses, batch))
        answered, alone = (np.array(weight) > 0 for weight in (batch.kd_weight, batch.ce_weight))
        kd = np.where(answered, kd, 0)
        total = self.alpha * kd + np.where(alone, 1, 1 - self.alpha) * hard
        return np.stack([total, kd, hard, answered, np.ones(len(hard))])


def read_held_out(
    config: TrainConfig, tokenizer: Any, trained: Sequence[TokenSequence], say: Callable[[str], object]
) -> list[TokenSequence]:
    """The documents to be measured on, always the same ones; none where there is no held-out dataset.

    Args:
        trained: the documents that are trained on; how many of them are held out too is said.

    Raises:
        LogitstoreError: as for the documents that are trained on.
    """
    if not config.holds_out:
        return []
    columns = [name for name in dict.fromkeys((config.domain_column, config.combination.column)) if name]
    dataset, split, report = config.valid_dataset or config.dataset, config.valid_split or "train", TokenizeReport()
    every = read_both(config, dataset, split, columns, tokenizer, report)
    count = len(every) if config.val_batches == -1 else config.val_batches * config.batch_size
    chosen = np.random.default_rng(config.seed).permutation(len(every))[:count].tolist()
    found = sorted((every[number] for number in chosen), key=lambda sequence: len(sequence.trained))
    say(f"held out: {report.describe()}; measured on {len(found):,} of them")
    keys = {document_key(sequence.token_ids) for sequence in trained}
    if twice := sum(document_key(sequence.token_ids) in keys for sequence in found):
        say(f"{twice:,} of these {len(found):,} are trained on too, and are no evidence of what was learned")
    return found


def hold_out(
    config: TrainConfig, sequences: Sequence[TokenSequence], source: TargetSource | None, objective: Objective
) -> HeldOut | None:
    """Ask for the targets of held-out documents.

    Args:
        sequences: from `read_held_out`.
        source: None where nothing is distilled.

    Raises:
        MissingTargetsError: a miss under the policy "error", or under "skip" nothing but misses.
        TeacherLostError, UnusableLogitsError: under the policy "online".
        CorruptStoreError: a store's bytes are not those that were written.
    """
    if not sequences:
        return None
    missing = source.missing(sequences) if source else 0
    add = "type `logitstore build` with the held-out dataset to add them"
    if source and missing and source.on_miss == "error" and not source.asks_services:
        raise MissingTargetsError(
            f"{missing:,} of {len(sequences):,} held-out documents are not in the store; {add}, --teacher T to ask it "
            "live, or --on-miss hard-only or skip"
        )
    on_miss = "hard-only" if source is None else source.on_miss
    batches, domains, total = [], [], Count()
    starts = range(0, len(sequences), config.batch_size)
    for at in tqdm(starts, desc="held out", unit="batch", delay=1, leave=False, disable=config.quiet):
        chosen = sequences[at : at + config.batch_size]
        targets, count = (
            source.answer(chosen, temperature=objective.last_temperature) if source else ([None] * len(chosen), Count())
        )
        total += count
        batch = collate(chosen, targets, Weighing(1.0, on_miss))
        if batch is not None:
            batches.append(batch)
            domains.append(tuple(str(s.columns[config.domain_column]) for s in chosen if config.domain_column))
    if not batches:
        raise MissingTargetsError(f"no held-out document is in the store; {add}, or --on-miss hard-only")
    mx.eval(batches)
    return HeldOut(tuple(batches), tuple(domains), objective.last, config.alpha_schedule.end, total)


def due(config: TrainConfig, step: int) -> bool:
    """Whether a step is followed by a measurement: every `steps_per_eval`, at the end, and where a checkpoint is."""
    saved = config.save_every is not None and step % config.save_every == 0
    return step % config.steps_per_eval == 0 or step == config.iters or saved
