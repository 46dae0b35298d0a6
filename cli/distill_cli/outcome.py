"""How a command ends: a foreseeable mistake is one line and exit code 2, Ctrl-C says how to go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from logitstore.errors import LogitstoreError

INTERRUPTED = 130


@contextmanager
def one_line_errors(resume: str) -> Iterator[None]:
    """Turn errors of the tree into one line on stderr.

    Args:
        resume: what to say after Ctrl-C.
    """
    try:
        yield
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
