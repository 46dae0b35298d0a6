"""How near students are to their teacher on held-out documents, measured against the live teacher, not against a store.

Whole distributions are compared, a chunk of positions at a time, at temperature 1. Nothing is trained or written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import distill_kernels

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from distill_trainer.comparison import NOTHING, Compared, Sums, expected_calibration_error, perplexity, reliability
from logitstore.errors import ConfigError, DatasetError
from logitstore.forward import document_logits, logit_rows
from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence
from logitstore.teacher import Teacher
from logitstore.vocabulary import vocabulary_of

TEACHER = "teacher"
"""The name under which the teacher's own figures stand."""


@dataclass(frozen=True)
class Evaluation:
    """A model over the trained positions of some documents: means over positions, p the teacher's, q this model's."""

    positions: int
    kl: float
    """sum_i p_i log(p_i / q_i), nats."""
    reverse_kl: float
    """sum_i q_i log(q_i / p_i), nats."""
    agreement: float
    """Share of positions where this model's likeliest token is the teacher's."""
    top5_agreement: float
    """Share of the teacher's five likeliest tokens that are among this model's five."""
    acceptance: float
    """sum_i min(p_i, q_i): how many of this model's drafted tokens the teacher would accept in speculative decoding
    (Leviathan et al., 2023, corollary 3.6)."""
    perplexity: float
    """exp of the mean of -log q(label), the label being the token that followed."""
    ece: float
    """Expected calibration error, confidence being max q: `comparison.expected_calibration_error`."""
    bins: tuple[tuple[int, float, float], ...]
    """`comparison.reliability`."""

    @classmethod
    def of(cls, sums: Sums, name: str) -> "Evaluation":
        """From sums over positions of a model of this name."""
        n = sums.positions
        kl, reverse_kl, agreement, top5, acceptance, nll = (sums.per_position / n).tolist()
        ece = expected_calibration_error(sums.bins)
        return cls(n, kl, reverse_kl, agreement, top5, acceptance, perplexity(nll, name), ece, reliability(sums.bins))


def evaluate(
    students: Mapping[str, LoadedModel], teacher: Teacher, sequences: Sequence[TokenSequence], quiet: bool = False
) -> dict[str, Evaluation]:
    """Compare students with their teacher on the trained positions of some documents; the models are left in eval mode.

    Where models differ in the width of their LM head, all are read over the narrowest: the rest is padding.

    Returns:
        One evaluation per student by its name, and the teacher's own under `TEACHER`, with kl 0 and agreement 1.

    Raises:
        ConfigError: a student whose tokenizer is not the teacher's, or that is named `TEACHER`.
        DatasetError: no documents.
        ModelError: logits that are no numbers.
    """
    for name, student in students.items():
        if name == TEACHER:
            raise ConfigError(f"a student is named {name!r}, under which the teacher's own figures stand; rename it")
        if vocabulary_of(student.tokenizer).fingerprint() != teacher.vocabulary.fingerprint():
            raise ConfigError(
                f"student {student.name} and teacher {teacher.loaded.name} have different tokenizers; "
                "type a student of the teacher's tokenizer"
            )
        student.model.eval()
    if not sequences:
        raise DatasetError("there are no documents to evaluate on; type --dataset with another, or another --split")

    heads = [teacher.head, *(distill_kernels.split_head(student.model) for student in students.values())]
    rows_at_once = logit_rows(teacher.vocab_size)
    sums = [NOTHING] * len(heads)
    with tqdm(total=sum(len(s.trained) for s in sequences), desc="evaluate", unit="tok", disable=quiet) as bar:
        for sequence in sequences:
            at = 0
            every = (next(document_logits(head, [sequence.token_ids], rows_at_once)) for head in heads)
            for chunks in zip(*every, strict=True):
                stop = at + len(chunks[0])
                rows = np.flatnonzero(sequence.trained[at:stop])
                if len(rows):
                    width = min(chunk.shape[-1] for chunk in chunks)
                    logits = [chunk[mx.array(rows), :width] for chunk in chunks]
                    teacher_rows = Compared.of(logits[0], sequence.token_ids[at + rows + 1])
                    sums = [total + teacher_rows.with_student(z) for total, z in zip(sums, logits, strict=True)]
                bar.update(stop - at)
                at = stop
    return {name: Evaluation.of(total, name) for name, total in zip([TEACHER, *students], sums, strict=True)}
