"""What the parts of `bench_store` share: a child process on one core, a stopwatch, and what a part finds.

A part is a module `tools.bench_NAME` with `measure(out, tokens)`, which gives JSON values, and `found(measured)`, which
makes tables, figures and targets of them. A part that measures one core's speed is run by `on_one_core`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.figure import Figure, Table

ROOT = Path(__file__).parents[1]
ROUNDS = 3
TEXT_WIDTH = 120
Measured = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A number that must be reached."""

    what: str
    target: str
    reached: str
    met: bool

    @classmethod
    def at_most(cls, what: str, most: float, reached: float, form: str = ".1f") -> "Target":
        """Met by `most` or less."""
        return cls(what, f"<= {most:g}", format(reached, form), reached <= most)

    @classmethod
    def at_least(cls, what: str, least: float, reached: float, form: str = ",.0f") -> "Target":
        """Met by `least` or more."""
        return cls(
            what, f">= {least:,.0f}" if least >= 1e3 else f">= {least:g}", format(reached, form), reached >= least
        )


@dataclass(frozen=True)
class Titled:
    """A table with its heading, and what its numbers are means of."""

    title: str
    remark: str
    table: Table

    def text(self) -> str:
        """In aligned columns."""
        return f"{self.title}\n\n{fill(self.remark, TEXT_WIDTH)}\n\n{aligned(self.table)}\n"


@dataclass(frozen=True)
class Found:
    """What a part has to show."""

    tables: Sequence[Titled]
    targets: Sequence[Target] = ()
    figures: Sequence[Figure] = field(default=())


def mean_and_error(values: npt.NDArray[np.float64], digits: int, *, signed: bool = False) -> str:
    """A mean over seeds and its standard error, which a single one has not."""
    mean = format(float(values.mean()), f"{'+' if signed else ''}.{digits}f")
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"


@dataclass(frozen=True)
class Spent:
    """Time of some work."""

    cpu_s: float
    """Processor time of this process, all of its threads: what one core needs, whoever else uses the machine."""
    wall_s: float


def spent(work: Callable[[], object]) -> Spent:
    """Do some work once."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def median_spent(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Spent]:
    """Do each once to warm up, then all in turn some times; the median of each."""
    for work in works.values():
        work()
    times = {name: list[Spent]() for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(spent(work))
    return {
        name: Spent(float(np.median([t.cpu_s for t in every])), float(np.median([t.wall_s for t in every])))
        for name, every in times.items()
    }


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder on the disk of OUT_DIR that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=out, prefix="scratch-") as folder:
        yield Path(folder)


def on_one_core(part: str, out: Path, tokens: int) -> Measured:
    """`measure` of a part in a child process that has one core and one BLAS thread."""
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return child(["-m", "tools.bench_parts", part, str(out), str(tokens)], dict.fromkeys(threads, "1"))


def child(arguments: list[str], environment: dict[str, str] | None = None) -> Measured:
    """What a Python process of this project prints as its last line, which is JSON."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def aligned(table: Table) -> str:
    """A table as text, numbers to the right."""
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0].rstrip(), "  ".join("-" * width for width in widths), *map(str.rstrip, lines[1:])])


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(import_module(f"tools.bench_{sys.argv[1]}").measure(Path(sys.argv[2]), int(sys.argv[3]))))
