"""Which of several stores teaches a position.

    --store A --store B                                       in order: the first that answers a document; one teacher
    --store A=0.7 --store B=0.3                               a mixture: 0.7 p_A + 0.3 p_B
    --store A --store B --combine label                       position by position, who gave the label more
    --store A=math --store B=code --combine column:subject    by the document's value in a column of the dataset

All but the first are of several teachers (`teachers`), whose tokenizers may differ (`several_crossings`).
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from distill_trainer.losses import LINEAR
from distill_trainer.teachers import Answering, ByLabel, Mixture, Teachers, common_recipe, in_order
from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.measures import require_known
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.stack import Stack

By = Literal["order", "mixture", "label", "column"]
FORM = (
    "type --store A=0.7 --store B=0.3, --store A --store B --combine label, or --store A=VALUE --store B=VALUE "
    "--combine column:NAME"
)


@dataclass(frozen=True)
class Combination:
    """`--store` and `--combine`, read."""

    by: By
    paths: tuple[str, ...]
    shares: tuple[float, ...] = ()
    """Of a mixture, one a path; their sum is 1."""
    column: str | None = None
    values: tuple[str, ...] = ()
    """Of the column, one a path."""

    @classmethod
    def parse(cls, stores: Sequence[str], combine: str | None) -> "Combination":
        """Read what was typed. What follows the last = of a path is a share where it is a number.

        Raises:
            ConfigError: saying what to type.
        """
        split = [text.rpartition("=") for text in stores]
        shares = [_number(share) for _, _, share in split]
        way, _, column = (combine or "").partition(":")
        if combine is None:
            if not any(share is not None for share in shares):
                return cls("order", tuple(stores))
            for text, share in zip(stores, shares, strict=True):
                if share is None or not 0 < share < math.inf:
                    raise ConfigError(f"--store {text} gives no share above 0, and another --store gives one; {FORM}")
            _require_several(stores, "a share (a path that ends in =NUMBER: type a / after it)")
            most = max(share for share in shares if share is not None)
            given = [share / most for share in shares if share is not None]  # whose sum overflows nothing
            return cls("mixture", _distinct([path for path, _, _ in split]), tuple(s / sum(given) for s in given))
        if combine == "label":
            _require_several(stores, "--combine")
            return cls("label", _distinct(stores))
        if way != "column" or not column:
            raise ConfigError(f"--combine {combine} is no way to combine stores; {FORM}")
        for text, (path, equals, value) in zip(stores, split, strict=True):
            if not (path and equals and value):
                raise ConfigError(
                    f"--store {text} does not say which {column} it teaches; type --store {path or value}=VALUE"
                )
        _require_several(stores, "--combine")
        paths, values = [path for path, _, _ in split], [value for _, _, value in split]
        if len(set(values)) < len(values):
            raise ConfigError(f"--store names one {column} twice, {', '.join(values)}; type each once")
        return cls("column", tuple(paths), column=column, values=tuple(values))

    @property
    def several(self) -> bool:
        """Whether the stores are of several teachers."""
        return self.by != "order"

    @property
    def named(self) -> str:
        """The stores, for messages."""
        return " and ".join(self.paths)

    def require_losses(self, names: Sequence[str], recipe: Recipe) -> None:
        """Check that what the stores serve together serves these losses, each of which every one of them serves.

        Raises:
            IncompatibleStoreError: a mixture of samples, and a loss that is not linear in p.
        """
        if self.by == "mixture" and recipe.selection.unbiased:
            for name in names:
                if name not in LINEAR:
                    raise IncompatibleStoreError(
                        f"a mixture of {self.named} cannot serve --loss {name}: of samples ({recipe.selection}) it "
                        "does not tell an entry's probability; type `logitstore build --select top-k:50` for other "
                        f"stores, or --loss {'|'.join(LINEAR)}"
                    )

    def over(self, stores: Sequence[Store]) -> Teachers:
        """The teachers that stores stand for: one store a path, but in order perhaps fewer, those that are there.

        Raises:
            IncompatibleStoreError: stores that do not go together.
            ConfigError: no temperature that all serve.
        """
        if self.by == "order":
            for store in stores[1:]:
                store.manifest.require_compatible(stores[0].manifest, store.path)
            return in_order(stores)
        recipe = common_recipe(stores, mixes=self.by == "mixture")
        if self.by == "column":
            by_value = {value: Stack([store]) for value, store in zip(self.values, stores, strict=True)}
            column, nobody = self.column, Stack([])
            return Teachers(stores, recipe, lambda s: by_value.get(str(s.columns[column or ""]), nobody))
        one: Answering
        if self.by == "mixture":
            one = Mixture(stores, recipe, self.shares)
        else:
            for store in stores:
                require_known(store.manifest, ["nll"], store.path)
            one = ByLabel(stores, recipe)
        return Teachers(stores, recipe, lambda _: one)

    def say(self, teachers: Teachers, sequences: Sequence[TokenSequence], say: Callable[[str], object]) -> None:
        """Say who teaches what.

        Raises:
            ConfigError: a store that teaches no document, with the nearest value that there is.
        """
        names = [f"{s.path} (teacher {s.manifest.teacher.name})" for s in teachers.stores]
        if self.by == "mixture":
            shares = [f"{s:.3g} of {name}" for s, name in zip(self.shares, names, strict=True)]
            say(f"the teacher is a mixture: {' + '.join(shares)}")
        elif self.by == "label":
            say(f"at each position the one that gave the label more: {', '.join(names)}")
        elif self.column is not None:
            found = [str(sequence.columns[self.column]) for sequence in sequences]
            self._require_taught(set(found))
            counts = [
                f"{found.count(value):,} of {value} by {name}" for value, name in zip(self.values, names, strict=True)
            ]
            others = sum(value not in self.values for value in found)
            say(f"documents: {', '.join(counts)}; {others:,} of another {self.column}, which no store answers")

    def _require_taught(self, found: set[str]) -> None:
        """Check that every store teaches some of the values that documents have."""
        for value in self.values:
            if value not in found:
                near = difflib.get_close_matches(value, found, 1)
                raise ConfigError(
                    f"no document has {value} as its {self.column}; "
                    + (f"did you mean {near[0]}? " if near else "")
                    + f"type --store with one of {', '.join(sorted(found)[:5])}"
                )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _require_several(stores: Sequence[str], what: str) -> None:
    if len(stores) < 2:
        raise ConfigError(f"{what} is given, and {len(stores)} store; several are combined: {FORM}")


def _distinct(paths: Sequence[str]) -> tuple[str, ...]:
    if len(set(paths)) < len(paths):
        raise ConfigError(f"--store names one store twice, {', '.join(paths)}; type each once")
    return tuple(paths)
