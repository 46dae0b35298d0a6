"""Checkpoints of a run, below OUT/checkpoints: the last, and the best.

The best is the one of the lowest held-out loss; without held-out documents, the one before which the mean training loss
of `save_every` steps was lowest.

Each is a folder that mlx-lm loads as an adapter or a model, and beside the weights all that the next step depends on:

    0000120/adapters.safetensors, or a model folder    the student as it was trained, in the dtypes of training
    0000120/optimizer.safetensors                      the optimizer's state; MLX's random state
    0000120/projectors.safetensors                     what methods beside the student trained of their own
    0000120/training.json                              step, counts, config, what the objective remembers, and what
                                                       stores and documents were

The order of documents is drawn from the seed, so the step says where in it a run was. A folder appears whole or not at
all; older ones go once a newer one is there.
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from distill_trainer.combine import Combination
from distill_trainer.config import TrainConfig
from distill_trainer.gradients import random_key, seed
from distill_trainer.method import PROJECTORS, Method, load_own, own_parameters, save_own
from distill_trainer.objective import Objective
from distill_trainer.output import CHECKPOINTS, METRICS, writing
from distill_trainer.report import TrainReport
from distill_trainer.student import save_weights, trainable
from distill_trainer.targets import Count
from logitstore.contract import Store
from logitstore.digest import config_digest, weights_digest
from logitstore.durable import publish, sync
from logitstore.errors import ConfigError, ModelError, first_line
from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence

OPTIMIZER = "optimizer.safetensors"
STATE = "training.json"
_KEY = "random_state"
_FREE = {"out", "quiet", "resume", "save_every", "report_samples", "steps_per_eval", "domain_column", "store"}
_FREE |= {"project_name", "report_to", "overlay", "overlay_gb"}
"""Config fields that may differ; stores are held against each other by content."""


class Checkpoints:
    """Saves and restores a run's state, of which the student's model and the optimizer are parts."""

    def __init__(
        self,
        config: TrainConfig,
        student: LoadedModel,
        optimizer: optim.Optimizer,
        objective: Objective,
        stores: Sequence[Store],
        sequences: Sequence[TokenSequence],
        held_out: Sequence[TokenSequence] = (),
        methods: Sequence[Method] = (),
    ) -> None:
        self._config = config
        self._student = student
        self._optimizer = optimizer
        self._objective = objective
        self._stores = stores
        self._sequences = sequences
        self._held_out = held_out
        self._methods = methods
        self._folder = Path(config.out) / CHECKPOINTS
        self._losses: deque[float | None] = deque(maxlen=config.save_every or 0)
        """Of the last `save_every` steps; None of one that trained nothing."""

    def restore(self, report: TrainReport) -> None:
        """Go back to the last checkpoint; where a run was killed before its first, to the beginning.

        Raises:
            ConfigError: another config, or another dataset, store or student than the checkpoint's.
            ModelError: a checkpoint that cannot be read.
        """
        folders = _checkpoints(self._folder)
        if not folders:
            return
        last = folders[-1]
        state, before, weights, kept = _read(last)
        self._require_same(last, state, before.steps)
        names = trainable(self._student.model).keys()
        if not names <= weights.keys():
            raise ModelError(f"{last} lacks weights that this run trains; remove it to go on from an older one")
        self._student.model.load_weights(list(weights.items()), strict=False)
        load_own(self._methods, last)
        seed(kept.pop(_KEY))
        self._objective.restore(state["objective"])
        self._losses.extend(state.get("losses", []))
        self._optimizer.state = tree_unflatten(list(kept.items()))
        for name in ("steps", "trained_tokens", "elapsed_s", "final", "valid", "count"):
            setattr(report, name, getattr(before, name))

    def after(self, report: TrainReport) -> None:
        """Take note of a step, and save where it is a step's turn.

        Raises:
            ConfigError: full disk, no permission.
            ModelError: weights that are no numbers.
        """
        self._losses.append(report.final["loss"])
        every = self._config.save_every
        if every is not None and report.steps % every == 0:
            self.save(report)

    def save(self, report: TrainReport) -> None:
        """Write a checkpoint, unless it is there.

        Raises:
            ConfigError: full disk, no permission.
            ModelError: weights that are no numbers; the checkpoint before stays.
        """
        final = self._folder / f"{report.steps:07d}"
        if final.exists():
            return
        self.require_numbers(report)
        state = {
            "report": asdict(report),
            "mean_loss": self._mean_loss,
            "losses": list(self._losses),
            "config": self._config.to_json(),
            "sources": self._sources,
            "objective": self._objective.state,
        }
        kept = cast(dict[str, mx.array], tree_flatten(self._optimizer.state, destination={_KEY: random_key()}))
        partial = self._folder / f".{final.name}"
        with writing(Path(self._config.out)):
            self._folder.mkdir(exist_ok=True)
            _clear(self._folder)
            try:
                partial.mkdir()
                save_weights(self._student, self._config, partial, exact=True)
                save_own(self._methods, partial)
                mx.save_safetensors(str(partial / OPTIMIZER), kept)
                (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
                sync(Path(self._config.out) / METRICS)
                publish(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            folders = _checkpoints(self._folder)
            best = min(folders, key=lambda folder: _loss(folder, held_out=bool(self._held_out)))
            for folder in folders[:-1]:
                if folder != best:
                    folder.rename(self._folder / f".{folder.name}")
            _clear(self._folder)

    def require_numbers(self, report: TrainReport) -> None:
        """Check what has been trained.

        Raises:
            ModelError: weights that are no numbers.
        """
        trained = [*trainable(self._student.model).values(), *own_parameters(self._methods).values()]
        if not all(mx.isfinite(values).all().item() for values in trained):
            raise ModelError(f"after step {report.steps} some weights are no finite numbers; {self._config.slower}")

    @property
    def _mean_loss(self) -> float | None:
        """Over the last `save_every` steps; None where there were fewer."""
        losses = [loss for loss in self._losses if loss is not None]
        return sum(losses) / len(losses) if losses and len(self._losses) == self._losses.maxlen else None

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Digests of what the run reads: documents, stores but for the one that it writes to, an adapter's base."""
        config = self._config
        found = {"dataset": _documents_digest(self._sequences, config.columns)}
        if self._held_out:
            found["held-out dataset"] = _documents_digest(self._held_out, config.columns)
        read = [s for s in self._stores if not (config.write_back and Path(str(s.path)) == Path(config.store[0]))]
        for number, store in enumerate(read, 1):
            found[f"store {number}"] = store.digest()
        if config.fine_tune_type != "full":  # else all weights are in the checkpoint
            path = self._student.path
            found["student"] = f"{weights_digest(path, quiet=config.quiet)} {config_digest(path)}"
        return found

    def _require_same(self, folder: Path, state: Mapping[str, Any], steps: int) -> None:
        now, was = json.loads(json.dumps(self._config.to_json())), state["config"]
        free = _FREE if self._config.depends_on_iters else _FREE | {"iters"}
        if self._config.teacher is not None:
            free = free | {"on_miss"}  # says what follows when it is lost, and a run that lost it is to go on
        pairs = [(name, was.get(name), now.get(name)) for name in {**was, **now} if name not in free]
        then, today = state["sources"], self._sources
        pairs.append(("shares or values of --store", _shares(was), _shares(now)))
        pairs += [(f"the content of the {name}", then.get(name), today.get(name)) for name in {**then, **today}]
        for name, before, after in pairs:
            if before != after:
                raise ConfigError(
                    f"{folder} was made with {name} {_said(before)}, this run has {_said(after)}; type the command as "
                    "it was, or without --resume and with a new --out"
                )
        if self._config.iters < steps:
            raise ConfigError(
                f"{folder} is already after step {steps}, iters is {self._config.iters}; type --iters with more"
            )


def _shares(config: Mapping[str, Any]) -> str | None:
    """What is typed after the paths of stores, which themselves may differ."""
    combination = Combination.parse(config["store"], config.get("combine"))
    return ", ".join(map(str, combination.shares or combination.values)) or None


def cut_metrics(out: Path, steps: int) -> None:
    """Leave the metrics of this many steps.

    Raises:
        ConfigError: they cannot be written.
    """
    with writing(out):
        path, partial = out / METRICS, out / f".{METRICS}"
        lines = path.read_bytes().splitlines(keepends=True)[:steps] if path.exists() else []
        partial.write_bytes(b"".join(lines))
        sync(partial)
        partial.rename(path)
        sync(out)


def _documents_digest(sequences: Sequence[TokenSequence], columns: Sequence[str]) -> str:
    digest = blake2b(digest_size=16)
    for sequence in sequences:
        digest.update(len(sequence.token_ids).to_bytes(8, "little"))
        digest.update(sequence.token_ids.tobytes() + sequence.trained.tobytes())
        if sequence.asked is not None:
            digest.update(sequence.asked.token_ids.tobytes())
        if sequence.weights is not None:
            digest.update(sequence.weights.tobytes())
        for name in columns:  # they say who teaches a document, or how often it is drawn
            digest.update(repr(sequence.columns.get(name)).encode())
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """In the order of their steps."""
    return sorted((f for f in folder.glob("[0-9]*") if f.is_dir()), key=lambda f: int(f.name))


def _clear(folder: Path) -> None:
    """Remove what a killed process left, and what has been given up."""
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Any], TrainReport, dict[str, mx.array], dict[str, mx.array]]:
    """State, the report in it, the student's weights, and the optimizer's arrays with the random state."""
    try:
        state = json.loads((folder / STATE).read_text())
        report = TrainReport(**state["report"] | {"count": Count(**state["report"]["count"])})
        weights: dict[str, mx.array] = {}
        for file in sorted(folder.glob("*.safetensors")):
            if file.name not in (OPTIMIZER, PROJECTORS):
                weights |= cast(dict[str, mx.array], mx.load(str(file)))
        kept = cast(dict[str, mx.array], mx.load(str(folder / OPTIMIZER)))
        mx.eval(weights, kept)
        if not all(isinstance(state[part], dict) for part in ("config", "sources", "objective")) or _KEY not in kept:
            raise ValueError("it lacks a part")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} cannot be read as a checkpoint: {first_line(error)}; remove it to go on from an older one"
        ) from error
    return state, report, weights, kept


def _loss(folder: Path, *, held_out: bool) -> float:
    """What the best checkpoint is chosen by; infinite where it is not known."""
    try:
        state = json.loads((folder / STATE).read_text())
        loss = state["report"]["final"].get("valid_loss") if held_out else state["mean_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if loss is None or math.isnan(loss) else float(loss)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
