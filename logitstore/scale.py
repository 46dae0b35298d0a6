"""The scales of a plot: from values to places, ticks at round values, and numbers as an axis says them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Scale:
    """From values to user units between two ends, with ticks at round values."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, stop: float, *, log: bool = False, least_step: float = 0.0
    ) -> Self:
        """A scale between round values that hold these; a linear one holds 0 too."""
        if log:
            return cls._logarithmic(min(values, default=1.0), max(values, default=10.0), start, stop)
        low, high = min(0.0, *values, 0.0), max(values, default=1.0)
        high = high if high - low > 1e-300 else low + 1.0
        step = max(round_step(low, high), least_step)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, start, stop, round_ticks(low, high, step))

    @classmethod
    def _logarithmic(cls, low: float, high: float, start: float, stop: float) -> Self:
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        steps = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
        low = max(step for step in steps if step < low * (1 - 1e-9))
        high = min(step for step in steps if step > high * (1 + 1e-9))
        ticks = [step for step in steps if low <= step <= high]
        powers = [tick for tick in ticks if tick in map(float, (f"1e{exponent}" for exponent in exponents))]
        if len(ticks) > 7 and len(powers) > 2:
            ticks = powers[:: math.ceil(len(powers) / 7)]
        return cls(low, high, start, stop, tuple(ticks), log=True)


def round_step(low: float, high: float, most: int = 5) -> float:
    """The least 1, 2 or 5 times a power of ten that goes at most `most` times into the span."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))


def round_ticks(low: float, high: float, step: float) -> tuple[float, ...]:
    """The multiples of the step from low to high."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def number(value: float) -> str:
    """A number as an axis shows it: 0.25, 1,000, 20k, 5M, 2×10⁻⁶."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        digits, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return (power if digits == "1" else f"{digits}×{power}").replace("-", "−")
    for unit, suffix, since in ((1e12, "T", 1e12), (1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= since:
            return f"{value / unit:.5g}{suffix}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 1e3 and value == round(value) else f"{value:.5g}").replace("-", "−")
