"""Do the targets belong to these tokens? Seen from the documents themselves, before they are handed on.

A cache whose rows are one position off, or whose tokens are another order's, passes every check of shapes and trains a
student to predict the wrong token. But a teacher gives the token that follows far more than a token picked at random:
about as much as its own expected probability, the sum of p². That is looked at here for the first few thousand
positions. Nothing is shifted here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError
from logitstore.foreign.document import ForeignDocument

ENOUGH = 4096  # positions; looked at no further
_MIN_SHIFT, _MIN_ORDER = 64, 256  # positions before a judgement
_RATIO, _MARGIN = 1.5, 0.1  # of another shift's mass over the declared one's; the thresholds axolotl warns at
_LEAST = 0.2  # of the teacher's own expectation


@dataclass
class _Tally:
    """Sums over the positions t looked at that have tokens t, t + 1 and t + 2."""

    positions: int = 0
    mass: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """[3]; probability given to tokens t, t + 1 and t + 2."""
    expected: float = 0.0
    """Sum of p²."""

    def add(self, document: ForeignDocument) -> None:
        rows = np.flatnonzero(np.isfinite(document.log_probs[:-1]).any(axis=1))[: ENOUGH - self.positions]
        probs = np.exp(document.log_probs[rows])
        for shift in range(3):
            labels = document.token_ids[rows + shift]
            self.mass[shift] += probs[document.ids[rows] == labels[:, None]].sum()
        self.expected += float((probs**2).sum())
        self.positions += len(rows)


def aligned(documents: Iterator[ForeignDocument], advice: str) -> Iterator[ForeignDocument]:
    """Hand the documents on as long as their targets fit their tokens.

    Args:
        advice: what to type where they do not.

    Raises:
        DatasetError: at least 64 positions give another token than the next clearly more probability, or at least 256
            give the next token less than a fifth of what the teacher itself expects.
    """
    tally = _Tally()
    for document in documents:
        if tally.positions < ENOUGH:
            tally.add(document)
            _judge(tally, document.where, advice)
        yield document


def _judge(tally: _Tally, where: str, advice: str) -> None:
    if not tally.positions:
        return
    mass = tally.mass / tally.positions
    other = 0 if mass[0] > mass[2] else 2
    if tally.positions >= _MIN_SHIFT and mass[other] > max(_RATIO * mass[1], mass[1] + _MARGIN):
        raise DatasetError(
            f"{where}: over {tally.positions} positions the targets give token t + 1 {mass[1]:.1%} and token "
            f"t + {other} {mass[other]:.1%}, expected most on token t + 1; {advice}"
        )
    expected = tally.expected / tally.positions
    if tally.positions >= _MIN_ORDER and mass[1] < _LEAST * expected:
        raise DatasetError(
            f"{where}: over {tally.positions} positions the targets give the next token {mass[1]:.1%}, expected about "
            f"{expected:.1%}: they belong to other tokens; {advice}"
        )
