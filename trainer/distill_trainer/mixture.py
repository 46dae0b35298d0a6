"""Targets of several teachers made into one teacher's, position by position: their mixture, or the one that knew best.

A mixture is taken in probability space: p = sum_i s_i p_i with shares s_i that sum to 1. Entries of one id in several
teachers' targets are one entry.

- Of unbiased samples (weights w_i with E[w_i] = p_i) the entries sum_i s_i w_i are an unbiased sample of p, and what is
  linear in p (KL, soft cross-entropy) is served without bias. No entry knows its own probability any more.
- Of truncated teachers (top-k, top-p) p is kept over the union of their ids. A teacher says nothing of an id that only
  another one kept: that probability, at most its tail's, stays in the cell for the rest. So an entry is the
  probability that is known to be there, and the cell holds all else; entries and cell still sum to 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.targets import SparseTargets

Floats = npt.NDArray[np.floating]


def mixed(answers: Sequence[SparseTargets], shares: Sequence[float], *, unbiased: bool) -> SparseTargets:
    """The mixture of several answers to one document, over the positions that all of them answer.

    Args:
        answers: K of them, [P_i, k_i] each, at one temperature.
        shares: K, above 0, of sum 1.
        unbiased: they are unbiased samples, rather than truncated.

    Returns:
        [min P_i, sum k_i]; ids ascending within a row, the unused places after them with weight 0. `entropy` is the
        teachers' own, averaged by their shares; the mixture's real one is that or more.
    """
    rows = slice(min(map(len, answers)))
    answers = [answer.rows(rows) for answer in answers]
    ids = np.concatenate([answer.ids for answer in answers], axis=1)
    weights = np.concatenate(
        [share * answer.weights.astype(np.float64) for share, answer in zip(shares, answers, strict=True)], axis=1
    )
    ids, weights = summed_by_id(ids, weights)
    if unbiased:
        tail, head_count = np.ones(len(ids)), np.zeros(len(ids))
    else:
        tail = _weighed(shares, [np.exp(answer.log_tail_mass) for answer in answers])
        head_count = np.count_nonzero(weights, axis=1)
    with np.errstate(divide="ignore"):
        return SparseTargets(
            positions=answers[0].positions,
            ids=ids,
            weights=weights.astype(np.float32),
            head_count=head_count.astype(np.int32),
            log_tail_mass=np.log(tail).astype(np.float32),
            label_log_prob=np.log(_weighed(shares, [np.exp(answer.label_log_prob) for answer in answers])).astype(
                np.float32
            ),
            entropy=_weighed(shares, [answer.entropy for answer in answers]).astype(np.float32),
        )


def best_of(answers: Sequence[SparseTargets]) -> SparseTargets:
    """At each position the answer whose teacher gave the label the highest log-prob; of equals the first.

    Args:
        answers: [P_i, k_i] each. A position that some do not answer is that of the best of those that do.

    Returns:
        [max P_i, max k_i].
    """
    longest = max(answers, key=len)
    log_probs = np.full((len(answers), len(longest)), -np.inf)
    for number, answer in enumerate(answers):
        log_probs[number, : len(answer)] = answer.label_log_prob
    chosen = log_probs.argmax(axis=0)
    k = max(answer.ids.shape[1] for answer in answers)
    columns: dict[str, Any] = {"log_probs": None, "log_z": None, "hidden": None}
    for name in ("ids", "weights", "head_count", "log_tail_mass", "label_log_prob", "entropy", "log_probs"):
        parts = [getattr(answer, name) for answer in answers]
        if any(part is None for part in parts):
            continue
        column = np.zeros((len(longest), k) if parts[0].ndim == 2 else len(longest), parts[0].dtype)
        for number, part in enumerate(parts):
            at = np.flatnonzero(chosen == number)
            if part.ndim == 2:
                column[at, : part.shape[1]] = part[at]
            else:
                column[at] = part[at]
        columns[name] = column
    return replace(longest, **columns)


def _weighed(shares: Sequence[float], columns: Sequence[Floats]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = sum(
        (share * column.astype(np.float64) for share, column in zip(shares, columns, strict=True)),
        start=np.zeros(len(columns[0])),
    )
    return total


def summed_by_id(
    ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]:
    """Entries [P, K] with those of one id made one: ids ascending within a row, empty places (weight 0) last."""
    p, k = ids.shape
    sorted_ids = np.where(weights > 0, ids.astype(np.int64), np.iinfo(np.int64).max)  # empty places come last
    order = sorted_ids.argsort(axis=1, kind="stable")
    sorted_ids, weights = np.take_along_axis(sorted_ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
    first = np.ones((p, k), np.bool_)
    first[:, 1:] = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    place = first.cumsum(axis=1) - 1 + k * np.arange(p)[:, None]
    summed = np.zeros((p, k))
    np.add.at(summed.reshape(-1), place, weights)
    kept = np.zeros(p * k, np.uint32)
    there = weights > 0
    kept[place[there]] = sorted_ids[there]
    return kept.reshape((p, k)), summed
