"""A condition on a document's measures, as it is typed: `nll<2.5`, `length>=100`, `teacher-correct:0.8`.

    MEASURE OPERATOR NUMBER     a name of `logitstore.measures`; < <= > >= or =
    teacher-correct[:SHARE]     the same as correct>=SHARE; 0.5 unless given

A measure that is not known fulfils none.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logitstore.errors import ConfigError
from logitstore.measures import Measures, require_name

TEACHER_CORRECT = "teacher-correct"
SHARE = 0.5
"""Of a document's positions: at least so many labels are the teacher's likeliest token."""
_COMPARE: dict[str, Callable[[Any, float], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}


@dataclass(frozen=True)
class Condition:
    """One condition."""

    name: str
    operator: str
    number: float

    @classmethod
    def parse(cls, text: str, flag: str = "--where") -> "Condition":
        """Read what was typed.

        Raises:
            ConfigError: neither form, an unknown measure (with the nearest), or a share beyond 0 to 1.
        """
        named, colon, share = text.strip().partition(":")
        if named == TEACHER_CORRECT:
            number = _number(share) if colon else SHARE
            if number is None or not 0 <= number <= 1:
                raise ConfigError(
                    f"{flag} {text!r} has the share {share!r}, expected 0 to 1; type {flag} {TEACHER_CORRECT}:0.5"
                )
            return cls("correct", ">=", number)
        parts = re.fullmatch(r"\s*([A-Za-z_-]+)\s*(<=|>=|==|<|>|=)\s*(\S+)\s*", text)
        number = _number(parts[3]) if parts else None
        if parts is None or number is None:
            raise ConfigError(
                f"{flag} {text!r} is no condition; type {flag} 'nll<2.5', in quotes, or {flag} {TEACHER_CORRECT}"
            )
        require_name(parts[1], f"{flag} {text!r}")
        return cls(parts[1], "=" if parts[2] == "==" else parts[2], number)

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.number:g}"

    def holds(self, measures: Measures) -> bool:
        """Whether a document fulfils it."""
        return bool(self.compare(measures.value(self.name)))

    def compare(self, values: Any) -> Any:
        """The same of the measure's values: a number, or an array of one for each document."""
        return _COMPARE[self.operator](values, self.number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
