"""What each step of a run minimises: one loss throughout, or one that moves with the step and with what was learned.

The loop asks `at` before a step, and tells `learned` after it. What is remembered between steps goes into checkpoints.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distill_kernels import LogitsLoss, SparseKL, WeightedLoss

from distill_trainer.config import TrainConfig
from distill_trainer.crossing import Crossing
from distill_trainer.losses import LIVE, AnyLoss, loss_of
from distill_trainer.several_crossings import SeveralCrossings
from distill_trainer.taid import END, Taid, interpolated, started
from distill_trainer.temperatures import ladder_of
from logitstore.recipe import Recipe


class Objective:
    """The loss of each step.

    Args:
        recipe: what is kept of the teacher; None where nothing is distilled.
        where: names the store, for messages.
        crossing: how the run crosses to a teacher with another tokenizer; None where it has the student's.

    Raises:
        ConfigError: a temperature that the recipe does not serve.
        IncompatibleStoreError: a loss that the recipe does not serve.
    """

    def __init__(
        self,
        config: TrainConfig,
        recipe: Recipe | None,
        where: str = LIVE,
        crossing: Crossing | SeveralCrossings | None = None,
    ) -> None:
        self._steps = config.iters
        self._ladder = None if recipe is None else ladder_of(config.temperature_schedule, recipe, where)
        self._losses: dict[float | None, LogitsLoss | WeightedLoss] = {None: SparseKL()}
        if recipe is not None and self._ladder is not None:
            self._losses = {rung: loss_of(config.loss, recipe, rung, where) for rung in self._ladder.rungs}
        self._taid = started(next(iter(self._losses.values())))
        self._crossing = crossing

    @property
    def crosses(self) -> bool:
        """Whether the teacher has another tokenizer."""
        return self._crossing is not None

    def temperature(self, step: int) -> float | None:
        """The temperature of a step's targets, known before any step is taken; None where nothing is distilled."""
        return None if self._ladder is None else self._ladder.at(step, self._steps)

    def at(self, step: int) -> AnyLoss:
        """The loss of this step, which must be the next one."""
        loss = self._losses[self.temperature(step)]
        return self._across(loss if self._taid is None else interpolated(loss, self._taid.t))

    @property
    def last_temperature(self) -> float | None:
        """The temperature of the run's last step."""
        return self.temperature(self._steps)

    @property
    def last(self) -> AnyLoss:
        """The loss that the run ends at, whatever is learned on the way."""
        return self._across(interpolated(self._losses[self.last_temperature], END))

    def _across(self, loss: LogitsLoss | WeightedLoss) -> AnyLoss:
        return loss if self._crossing is None else self._crossing.loss(loss)

    def shown(self, step: int) -> dict[str, float | None]:
        """What moves of the loss, as metrics of the step; to be asked before `learned`."""
        scheduled = self._ladder is not None and not self._ladder.schedule.constant
        shown = {"temperature": self.temperature(step)} if scheduled else {}
        return shown if self._taid is None else shown | {"taid_t": self._taid.t}

    def learned(self, step: int, kd_loss: float | None) -> None:
        """Take note of a step's distillation loss; None where no position had targets."""
        if self._taid is not None and kd_loss is not None:
            self._taid = self._taid.after(kd_loss, step, self._steps)

    @property
    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON values."""
        return {} if self._taid is None else asdict(self._taid)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what a checkpoint holds.

        Raises:
            TypeError: it is of another objective.
        """
        if self._taid is not None:
            self._taid = Taid(**state)
