"""`--report-to`: every step's metrics also go where people watch runs: TensorBoard, W&B, Trackio, SwanLab.

None of them is a dependency, each is an extra of this package, and a run that names one that is not installed ends
before anything is read. One that fails later is left out with one line: metrics.jsonl has every step anyway.
"""

import difflib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from logitstore.errors import ConfigError, first_line

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "swanlab": "swanlab"}
"""What can be named, and the module that each takes. The names are those of the extras too."""
PROJECT = "logitstore"
FOLDERS = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlog"}
"""Below the run's output, as mlx-lm has them; Trackio keeps its own place."""
_FLUSH_S = 10


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, numbers: Mapping[str, float], step: int) -> object:
        """Take the numbers of a step."""

    def close(self) -> object:
        """Take no more."""


def named(texts: Sequence[str]) -> list[str]:
    """What was typed after `--report-to`, each once; mlx-lm has several in one text, with commas."""
    return list(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))


def require_installed(texts: Sequence[str]) -> None:
    """Check what was typed after `--report-to`.

    Raises:
        ConfigError: a name that is none, or one whose package is not installed.
    """
    for name in named(texts):
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, 1, cutoff=0)
            raise ConfigError(f"--report-to {name} is not known, did you mean {near[0]}? type {'|'.join(MODULES)}")
        if find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"--report-to {name} needs {MODULES[name]}, which is not installed; "
                f"type `pip install 'logitstore[{name}]'`, or leave it out"
            )


@contextmanager
def tracked(
    texts: Sequence[str],
    project: str,
    out: Path,
    settings: Mapping[str, Any],
    steps: int,
    say: Callable[[str], object],
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Begin to report a run; gives the function that takes a step's metrics.

    What was begun on the disk is gone again where the block ends before its first step.

    Args:
        texts: what was typed after `--report-to`.
        out: the run's folder, after which it is called.
        settings: the resolved config.
        steps: how many there were before; TensorBoard forgets what an interrupted run said beyond them.
        say: takes one line of text at a time for the user.

    Raises:
        ConfigError: one of them refuses to begin.
    """
    names, begun = named(texts), dict[str, Tracker]()
    new = [out / FOLDERS[name] for name in names if name in FOLDERS and not (out / FOLDERS[name]).exists()]
    logged = False

    def log(metrics: Mapping[str, Any]) -> None:
        nonlocal logged
        logged, step = True, int(metrics["step"])
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, tracker in list(begun.items()):
            try:
                tracker.log(numbers, step)
            except Exception as error:  # the network, the disk, a service: none of them may cost the run
                del begun[name]
                say(f"{name} is told no more after step {step}: {first_line(error)}; metrics.jsonl has every step")

    try:
        for name in names:
            try:
                begun[name] = _begin(name, project, out, settings, steps)
            except Exception as error:
                raise ConfigError(
                    f"--report-to {name} cannot begin: {first_line(error)}; mend this, or leave it out"
                ) from error
        yield log
    finally:
        for name, tracker in begun.items():
            try:
                tracker.close()
            except Exception as error:
                say(f"{name} did not take its last metrics: {first_line(error)}; metrics.jsonl has every step")
        if not logged:
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)


class _TensorBoard:
    """Event files below the output."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], steps: int) -> None:
        purge = {"purge_step": steps + 1} if steps else {}
        named = {"filename_suffix": f".{steps}"}  # else files begun in one second have one name
        writer = import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder), flush_secs=_FLUSH_S, **named, **purge)
        self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=1)}\n```", steps)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """A module with `log(numbers, step=)` and `finish()`, as the other three have."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


def _begin(name: str, project: str, out: Path, settings: Mapping[str, Any], steps: int) -> Tracker:
    if name == "tensorboard":
        return _TensorBoard(out / FOLDERS[name], settings, steps)
    module = import_module(MODULES[name])
    called: dict[str, Any] = {"project": project, "config": dict(settings)}
    if name == "wandb":  # a run that goes on is a run of its own there, in the same group
        module.init(name=out.name, group=out.name, dir=str(out), **called)
    elif name == "trackio":
        module.init(name=out.name, resume="allow" if steps else "never", **called)
    else:
        module.init(experiment_name=out.name, logdir=str(out / FOLDERS[name]), **called)
    return _Service(module)
