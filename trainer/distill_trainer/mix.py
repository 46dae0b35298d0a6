"""`--mix source:math=2,code=1`: groups of documents by a column of the dataset, and each one's share of an epoch."""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from logitstore.errors import ConfigError

_FORM = "type --mix COLUMN:VALUE=SHARE,VALUE=SHARE, as in --mix source:math=2,code=1"


@dataclass(frozen=True)
class Mix:
    """One `--mix`."""

    column: str
    shares: dict[str, float]
    """By the column's value; documents of others are left out."""

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """Read COLUMN:VALUE=SHARE,VALUE=SHARE,...

        Raises:
            ConfigError: it is none, names a value twice, or a share is no number above 0.
        """
        column, colon, rest = text.partition(":")
        shares: dict[str, float] = {}
        for part in rest.split(","):
            value, equals, share = part.rpartition("=")
            try:
                number = float(share)
            except ValueError:
                number = math.nan
            if not (column and colon and equals and value and 0 < number < math.inf):
                raise ConfigError(f"--mix {text!r} gives {part!r}, expected VALUE=SHARE above 0; {_FORM}")
            if value in shares:
                raise ConfigError(f"--mix {text!r} names {value} twice; type each once")
            shares[value] = number
        if math.isinf(sum(shares.values())):
            raise ConfigError(
                f"--mix {text!r} has shares whose sum is no number; type smaller ones, as in math=2,code=1"
            )
        return cls(column, shares)

    def groups(self, values: Sequence[str]) -> list[list[int]]:
        """The numbers of the documents in each group, given each document's value.

        Raises:
            ConfigError: a group without documents, with the nearest value that there is.
        """
        members: dict[str, list[int]] = {value: [] for value in self.shares}
        for number, value in enumerate(values):
            if value in members:
                members[value].append(number)
        there = Counter(values)
        for value, numbers in members.items():
            if not numbers:
                nearest = difflib.get_close_matches(value, there, 1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                common = ", ".join(name for name, _ in there.most_common(5))
                raise ConfigError(
                    f"--mix names {value}, which no document has as its {self.column}; {hint}type one of {common}"
                )
        return list(members.values())
