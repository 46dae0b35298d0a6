"""What student and teacher answer to the same prompts, greedily, and how like each other the answers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from tqdm import tqdm

from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence

PROMPT_TOKENS = 256
"""Of a longer prompt, its last tokens are read."""


@dataclass(frozen=True)
class Answer:
    """One prompt, and what followed it: in the dataset, from the student, from the teacher if it was asked."""

    prompt: str
    expected: str
    student: str
    teacher: str | None = None
    similarity: float | None = None
    """ROUGE-L of the student's tokens against the teacher's."""


def answers(
    student: LoadedModel,
    teacher: LoadedModel | None,
    sequences: Sequence[TokenSequence],
    count: int,
    max_tokens: int = 64,
    quiet: bool = False,
) -> list[Answer]:
    """Let the models go on after the prompts of some documents, evenly spread; of a plain text, after its first half.

    Args:
        teacher: of the student's tokenizer.
    """
    chosen = np.unique(np.linspace(0, len(sequences) - 1, min(count, len(sequences))).round().astype(int)).tolist()
    found = []
    for number in tqdm(chosen, desc="answer", unit="prompt", leave=False, disable=quiet):
        ids = sequences[number].token_ids
        first = int(np.flatnonzero(sequences[number].trained)[0]) + 1
        first = first if first > 1 else max(len(ids) // 2, 1)
        prompt = ids[max(first - PROMPT_TOKENS, 0) : first].tolist()
        mine = _greedy(student, prompt, max_tokens)
        theirs = _greedy(teacher, prompt, max_tokens) if teacher is not None else None
        read = student.tokenizer.decode
        found.append(
            Answer(
                read(prompt),
                read(ids[first : first + max_tokens].tolist()),
                read(mine),
                None if theirs is None else read(theirs),
                None if theirs is None else rouge_l(mine, theirs),
            )
        )
    return found


def rouge_l(one: Sequence[int], other: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two lists of token ids: 2 LCS / (|a| + |b|); 1 for two empty ones.

    Reference: Lin, "ROUGE", 2004, section 3, with precision and recall weighing the same.
    """
    if not one and not other:
        return 1.0
    row = np.zeros(len(other) + 1, np.int64)
    for token in one:
        before = row.copy()
        for j, theirs in enumerate(other, 1):
            row[j] = before[j - 1] + 1 if token == theirs else max(before[j], row[j - 1])
    return 2 * int(row[-1]) / (len(one) + len(other))


def _greedy(model: LoadedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, up to an end of text."""
    found: list[int] = []
    step: Any = generate_step(mx.array(prompt), model.model, max_tokens=max_tokens)
    ends = model.end_tokens
    for token, _ in step:
        if int(token) in ends:
            break
        found.append(int(token))
    return found
