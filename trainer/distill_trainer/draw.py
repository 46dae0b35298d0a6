"""Which documents an epoch takes, and in which order: the draw that `batches.epochs` makes batches of. NumPy alone.

An epoch is always as long as there are documents. By default it takes each once. With shares of groups, each group
gives its share of the epoch: a smaller one is gone through several times, of a larger one other documents come every
time. With weights, documents are drawn with replacement in proportion to them, within their group where there are
groups. With ranks, the first epoch goes from low to high ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Draw:
    """How D documents are drawn, by their numbers."""

    groups: tuple[npt.NDArray[np.int64], ...]
    """The documents of each group; together all D."""
    shares: tuple[float, ...]
    """Of an epoch, for each group."""
    weights: npt.NDArray[np.float64] | None = None
    """[D]"""
    ranks: npt.NDArray[np.float64] | None = None
    """[D]"""

    def epoch(self, rng: np.random.Generator, number: int) -> tuple[npt.NDArray[np.int64], bool]:
        """The documents of an epoch, and whether they are to be kept in this order: by rank, equal ones at random."""
        drawn = [self._of(group, count, rng) for group, count in zip(self.groups, self.counts(), strict=True) if count]
        order = drawn[0] if len(drawn) == 1 and self.weights is None else rng.permutation(np.concatenate(drawn))
        if self.ranks is None or number > 0:
            return order, False
        return order[np.argsort(self.ranks[order], kind="stable")], True

    def counts(self) -> list[int]:
        """How many documents of an epoch each group gives: its share, what is left over by largest remainders."""
        return by_shares(sum(map(len, self.groups)), self.shares)

    def _of(self, group: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        if self.weights is not None:
            of_group = self.weights[group]
            return rng.choice(group, count, p=of_group / of_group.sum())
        rounds = [rng.permutation(group) for _ in range(math.ceil(count / len(group)))]
        return np.concatenate(rounds)[:count]


def by_shares(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers of this total in proportion to shares; of equal remainders the first is rounded up."""
    exact = np.array(shares, np.float64) * total / sum(shares)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]
