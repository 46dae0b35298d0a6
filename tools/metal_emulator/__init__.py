"""Runs Metal kernels written for `mx.fast.metal_kernel` on any Linux with g++, and reports what is wrong in them.

`capture` turns a call into a `Launch`, `execute` runs it once and returns a `Run`, `emulate` runs it under several
schedules and raises on any defect, and `emulated()` lets the calls inside a function go through all this. README.md
tells what is checked and what is not.
"""

from .capture import Launch, Virtual, capture
from .compile import cache_folder, compiler
from .context import Emulated, emulated
from .emulate import SCHEDULES, emulate
from .errors import CaptureError, CompileError, DefectError, EmulatorError
from .report import KINDS, Defect
from .run import Run, Schedule, execute

__all__ = [
    "KINDS",
    "SCHEDULES",
    "CaptureError",
    "CompileError",
    "Defect",
    "DefectError",
    "Emulated",
    "EmulatorError",
    "Launch",
    "Run",
    "Schedule",
    "Virtual",
    "cache_folder",
    "capture",
    "compiler",
    "emulate",
    "emulated",
    "execute",
]
