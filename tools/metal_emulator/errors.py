"""What can go wrong before a kernel runs, and what is raised when it misbehaved.

EmulatorError
├── CaptureError    the call cannot be captured: MLX refuses it, or it runs inside `mx.compile`
├── CompileError    g++ refuses the kernel, or there is no g++
└── DefectError     the kernel ran and is wrong; `defects` says how and where
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Defect


class EmulatorError(Exception):
    """Any error of the emulator."""


class CaptureError(EmulatorError):
    """The call could not be turned into a launch."""


class CompileError(EmulatorError):
    """The kernel did not compile; the message has g++'s words with the kernel's own line numbers."""


class DefectError(EmulatorError):
    """The kernel ran and broke a rule, or its outputs depend on the order in which simdgroups run."""

    def __init__(self, message: str, defects: "tuple[Defect, ...]" = ()) -> None:
        super().__init__(message)
        self.defects = defects
