"""Targets in batches, as a training loop takes them: padded arrays, or the codes for a kernel that decodes by itself.

Stands between a store and a trainer. Nothing is shuffled here; a second thread reads ahead.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitstore.codec import Codes, concatenated, weights
from logitstore.contract import Store
from logitstore.prefetch import prefetched

Documents = Sequence[npt.NDArray[np.integer]]
AHEAD = 4


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """The targets of B documents, padded to the T positions of the longest answer. What lies beyond is zero."""

    ids: npt.NDArray[np.uint32]
    """[B, T, k]"""
    weights: npt.NDArray[np.float32]
    """[B, T, k]"""
    tail_mass: npt.NDArray[np.float32]
    """[B, T]; probability outside the head."""
    positions: npt.NDArray[np.int32]
    """[B]; how many leading positions are answered: 0 is a miss, L - 1 the whole document."""


def read_batches(
    store: Store, batches: Iterable[Documents], temperature: float | None = None, replica: int = 0
) -> Iterator[TargetBatch]:
    """Look up batches of documents (rows of token ids [L]), and decode each batch at once.

    Raises:
        ConfigError, CorruptStoreError, ValueError: as `Store.codes`, at the batch that it concerns.
    """
    return prefetched((_padded(store, codes) for codes in _answers(store, batches, temperature, replica)), AHEAD)


def read_codes(
    store: Store, batches: Iterable[Documents], temperature: float | None = None, replica: int = 0
) -> Iterator[list[Codes | None]]:
    """The same without decoding: for each document its codes, or None.

    Raises:
        ConfigError, CorruptStoreError, ValueError: as `Store.codes`, at the batch that it concerns.
    """
    return prefetched(_answers(store, batches, temperature, replica), AHEAD)


def _answers(
    store: Store, batches: Iterable[Documents], temperature: float | None, replica: int
) -> Iterator[list[Codes | None]]:
    for documents in batches:
        yield store.codes(documents, temperature, replica)


def _padded(store: Store, answers: list[Codes | None]) -> TargetBatch:
    recipe = store.manifest.recipe
    positions = np.array([0 if codes is None else len(codes.tail) for codes in answers], np.int32)
    shape = len(answers), int(positions.max(initial=0)), recipe.selection.k
    batch = TargetBatch(
        np.zeros(shape, np.uint32), np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32), positions
    )
    found = [codes for codes in answers if codes is not None]
    if not found:
        return batch
    every = concatenated(found)
    values, tail_mass = weights(every, recipe.form)
    ends = np.cumsum(positions).tolist()
    for row, (end, n) in enumerate(zip(ends, positions.tolist(), strict=True)):
        at, rows = (row, slice(n)), slice(end - n, end)
        batch.ids[at], batch.weights[at], batch.tail_mass[at] = every.ids[rows], values[rows], tail_mass[rows]
    return batch
