"""Chooses what is trained on from what the stores know: `--filter`, `--sample`, `--curriculum`, `--mix`.

Stands between the documents and the batches. What is left out is left out here, once, and said; how the rest is drawn
is a `Draw`, so that the order of a run stays a function of its seed and of how many batches it has taken.

Measures (`logitstore.measures`) are taken over a document's trained positions, as far as a store answers them. Where
none is answered there is no measure: a filter or a sample leaves such a document out, a curriculum puts it last.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distill_trainer.config import TrainConfig
from distill_trainer.draw import Draw, by_shares
from distill_trainer.mix import Mix
from distill_trainer.teachers import Teachers
from logitstore.condition import Condition
from logitstore.errors import ConfigError, MissingTargetsError
from logitstore.measures import Measures, measure, require_known
from logitstore.sequences import TokenSequence

Values = npt.NDArray[np.float64]


def choose(
    config: TrainConfig, teachers: Teachers, sequences: list[TokenSequence], say: Callable[[str], object]
) -> tuple[list[TokenSequence], Draw | None]:
    """The documents that the run trains on, and how they are drawn; None: each once an epoch.

    Raises:
        ConfigError: a measure that a store does not know, a group of no documents, or no document is left.
        MissingTargetsError: measures are asked for, and no document has any.
        CorruptStoreError: a store's bytes are not those that were written.
    """
    if not config.chooses:
        return sequences, None
    kept, weights, ranks = _by_measure(config, teachers, sequences, say)
    if not len(kept):
        raise ConfigError(
            f"of {len(sequences):,} documents none is left to train on; "
            "type --filter or --sample with another measure, or leave it out"
        )
    groups, shares = [kept], [1.0]
    if config.mix is not None:
        mix = Mix.parse(config.mix)
        values = [str(sequences[number].columns[mix.column]) for number in kept.tolist()]
        groups, shares = [kept[numbers] for numbers in mix.groups(values)], list(mix.shares.values())
        counts = by_shares(sum(map(len, groups)), shares)
        said = ", ".join(
            f"{count:,} of {value} (of {len(group):,})"
            for value, count, group in zip(mix.shares, counts, groups, strict=True)
        )
        say(f"--mix {mix.column}: an epoch draws {said}; {len(kept) - sum(counts):,} documents are of no group")
        if 0 in counts:
            raise ConfigError(f"--mix {config.mix} leaves a group without a document: {said}; type nearer shares")
    taken = np.concatenate(groups)
    ends = np.cumsum([len(group) for group in groups])
    draw = Draw(
        groups=tuple(np.split(np.arange(len(taken)), ends[:-1])),
        shares=tuple(shares),
        weights=None if weights is None else weights[taken],
        ranks=None if ranks is None else ranks[taken],
    )
    return [sequences[number] for number in taken.tolist()], draw


def _by_measure(
    config: TrainConfig, teachers: Teachers, sequences: Sequence[TokenSequence], say: Callable[[str], object]
) -> tuple[npt.NDArray[np.int64], Values | None, Values | None]:
    """The documents that the measures leave, and of all documents the weights of a sample and ranks of a curriculum."""
    conditions = [Condition.parse(text, "--filter") for text in config.filter]
    of_store = [name for name in config.measures if name != "length"]
    for store in teachers.stores:
        require_known(store.manifest, of_store, store.path)
    asked = teachers if of_store else None
    kept, unmeasured = np.ones(len(sequences), np.bool_), np.zeros(len(sequences), np.bool_)
    values = {name: np.empty(len(sequences)) for name in (config.sample, config.curriculum) if name}
    bar = tqdm(sequences, desc="measure", unit="doc", delay=1, leave=False, disable=config.quiet)
    for number, sequence in enumerate(bar):
        measures = _measured(sequence, asked)
        kept[number] = all(condition.holds(measures) for condition in conditions)
        unmeasured[number] = asked is not None and not measures.positions
        for name, column in values.items():
            column[number] = measures.value(name)
    if conditions:
        flags = " ".join(f"--filter '{condition}'" for condition in conditions)
        say(f"{flags}: {kept.sum():,} of {len(sequences):,} documents are kept")
    weights = values[config.sample] if config.sample else None
    ranks = np.nan_to_num(values[config.curriculum], nan=np.inf) if config.curriculum else None
    if weights is not None:
        kept &= weights > 0
        say(f"--sample {config.sample}: an epoch draws {kept.sum():,} times from as many documents, with replacement")
    if unmeasured.all():
        raise MissingTargetsError(
            f"no store answers any of the {len(sequences):,} documents, so none has a measure (were they built with "
            f"--max-seq-length {config.max_seq_length} too?); type --store with another"
        )
    if unmeasured.any():
        place = "last in the first epoch" if (kept & unmeasured).any() else "left out"
        say(f"{unmeasured.sum():,} of {len(sequences):,} documents are in no store and have no measure: {place}")
    return np.flatnonzero(kept), weights, ranks


def _measured(sequence: TokenSequence, teachers: Teachers | None) -> Measures:
    found = None if teachers is None else sequence.own(teachers.of(sequence).get(sequence.asked_ids))
    if found is None:
        return Measures(0, len(sequence.token_ids), math.nan, math.nan, math.nan)
    return measure(sequence.token_ids, found, sequence.trained)
