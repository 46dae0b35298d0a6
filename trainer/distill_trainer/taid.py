"""How far TAID's target has moved from the student to the teacher: t, from step to step.

    line = t_start + (1 - t_start) · steps done / all steps
    d = (L_before - L) / (L_before + 1e-15);   m <- 0.99 m + 0.01 d
    t <- min(1, max(line, t + 5e-4 · sigmoid(m) · (1 - t)))

L is a step's distillation loss, as `kd_loss` shows it: the KL to the interpolated target; where TAID is one of several
losses, their weighted sum, of which d is the relative fall. The first one is only remembered. A student that learns
fast is pulled ahead of the line, in a run of thousands of steps: in one of fewer than 2,000 the line rises faster than
5e-4 (1 - t) a step, and t is the line. t never falls, and ends at 1.

Reference: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", ICLR 2025, section 3.2, algorithm 1.
Their code feeds the rule the cross-entropy form of L, which has the same gradient and is larger by the target's
entropy, so that d is smaller; with sigmoid's slope of 1/4 around 0 neither moves t by more than 5e-4 a step.
"""

import math
from dataclasses import dataclass, replace

from distill_kernels import TaidLoss, WeightedLoss
from distill_kernels.logits_loss import LogitsLoss

START = 0.4
END = 1.0
RATE = 5e-4
"""The paper's alpha."""
BETA = 0.99


@dataclass(frozen=True)
class Taid:
    """What TAID remembers between steps."""

    start: float
    t: float
    loss: float | None = None
    """Of the step before, where there was one."""
    momentum: float = 0.0

    def after(self, loss: float, step: int, steps: int) -> "Taid":
        """What it remembers after a step, of 1 to `steps`, whose loss was this."""
        loss = max(loss, 0.0)  # a KL of nothing may be rounded below it
        if self.loss is None:
            return replace(self, loss=loss)
        momentum = BETA * self.momentum + (1 - BETA) * (self.loss - loss) / (self.loss + 1e-15)
        ahead = self.t + RATE * (1 + math.tanh(momentum / 2)) / 2 * (1 - self.t)
        line = self.start + (END - self.start) * step / steps
        return Taid(self.start, min(END, max(line, ahead)), loss, momentum)


def started(loss: LogitsLoss | WeightedLoss) -> Taid | None:
    """TAID before the first step, where it is the loss or one of its terms."""
    terms = [term for _, term in loss.terms] if isinstance(loss, WeightedLoss) else [loss]
    starts = [term.interpolation for term in terms if isinstance(term, TaidLoss)]
    return Taid(starts[0], starts[0]) if starts else None


def interpolated(loss: LogitsLoss | WeightedLoss, t: float) -> LogitsLoss | WeightedLoss:
    """The loss with its TAID term's target at t."""
    if isinstance(loss, WeightedLoss):
        return WeightedLoss(tuple((weight, _at(term, t)) for weight, term in loss.terms))
    return _at(loss, t)


def _at(loss: LogitsLoss, t: float) -> LogitsLoss:
    return replace(loss, interpolation=t) if isinstance(loss, TaidLoss) else loss
