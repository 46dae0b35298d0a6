"""The folder of a run's output: new, with room for the result, gone again where the run ends before its first step.

One run at a time has it.
"""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError
from logitstore.journal import open_locked

CONFIG = "distill_train.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
BASE = "base"
"""Folder of an adapter's base, where it is written."""


def require_new(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ConfigError: the output folder holds something, lies inside a store, or cannot be looked into.
    """
    require_outside_stores(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} holds something already; type --out with a new folder")
    except OSError as error:
        raise cannot_write(out, error) from error


def require_run(out: Path) -> None:
    """Check that a run was begun here, and can be gone on with.

    Raises:
        ConfigError: saying what to type.
    """
    if not (out / CONFIG).is_file():
        raise ConfigError(f"{out} holds no run to go on with; type --out with a run's folder, or leave --resume out")
    if (out / SUMMARY).exists() and not (out / CHECKPOINTS).exists():
        raise ConfigError(
            f"the run in {out} has ended and left no checkpoint; type a new --out without --resume, and --save-every N"
        )


@contextmanager
def output_folder(out: Path, *, new: bool = True) -> Iterator[Path]:
    """Make the folder of a run's output; take a new one away again where the run ends before its first step.

    Raises:
        ConfigError: it cannot be made: no permission, full disk; another run is still writing there.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    held = _held(out)
    try:
        yield out
    except BaseException:
        with suppress(OSError):  # what ended the run is what the user must read
            if new and not _has_steps(out):
                _take_away(out)
        raise
    finally:
        if held is not None:
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
            held.close()


def _held(out: Path) -> FileIO | None:
    """Keep other runs out of a folder, as long as this file is open; None where the file system has no locks.

    Raises:
        ConfigError: another run is there; it cannot be written.
    """
    with writing(out):
        try:
            return open_locked(out / LOCK)
        except BlockingIOError:
            raise ConfigError(
                f"another run is still writing to {out}; wait until it has ended or stop it, or type another --out"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                return None
            raise


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Stands around what writes into the folder of a run's output, and nothing else.

    Raises:
        ConfigError: full disk, no permission; MLX itself speaks of a RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise cannot_write(out, error) from error


def append_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    """Add a step's line to the metrics.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(out), (out / METRICS).open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def require_room(out: Path, result_bytes: int) -> None:
    """Check before the work that its result has room on the disk.

    Raises:
        ConfigError: it has not.
    """
    with writing(out):
        free = shutil.disk_usage(out).free
    if free < result_bytes:
        raise cannot_write(out, OSError(f"{free:,} bytes are free, the result takes {result_bytes:,}"))


def _has_steps(out: Path) -> bool:
    metrics = out / METRICS
    return metrics.exists() and metrics.stat().st_size > 0


def _take_away(out: Path) -> None:
    """Remove what a run writes before its first step, and the folder where nothing else is in it (a store may be)."""
    shutil.rmtree(out / BASE, ignore_errors=True)
    for name in (METRICS, CONFIG, LOCK):
        (out / name).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def cannot_write(out: Path, error: Exception) -> ConfigError:
    """The one line for a full disk, a missing permission and the like."""
    return ConfigError(
        f"{out} cannot be written: {getattr(error, 'strerror', None) or error}; mend this, or type another --out"
    )
