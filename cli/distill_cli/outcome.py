"""How a command ends: a foreseeable mistake is one line and exit code 2, Ctrl-C and SIGTERM say how to go on."""

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from logitstore.errors import LogitstoreError

INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class LocalPath(click.Path):
    """A path on this machine: a URL is refused before it becomes a folder called `http:`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Read what was typed."""
        if "://" in str(value):
            self.fail(
                f"{value} is a URL, and this is done on this machine; type a path, and `logitstore push` or `pull` to "
                "move a store",
                param,
                context,
            )
        return super().convert(value, param, context)


@contextmanager
def one_line_errors(resume: str) -> Iterator[None]:
    """Turn errors of the tree, and paths that the system refuses, into one line on stderr.

    Args:
        resume: what to say after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way of typing Ctrl-C
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # a path that may not be looked at, or that no file system takes
            click.echo(f"Error: {error.filename} cannot be used: {error.strerror}; type another path", err=True)
            sys.exit(2)
        if error.errno not in _FULL:
            raise
        click.echo(
            f"Error: {error.strerror}, when something was written or printed; mend this and type it again",
            err=True,
        )
        with suppress(OSError):
            sys.stdout.close()  # else Python tries once more at its end, and says so
        sys.exit(2)
    except RuntimeError as error:
        if "home directory" not in str(error):  # of a path such as ~nobody/store
            raise
        click.echo("Error: a path begins with ~ and the name of no user; type another path", err=True)
        sys.exit(2)
    except LogitstoreError as error:
        click.echo("Error: " + " ".join(str(error).splitlines()), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo(f"\nStopped. {resume}", err=True)
        sys.exit(INTERRUPTED)


def say_blas() -> None:
    """Load a fast BLAS before MLX, and print the one line of advice where there is none."""
    import distill_kernels

    advice = distill_kernels.blas.load().advice
    if advice:
        click.echo(advice, err=True)
