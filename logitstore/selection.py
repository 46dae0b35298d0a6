"""What is kept of every position, as typed after `--select`, and the random numbers that the choice draws.

`cpu_selection` makes the choice in NumPy, `device_selection` where a GPU has the logits; both take these random numbers
and give a `Selected`. Every number is a function of (document, position, temperature, replica), never of when it is
drawn.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from logitstore.errors import ConfigError
from logitstore.philox import position_words, uniform

Kind = Literal["threshold", "random", "top-k", "top-p"]

BLOCK_SIZE = 64
"""The vocabulary is seen as 64 x B with B = ceil(V / 64): block b holds the ids b, b + B, b + 2B, ..."""

MOST_ENTRIES = 1 << 20
"""Of a position: what one takes in memory is bounded by it."""

_FORMS = "threshold:16, random:50, random:50:0.8, top-k:50 or top-p:0.95:50"


@dataclass(frozen=True)
class Selection:
    """`threshold:k`, `random:N[:exponent]`, `top-k:K` or `top-p:P:K`.

    Threshold and random are unbiased samples of the whole distribution: their weights sum to 1 (random with an exponent
    other than 1: only in the mean). Top-k and top-p keep the largest probabilities as they are, and the mass of the
    rest.
    """

    kind: Kind
    k: int
    """Entries of a position: exactly k for threshold, at most k for the others."""
    mass: float = 1.0
    """top-p: the shortest prefix whose probabilities reach this."""
    exponent: float = 1.0
    """random: ids are drawn in proportion to p^exponent."""

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Read what was typed.

        Raises:
            ConfigError: none of the forms, or a number that cannot be.
        """
        kind, *numbers = text.split(":")
        if kind not in get_args(Kind) or not all(re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", n) for n in numbers):
            raise ConfigError(f"selection {text!r} is not known; type --select {_FORMS}")
        match kind, numbers:
            case "top-p", [mass, count] if 0 < float(mass) <= 1:
                chosen = cls("top-p", _count(text, count), mass=float(mass))
            case "random", [count, exponent] if 0 < float(exponent) <= 2:
                chosen = cls("random", _count(text, count), exponent=float(exponent))
            case "threshold" | "random" | "top-k", [count]:
                chosen = cls(kind, _count(text, count))
            case _:
                raise ConfigError(f"selection {text!r} is not known; type --select {_FORMS}")
        if chosen.kind == "random" and chosen.k > 255:
            raise ConfigError(
                f"selection {text!r} draws {chosen.k} times, expected at most 255; type --select random:50"
            )
        return chosen

    def __str__(self) -> str:
        if self.kind == "top-p":
            return f"top-p:{_decimal(self.mass)}:{self.k}"
        return f"{self.kind}:{self.k}" + (f":{_decimal(self.exponent)}" if self.exponent != 1 else "")

    @property
    def unbiased(self) -> bool:
        """Whether E[weight_i] = p_i for every token of the vocabulary."""
        return self.kind in ("threshold", "random")

    def require_vocab(self, vocab_size: int) -> None:
        """Raise ConfigError where more entries are asked for than the vocabulary has tokens."""
        if self.kind != "random" and self.k > vocab_size:
            raise ConfigError(
                f"selection {self} keeps {self.k} entries, but the teacher's vocabulary has {vocab_size:,} tokens; "
                f"type --select {self.kind}:K with K of at most {vocab_size}"
            )


def _decimal(number: float) -> str:
    """As `parse` takes it: to 9 digits after the point, without an exponent."""
    return f"{number:.9f}".rstrip("0").rstrip(".")


def _count(text: str, number: str) -> int:
    if not number.lstrip("-").isdigit() or int(number) < 1:
        raise ConfigError(
            f"selection {text!r} keeps {number} entries; type a whole number of 1 or more, as in {_FORMS}"
        )
    if int(number) > MOST_ENTRIES:
        raise ConfigError(f"selection {text!r} keeps {number} entries, expected at most {MOST_ENTRIES}; type fewer")
    return int(number)


@dataclass(frozen=True, eq=False)
class Randomness:
    """The random numbers of N positions."""

    block_order: npt.NDArray[np.int64]
    """[N, B]; threshold: a random order of the vocabulary's blocks. Else [N, 0]."""
    draws: npt.NDArray[np.float64]
    """In [0, 1). threshold: [N, 1], where systematic sampling starts; random: [N, k], one a draw. Else [N, 0]."""
    rounding: npt.NDArray[np.float64]
    """[N, k + 1] in [0, 1); the codec's stochastic rounding."""


@dataclass(frozen=True, eq=False)
class Selected:
    """The kept entries of N positions at full precision: what the codec takes."""

    ids: npt.NDArray[np.uint32]
    """[N, k]; the head by falling value, then the sampled tail by rising id, then zeros."""
    values: npt.NDArray[np.float64]
    """[N, k]; probabilities of the entries, head and tail (random: their weights); 0 after the last entry."""
    head_count: npt.NDArray[np.int32]
    """[N]; how many leading entries stand for themselves. All that there are, but for threshold."""
    tail_mass: npt.NDArray[np.float64]
    """[N]; probability outside the head, summed from the logits, never 1 minus the head. random: 0."""
    label_log_prob: npt.NDArray[np.float64]
    """[N]; at temperature 1, as is the entropy."""
    entropy: npt.NDArray[np.float64]
    """[N]"""


def block_count(vocab_size: int) -> int:
    """How many blocks of 64 ids cover the vocabulary."""
    return -(-vocab_size // BLOCK_SIZE)


def randomness(
    document_key: bytes,
    positions: npt.NDArray[np.int64],
    selection: Selection,
    vocab_size: int,
    *,
    seed: int,
    temperature_index: int = 0,
    replica: int = 0,
) -> Randomness:
    """Draw what the selection and the codec need for these positions of a document."""
    blocks = block_count(vocab_size) if selection.kind == "threshold" else 0
    draws = {"threshold": 1, "random": selection.k}.get(selection.kind, 0)
    words = position_words(
        document_key,
        positions,
        blocks + draws + selection.k + 1,
        seed=seed,
        replica=replica,
        temperature_index=temperature_index,
    )
    return Randomness(
        block_order=np.argsort(words[:, :blocks], axis=1, kind="stable"),
        draws=uniform(words[:, blocks : blocks + draws]),
        rounding=uniform(words[:, blocks + draws :]),
    )
