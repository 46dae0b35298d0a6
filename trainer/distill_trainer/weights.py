"""How much each position counts: thoughts, outcomes and the teacher's entropy as weights of a position's whole loss.

    loss = sum_t w_t l_t / sum_t w_t        over the trained positions of a step, l_t = alpha·KL_t + (1 - alpha)·CE_t

    w_t = think (where token t + 1 is a thought, else 1) · outcome of its document · (1 + entropy_weight · H_t)

The first two belong to the documents and are written into them before the first step; a position that they give no
weight is not trained, so that neither a teacher nor the student computes anything for it. H_t, in nats at temperature
1, comes with the targets and is read as a batch is made.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from distill_trainer.config import TrainConfig
from logitstore.errors import ConfigError, DatasetError
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets
from logitstore.vocabulary import vocabulary_of


def weighted(
    sequences: list[TokenSequence], config: TrainConfig, tokenizer: object, say: Callable[[str], object]
) -> list[TokenSequence]:
    """The documents with their positions' weights; as they are where the run asks for none.

    Raises:
        ConfigError: no document holds the mark that thoughts begin with.
        DatasetError: an outcome that is no weight; no position that weighs anything.
    """
    if config.think_weight is None and config.outcome_column is None:
        return sequences
    weights = [np.ones(len(s.trained), np.float32) for s in sequences]
    if config.think_weight is not None:
        vocabulary, thinking, thoughts = vocabulary_of(tokenizer), 0, 0
        marks = config.think_start.encode(), config.think_end.encode()
        for sequence, weight in zip(sequences, weights, strict=True):
            spans = list(thought_spans([vocabulary.tokens[i] for i in sequence.token_ids], *marks))
            for start, stop in spans:  # of tokens, some of the mark before them: position t predicts token t + 1
                weight[start - 1 : stop - 1] = config.think_weight
                thoughts += int(sequence.trained[start - 1 : stop - 1].sum())
            thinking += bool(spans)
        if not thinking:
            raise ConfigError(
                f"none of {len(sequences):,} documents holds {config.think_start!r}; "
                "type --think-start and --think-end as the dataset marks its thoughts, or leave --think-weight out"
            )
        say(
            f"{thinking:,} of {len(sequences):,} documents hold thoughts: {thoughts:,} trained positions weigh "
            f"{config.think_weight:g}"
        )
    if config.outcome_column is not None:
        for sequence, weight in zip(sequences, weights, strict=True):
            weight *= np.float32(_outcome(sequence, config.outcome_column))
    made = [
        replace(s, weights=weight, trained=s.trained & (weight > 0))
        for s, weight in zip(sequences, weights, strict=True)
    ]
    kept = [s for s in made if s.trained.any()]
    if not kept:
        raise DatasetError(
            "no position weighs anything; type --think-weight above 0, or a dataset with outcomes above 0"
        )
    if len(kept) < len(made):
        say(f"{len(made) - len(kept):,} documents are left out: nothing in them weighs anything")
    return kept


def thought_spans(tokens: Sequence[bytes], start: bytes, end: bytes) -> Iterator[tuple[int, int]]:
    """[first, last) of the tokens strictly between each start mark and its end mark, or the document's end.

    Marks are found in the document's bytes, whichever tokens spell them. A token that also holds bytes of a mark is no
    thought. Within a span another start mark is text, and outside one an end mark is.

    Args:
        tokens: the bytes of each.
    """
    text = b"".join(tokens)
    ends = np.cumsum([len(token) for token in tokens])
    begins = ends - np.array([len(token) for token in tokens], ends.dtype)
    at = text.find(start)
    while at >= 0:
        inner = at + len(start)
        stop = text.find(end, inner)
        outer = len(text) if stop < 0 else stop
        first, last = int(np.searchsorted(begins, inner)), int(np.searchsorted(ends, outer, side="right"))
        yield first, max(first, last)
        at = -1 if stop < 0 else text.find(start, stop + len(end))


def entropy_factors(
    targets: SparseTargets | None, positions: npt.NDArray[np.integer], weight: float
) -> npt.NDArray[np.float32]:
    """1 + weight · H_t at some positions of a document, float32; 1 where there are no targets.

    Reference: PMetal's reasoning-aware loss has H_t divided by the largest of its batch. Here a position's weight
    depends on nothing but its document, so that the loss is the same however documents are batched.
    """
    factors = np.ones(len(positions), np.float32)
    if targets is not None:
        there = positions < len(targets)
        factors[there] += np.float32(weight) * targets.entropy[positions[there]]
    return factors


def _outcome(sequence: TokenSequence, column: str) -> float:
    value = sequence.columns[column]
    if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
        raise DatasetError(
            f"{sequence.where}: {column} is {value!r}, expected true, false or a number of at least 0; "
            "correct the row, or leave --outcome-column out"
        )
    return float(value)
