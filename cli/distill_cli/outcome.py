"""How a command ends: a foreseeable mistake is one line and exit code 2, Ctrl-C says how to go on."""

import os
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


def prepare() -> None:
    """Set up the process before MLX and transformers are imported; print the one line of advice on a slow BLAS."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is how it should be
    import distill_kernels

    advice = distill_kernels.blas.load().advice
    if advice:
        click.echo(advice, err=True)
