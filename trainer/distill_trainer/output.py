"""The folder of a run's output: new, with room for the result, gone again where the run ends before its first step."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitstore.errors import ConfigError

CONFIG = "distill_train.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
BASE = "base"
"""Folder of an adapter's base, where it is written."""


def require_new(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ConfigError: the output folder holds something, or cannot be looked into.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} holds something already; type --out with a new folder")
    except OSError as error:
        raise cannot_write(out, error) from error


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Make the folder of a run's output, which is new; take it away again where the run ends before its first step.

    Raises:
        ConfigError: it cannot be written: no permission, full disk.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            yield out
        except BaseException:
            if not _has_steps(out):
                _take_away(out)
            raise
    except OSError as error:
        raise cannot_write(out, error) from error


def require_room(out: Path, result_bytes: int) -> None:
    """Check before the work that its result has room on the disk.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(out).free
    if free < result_bytes:
        raise OSError(f"{free:,} bytes are free, the result takes {result_bytes:,}")


def _has_steps(out: Path) -> bool:
    metrics = out / METRICS
    return metrics.exists() and metrics.stat().st_size > 0


def _take_away(out: Path) -> None:
    """Remove what a run writes before its first step, and the folder where nothing else is in it (a store may be)."""
    shutil.rmtree(out / BASE, ignore_errors=True)
    for name in (METRICS, CONFIG):
        (out / name).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def cannot_write(out: Path, error: OSError) -> ConfigError:
    """The one line for a full disk, a missing permission and the like."""
    return ConfigError(f"{out} cannot be written: {error.strerror or error}; mend this, or type another --out")
