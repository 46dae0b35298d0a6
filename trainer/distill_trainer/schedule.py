"""A number that changes over a run, as it is typed.

    0.9                    the same at every step
    0.9->0.3:linear        0.9 at the first step, 0.3 at the last, in a straight line; `->` alone means this too
    0.9->0.3:cosine        the same along half a cosine
    0.9->0.3:wsd           0.9, and over the last fifth of the steps in a straight line to 0.3
    0.9->0.3:wsd:0.5       over the last half

Reference: Hu et al., "MiniCPM", 2024, section 4 (warmup-stable-decay).
"""

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

Shape = Literal["linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """From `start` at step 1 to `end` at the last step."""

    start: float
    end: float
    shape: Shape = "linear"
    share: float = 1.0
    """Share of the steps, at their end, over which it changes."""

    @classmethod
    def parse(cls, value: float | str) -> "Schedule":
        """Read a number or NUMBER->NUMBER[:linear|:cosine|:wsd[:SHARE]].

        Raises:
            ValueError: it is neither.
        """
        start, arrow, rest = str(value).partition("->")
        if not arrow:
            return cls(float(start), float(start))
        end, colon, shaped = rest.partition(":")
        shape, given, share = shaped.partition(":")
        if (colon and shape not in get_args(Shape)) or (given and shape != "wsd"):
            raise ValueError(f"no shape {shaped!r}")
        made = cls(float(start), float(end), cast(Shape, shape or "linear"), _share(shape, share if given else "0.2"))
        if not 0 < made.share <= 1:
            raise ValueError(f"no share of the steps {share!r}")
        return made

    @property
    def constant(self) -> bool:
        """Whether it is one number."""
        return self.start == self.end

    def at(self, step: int, steps: int) -> float:
        """Its value at a step from 1 to `steps`."""
        if self.constant:
            return self.start
        begin = (steps - 1) * (1 - self.share)
        done = min(max((step - 1 - begin) / max(steps - 1 - begin, 1e-9), 0.0), 1.0)
        moved = (1 - math.cos(math.pi * done)) / 2 if self.shape == "cosine" else done
        return self.start * (1 - moved) + self.end * moved


def _share(shape: str, share: str) -> float:
    return float(share) if shape == "wsd" else 1.0
