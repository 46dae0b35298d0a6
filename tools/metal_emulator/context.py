"""Makes ordinary calls of `mx.fast.metal_kernel` objects run on the emulator, so that whole functions can be tested."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from .capture import capture
from .emulate import raise_defects
from .run import Run, Schedule, execute

Kernel = Callable[..., Any]


@dataclass
class Emulated:
    """What `emulated()` hands out: every run so far, and `wrap` for kernels that were made outside the context."""

    schedules: Sequence[Schedule]
    raises: bool
    runs: list[Run] = field(default_factory=list)
    active: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrap(self, kernel: Kernel) -> Kernel:
        """A stand-in for the kernel: emulated while the context is active, the kernel itself afterwards."""

        def stand_in(**call: Any) -> list[mx.array]:
            if not self.active:
                outputs: list[mx.array] = kernel(**call)
                return outputs
            launch = capture(kernel, **call)
            runs = [execute(launch, schedule) for schedule in self.schedules]
            with self._lock:
                self.runs.extend(runs)
            if self.raises:
                raise_defects(runs)
            return runs[0].outputs

        stand_in.metal_kernel = kernel  # type: ignore[attr-defined]
        return stand_in


@contextmanager
def emulated(*, schedules: Sequence[Schedule] = ("ascending",), raises: bool = True) -> Iterator[Emulated]:
    """While active, kernels made by `mx.fast.metal_kernel` are stand-ins that the emulator runs and records.

    A kernel made earlier is emulated if its holder is given `wrap(kernel)` instead. Inputs are evaluated at the call,
    which works under `mx.grad`, `mx.vjp` and `mx.custom_function`, and inside `mx.compile` raises a CaptureError.
    With `raises`, a defect raises DefectError at the call; without, it stands in `runs`.
    """
    session = Emulated(schedules, raises)
    make: Any = mx.fast.metal_kernel

    def metal_kernel(*arguments: Any, **named: Any) -> Kernel:
        return session.wrap(make(*arguments, **named))

    with patch.object(mx.fast, "metal_kernel", metal_kernel):
        try:
            yield session
        finally:
            session.active = False
