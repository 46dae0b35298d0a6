"""A document with its targets, as another tool's cache tells it: what every foreign reader yields.

Stands between the readers of other formats and the writing of a store. What a format leaves to the importer (sorting,
padding, the tail's mass) and what every one of them may get wrong is settled here, once. Nothing is re-tempered or
rounded here, and nothing renormalised.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError

MAX_ID = 2**31 - 1
_ROUNDING = 0.01  # nats: what a log-softmax in short floats may come out above 0
_MAX_MEDIAN_MASS = 1.5  # DistillKit's smallest recommended codec reaches 1.1 at single positions, never at most of them


@dataclass(frozen=True, eq=False)
class ForeignDocument:
    """One document of L tokens and what the teacher said at each of its L - 1 positions. Natural logarithms."""

    token_ids: npt.NDArray[np.int32]
    """[L]"""
    ids: npt.NDArray[np.uint32]
    """[L - 1, k]; row t is about token t + 1. By falling log-prob; padding, id 0, at the end."""
    log_probs: npt.NDArray[np.float64]
    """[L - 1, k]; over the whole vocabulary at temperature 1, unless the source's `unknown` has "tail mass": then over
    the kept entries alone. -inf is padding; a row of nothing else is a position of which the cache says nothing."""
    log_tail_mass: npt.NDArray[np.float64]
    """[L - 1]; log of the probability outside the kept entries: 0 where nothing is kept, -inf where they sum to 1 or
    more, which a lossy codec's may."""
    where: str
    """The file and the row, for messages."""

    @property
    def label_log_prob(self) -> npt.NDArray[np.float64]:
        """[L - 1]; the log-prob of token t + 1, NaN where it is not among the kept entries."""
        kept = (self.ids == self.token_ids[1:, None]) & np.isfinite(self.log_probs)
        found = np.where(kept, self.log_probs, 0).sum(axis=1)
        return np.where(kept.any(axis=1), found, np.nan)


@dataclass(frozen=True, eq=False)
class ForeignSource:
    """A cache of another tool, open for reading."""

    format: str
    """Its name, as after `--format`."""
    documents: Iterator[ForeignDocument]
    """In the cache's order; read once. Raises DatasetError on a document that cannot be read."""
    unknown: tuple[str, ...]
    """What the format does not record: the importer asks for it, or marks it as unknown."""
    known: Mapping[str, str | int]
    """What it does record of the teacher and of itself."""


def foreign_document(
    token_ids: npt.NDArray[np.integer[Any]],
    ids: npt.NDArray[np.integer[Any]],
    log_probs: npt.NDArray[np.floating[Any]],
    where: str,
    *,
    vocab_size: int = MAX_ID + 1,
) -> ForeignDocument:
    """Sort, pad and check what a reader found; log_tail_mass = log(1 - sum of the kept probabilities).

    Args:
        token_ids: [L], L of 2 or more.
        ids: [L - 1, k], row t about token t + 1, in any order.
        log_probs: [L - 1, k], -inf for an entry that is none, whatever its id.
        vocab_size: above every id.

    Raises:
        DatasetError: rows that are no document with its targets.
    """
    if ids.shape != log_probs.shape or len(ids) != len(token_ids) - 1:
        raise DatasetError(
            f"{where}: found {len(token_ids)} tokens, ids of shape {ids.shape} and log-probs of shape "
            f"{log_probs.shape}; expected one row of both for each token but the first; write the cache again"
        )
    values = log_probs.astype(np.float64)
    bad = np.isnan(values) | (values > _ROUNDING)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DatasetError(
            f"{where}: found log-prob {values[row, column]:g} at position {row}, expected at most 0; "
            "write the cache again, or leave this row out"
        )
    _require_within(token_ids, vocab_size, "token", where)
    values = np.minimum(values, 0)
    padding = np.isneginf(values)
    entries = np.where(padding, 0, ids.astype(np.int64))
    _require_within(entries, vocab_size, "id", where)
    _require_distinct(entries, padding, where)

    order = np.argsort(-values, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1)
    log_mass = log_sum_exp(values)
    if len(values) and (median := float(np.median(np.exp(log_mass)))) > _MAX_MEDIAN_MASS:
        raise DatasetError(
            f"{where}: the kept probabilities of a position sum to {median:.3g} (median), expected at most 1; "
            "name the settings that the cache was written with"
        )
    return ForeignDocument(
        token_ids=token_ids.astype(np.int32),
        ids=np.take_along_axis(entries, order, axis=1).astype(np.uint32),
        log_probs=values,
        log_tail_mass=_log_rest(log_mass),
        where=where,
    )


def log_sum_exp(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log sum_j exp(values[:, j]), [N] from [N, k]; -inf for a row of -inf alone."""
    top = values.max(axis=1, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite and NaN values are refused by who asks
        return np.asarray(top + np.log(np.exp(values - top[:, None]).sum(axis=1)), np.float64)


def _log_rest(log_mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log(1 - exp(log_mass)), -inf from 0 on.

    Reference: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    below = np.minimum(log_mass, 0)
    with np.errstate(divide="ignore"):
        return np.where(below > -np.log(2), np.log(-np.expm1(below)), np.log1p(-np.exp(np.minimum(below, -0.5))))


def _require_distinct(ids: npt.NDArray[np.int64], padding: npt.NDArray[np.bool_], where: str) -> None:
    """Raise where one position names an id twice: its probability would be counted twice."""
    marks = np.sort(np.where(padding, -1 - np.arange(ids.shape[1]), ids), axis=1)
    twice = marks[:, 1:] == marks[:, :-1]
    if twice.any():
        row, column = np.argwhere(twice)[0]
        raise DatasetError(
            f"{where}: found id {marks[row, column]} twice at position {row}, expected each id once; "
            "name the settings that the cache was written with, or write it again"
        )


def _require_within(values: npt.NDArray[np.integer[Any]], vocab_size: int, what: str, where: str) -> None:
    least, largest = int(values.min(initial=0)), int(values.max(initial=0))
    if least < 0 or largest >= vocab_size:
        raise DatasetError(
            f"{where}: found {what} {least if least < 0 else largest}, expected 0 to {vocab_size - 1}; "
            "name the settings that the cache was written with, or write it again"
        )
