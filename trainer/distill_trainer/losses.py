"""Which loss a run trains on: its name on the command line, what a store must keep for it, and its mathematics.

    --loss NAME[:NUMBER][=WEIGHT]     as in `kl`, `jsd:0.3`, or twice: `kl=0.7`, `reverse-kl=0.3`

A store serves a loss without bias or not at all: what it lacks is refused with the flag of `logitstore build` that
keeps it.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill_kernels import (
    JSD,
    TVD,
    BucketLoss,
    ForwardKL,
    HingeRank,
    LogisticRank,
    LogitsLoss,
    ReverseKL,
    SampledLoss,
    SkewKL,
    SkewReverseKL,
    SoftCE,
    SparseKL,
    TaidLoss,
    WeightedLoss,
)
from distill_kernels.bucket import FlooredReverseKL
from distill_kernels.divergence import Divergence
from distill_kernels.merged import MergedLoss
from distill_kernels.sorted_l1 import SortedL1

from distill_trainer.spans import OfSpans
from distill_trainer.taid import START
from logitstore.codec import LEAST
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.recipe import Recipe

Loss = LogitsLoss | WeightedLoss | MergedLoss | SortedL1
AnyLoss = Loss | OfSpans
"""Of rows one by one, or of spans of them."""
LIVE = "the teacher"
"""Stands in messages for a store, where one is not to blame."""

_DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "kl": ForwardKL,
    "reverse-kl": ReverseKL,
    "jsd": JSD,
    "skew-kl": SkewKL,
    "skew-reverse-kl": SkewReverseKL,
    "tvd": TVD,
}
LINEAR = ("kl", "soft-ce")
"""Losses that are linear in the teacher's probabilities, but for what does not depend on the student."""
NAMES = (*_DIVERGENCES, "soft-ce", "taid", "hinge-rank", "logistic-rank")
_NUMBERED = {"jsd": "beta", "skew-kl": "lambda", "skew-reverse-kl": "lambda", "taid": "t_start", "hinge-rank": "margin"}
"""Losses with a number of their own, and what it is called."""


@dataclass(frozen=True)
class Term:
    """One `--loss`."""

    name: str
    number: float | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Term":
        """Read NAME[:NUMBER][=WEIGHT].

        Raises:
            ConfigError: saying what to type.
        """
        named, equals, weight = text.partition("=")
        name, colon, number = named.partition(":")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"--loss {text} names no loss; {hint}type --loss {'|'.join(NAMES)}")
        if colon and name not in _NUMBERED:
            raise ConfigError(f"--loss {text} gives {name} a number, and it has none; type --loss {name}")
        term = cls(name, _number(text, number) if colon else None, _number(text, weight) if equals else 1.0)
        if not 0 < term.weight < math.inf:
            raise ConfigError(f"--loss {text} weighs {term.weight:g}, expected a number above 0; type --loss {named}=1")
        if term.number is not None and name != "hinge-rank" and not 0 < term.number < 1:
            raise ConfigError(
                f"--loss {text} has {_NUMBERED[name]} {term.number:g}, expected a number between 0 and 1; "
                f"type --loss {name}:0.5"
            )
        return term

    @property
    def own(self) -> tuple[float, ...]:
        """The loss's own number, where one was given."""
        return () if self.number is None else (self.number,)

    def loss(self, recipe: Recipe, temperature: float, where: str) -> LogitsLoss:
        """The loss on what a recipe keeps.

        Raises:
            IncompatibleStoreError: it keeps too little.
        """
        selection = recipe.selection
        if self.name in ("hinge-rank", "logistic-rank"):
            if selection.unbiased:
                raise _lacking(self.name, where, f"a sample ({selection}) has no order", "--select top-k:50")
            return (
                LogisticRank(temperature)
                if self.name == "logistic-rank"
                else HingeRank(temperature, margin=self.number)
            )
        if self.name == "taid":
            if selection.unbiased:
                raise _lacking(
                    self.name, where, f"a sample ({selection}) does not tell the probabilities", "--select top-k:50"
                )
            return TaidLoss(temperature, interpolation=START if self.number is None else self.number)
        if self.name == "soft-ce":
            if not selection.unbiased:
                raise _lacking(self.name, where, f"{selection} keeps a part of the mass", "--select threshold:16")
            return SoftCE(temperature)
        divergence = _DIVERGENCES[self.name](*self.own)
        if not selection.unbiased and self.name == "reverse-kl":
            return FlooredReverseKL(temperature, least=LEAST)  # less is kept as none
        if not selection.unbiased:
            return BucketLoss(temperature, divergence=divergence)
        if self.name == "kl":
            return SparseKL(temperature)
        if not recipe.tail_log_probs:
            flag = "--tail-log-probs" if selection.kind == "threshold" else "--select threshold:16 --tail-log-probs"
            flag = "--select top-k:50" if where == LIVE else flag
            raise _lacking(self.name, where, "a sample needs its entries' own probabilities", flag)
        return SampledLoss(temperature, divergence=divergence)


def loss_of(terms: Sequence[str], recipe: Recipe, temperature: float, where: str) -> LogitsLoss | WeightedLoss:
    """The loss that a run asks for, on what a store or a live teacher keeps.

    Args:
        terms: as typed, at least one.
        where: names the store, for messages.

    Raises:
        ConfigError: a term that is none.
        IncompatibleStoreError: a loss that the recipe does not serve without bias.
    """
    parsed = [Term.parse(text) for text in terms]
    made = [(term.weight, term.loss(recipe, temperature, where)) for term in parsed]
    return made[0][1] if len(made) == 1 and made[0][0] == 1 else WeightedLoss(tuple(made))


def _lacking(name: str, where: str, why: str, flag: str) -> IncompatibleStoreError:
    keep = flag if where == LIVE else f"`logitstore build {flag}` for another store"
    return IncompatibleStoreError(f"{where} cannot serve --loss {name}: {why}; type {keep}, or --loss kl")


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise ConfigError(f"--loss {text}: {number!r} is no number; type --loss NAME[:NUMBER][=WEIGHT]") from error
