"""A temperature that changes over a run: a ladder of the temperatures at which there are targets.

A sample belongs to the temperature that it was drawn at, so a schedule steps from one that a store serves to the next.
A ladder, never a continuum, also where the teacher is asked live: Metal kernels have the temperature in their source,
and each rung compiles its own.
"""

import math
from dataclasses import dataclass

from distill_trainer.schedule import Schedule
from logitstore.errors import ConfigError
from logitstore.recipe import Recipe

RUNGS = 8
"""Temperatures of a live teacher's ladder, in equal ratios; from 4 to 1 each is 0.82 of the one before."""


@dataclass(frozen=True)
class Ladder:
    """At each step the rung nearest, by ratio, to what the schedule says."""

    schedule: Schedule
    rungs: tuple[float, ...]

    def at(self, step: int, steps: int) -> float:
        """The temperature of a step from 1 to `steps`."""
        wanted = self.schedule.at(step, steps)
        return min(self.rungs, key=lambda rung: abs(math.log(rung / wanted)))


def ladder_of(schedule: Schedule | None, recipe: Recipe, where: str) -> Ladder:
    """The temperatures of a recipe that a run goes through; without a schedule its first alone.

    Args:
        where: names the store, for messages.

    Raises:
        ConfigError: the recipe does not serve a temperature, or not both ends of the schedule.
    """
    if schedule is None or schedule.constant:
        temperature = recipe.temperatures[0] if schedule is None else schedule.start
        recipe.set_number(temperature)
        return Ladder(Schedule(temperature, temperature), (temperature,))
    served, (low, high) = recipe.served_temperatures, sorted((schedule.start, schedule.end))
    if not {low, high} <= set(served):
        raise ConfigError(
            f"{where} serves temperature {_listed(served)}, and a schedule needs both of its ends, {low:g} and "
            f"{high:g}, and what lies between; type "
            f"`logitstore build --temperature {_listed(spaced(schedule, _doublings(low, high)))}` for another store, "
            "or --temperature with ends that are served"
        )
    return Ladder(schedule, tuple(rung for rung in served if low <= rung <= high))


def spaced(schedule: Schedule | None, rungs: int = RUNGS) -> tuple[float, ...]:
    """So many temperatures from a schedule's start to its end in equal ratios; 1 without a schedule."""
    if schedule is None or schedule.constant:
        return (1.0 if schedule is None else schedule.start,)
    ratio = schedule.end / schedule.start
    between = (schedule.start * ratio ** (rung / (rungs - 1)) for rung in range(1, rungs - 1))
    return (schedule.start, *between, schedule.end)


def _doublings(low: float, high: float) -> int:
    """Rungs of which none is more than twice the next, as far as a live teacher has as many."""
    return min(RUNGS, math.ceil(math.log2(high / low) - 1e-9) + 1)


def _listed(temperatures: tuple[float, ...]) -> str:
    return ",".join(f"{temperature:.4g}" for temperature in temperatures)
