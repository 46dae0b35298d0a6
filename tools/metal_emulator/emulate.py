"""Runs a kernel under several schedules and refuses one that is wrong, or whose result depends on the schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .capture import capture
from .errors import DefectError
from .report import Defect
from .run import Run, Schedule, execute

SCHEDULES: tuple[Schedule, ...] = ("ascending", "descending", 0, 1)


def emulate(
    kernel: Callable[..., Any], *, schedules: Sequence[Schedule] = SCHEDULES, tolerance: float = 1e-6, **call: Any
) -> list[mx.array]:
    """The outputs of `kernel(**call)`, the same under every schedule up to the relative `tolerance`.

    A 16-bit output may differ by one unit in the last place, since that is the least it can differ by.

    Raises: DefectError that lists every defect of every schedule, or the first element that two schedules disagree on.
    """
    launch = capture(kernel, **call)
    runs = [execute(launch, schedule) for schedule in schedules]
    raise_defects(runs)
    for run in runs[1:]:
        for i, (first, other) in enumerate(zip(runs[0].outputs, run.outputs, strict=True)):
            _compare(i, runs[0], run, first, other, tolerance)
    return runs[0].outputs


def raise_defects(runs: Sequence[Run]) -> None:
    """Raises DefectError if any of the runs has a defect; one seen under several schedules is listed once."""
    found: dict[tuple[object, ...], Defect] = {}
    for run in runs:
        for each in run.defects:
            found.setdefault(each.key, each)
    if found:
        count = f"{len(found)} defect{'s' if len(found) > 1 else ''}"
        text = "\n".join(f"  {each}" for each in found.values())
        raise DefectError(f"{runs[0].launch.name} has {count}:\n{text}", tuple(found.values()))


def _compare(index: int, first: Run, other: Run, a: mx.array, b: mx.array, tolerance: float) -> None:
    if a.dtype in (mx.bfloat16, mx.float16):
        tolerance = max(tolerance, 2.0**-7 if a.dtype == mx.bfloat16 else 2.0**-10)
        a, b = a.astype(mx.float32), b.astype(mx.float32)
    x, y = np.array(a), np.array(b)
    if np.issubdtype(x.dtype, np.inexact):
        with np.errstate(invalid="ignore"):
            close = np.abs(x - y) <= tolerance * np.maximum(np.abs(x), np.abs(y))
        same = (x == y) | (np.isnan(x) & np.isnan(y)) | close
    else:
        same = x == y
    if not same.all():
        where = tuple(int(k) for k in np.argwhere(~same)[0])
        raise DefectError(
            f"{first.launch.name}: output {index} depends on the order of the simdgroups: {int((~same).sum())} of "
            f"{same.size} elements differ, first {list(where)}: {x[where]} when {first.schedule}, {y[where]} when "
            f"{other.schedule}"
        )
