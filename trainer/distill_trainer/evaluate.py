"""How near students are to their teacher on held-out documents, measured against the live teacher, not against a store.

Whole distributions are compared, a chunk of positions at a time, at temperature 1. Nothing is trained or written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import distill_kernels
from distill_kernels.row_ops import at_ids, log_sum_exp

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

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
    """A model over the trained positions of some documents."""

    positions: int
    kl: float
    """Mean over positions of sum_i p_i log(p_i / q_i), p the teacher's and q this model's: nats."""
    agreement: float
    """Share of positions where this model's likeliest token is the teacher's."""
    perplexity: float
    """exp of the mean of -log q(label), the label being the token that followed."""


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
    sums = np.zeros((len(heads), 3))
    with tqdm(total=sum(len(s.trained) for s in sequences), desc="evaluate", unit="tok", disable=quiet) as bar:
        for sequence in sequences:
            at = 0
            every = (next(document_logits(head, [sequence.token_ids], rows_at_once)) for head in heads)
            for chunks in zip(*every, strict=True):
                stop = at + len(chunks[0])
                rows = np.flatnonzero(sequence.trained[at:stop])
                if len(rows):
                    sums += _sums([chunk[mx.array(rows)] for chunk in chunks], sequence.token_ids[at + rows + 1])
                bar.update(stop - at)
                at = stop
    positions = sum(int(s.trained.sum()) for s in sequences)
    return {
        name: Evaluation(positions, kl / positions, agreed / positions, math.exp(nll / positions))
        for name, (kl, agreed, nll) in zip([TEACHER, *students], sums.tolist(), strict=True)
    }


def _sums(logits: Sequence[mx.array], token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Sums over rows of KL, agreement and -log q(label), float64 [models, 3].

    Each model's logits are [n, V], the teacher's first; token_ids [n] are the labels.
    """
    width = min(z.shape[-1] for z in logits)
    labels = mx.array(token_ids)[:, None]
    found = []
    log_p = mx.array(0.0)
    for number, z in enumerate(logits):
        z = z[:, :width].astype(mx.float32)
        log_q = z - log_sum_exp(z)[:, None]
        if number == 0:
            log_p, likeliest = log_q, z.argmax(axis=-1)
        p = mx.exp(log_p)
        kl = mx.where(p > 0, p * (log_p - log_q), 0).sum(axis=-1)
        per_row = mx.stack([kl, (z.argmax(axis=-1) == likeliest).astype(mx.float32), -at_ids(log_q, labels)[:, 0]])
        found.append(np.array(per_row).sum(axis=1, dtype=np.float64))
    return np.stack(found)
