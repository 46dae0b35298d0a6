"""Processes that are forked off, and only they are ever ended."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(action: Callable[[], object], *, quiet: bool = False) -> int:
    """Run something in a process of its own, which ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        action()
    except BaseException:
        if not quiet:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def finish(*children: int) -> None:
    """Wait for processes that must end well."""
    for child in children:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise SystemExit(f"process {child} ended with {code}")


def killed(child: int) -> bool:
    """End a process at once; whether it had not ended by itself."""
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise SystemExit(f"process {child} ended with {os.waitstatus_to_exitcode(status)} before it was killed")
    return os.WIFSIGNALED(status)


def bounded(more_bytes: int, seconds: int) -> None:
    """Let this process take so much more memory, and so long; what exceeds the time ends it by SIGALRM."""
    signal.alarm(seconds)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, -1))


def scratch() -> str | None:
    """Where files are written that nobody needs afterwards: in memory, where that has a file system."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
