"""A small world to run the real things in: texts, a teacher, a student of other weights and a store, in one folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch
from distill_trainer.config import TrainConfig
from distill_trainer.gradients import mean_gradient
from distill_trainer.report import TrainReport
from distill_trainer.train import train
from logitstore.build import BuildConfig, build
from logitstore.documents import read_documents
from logitstore.sequences import TokenSequence, tokenize
from tests.tiny import CORPUS, save_tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class World:
    """Paths below `folder`."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    def sequences(self, max_seq_length: int = 512) -> list[TokenSequence]:
        return list(tokenize(read_documents(str(self.data)), tiny_tokenizer(), max_seq_length))

    def build(self, out: Path, **options: Any) -> None:
        build(
            BuildConfig(
                **{"teacher": str(self.teacher), "dataset": str(self.data), "out": out, "quiet": True} | options
            )
        )

    def config(self, out: Path, **options: Any) -> TrainConfig:
        usual = {"student": str(self.student), "dataset": str(self.data), "iters": 3, "batch_size": 2}
        return TrainConfig(**usual | {"learning_rate": 1e-3, "quiet": True, "out": str(out)} | options)

    def train(self, out: Path, **options: Any) -> tuple[TrainReport, list[dict[str, Any]]]:
        """Train, and return the report and the lines of metrics.jsonl."""
        report = train(self.config(out, **options))
        return report, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def make_world(folder: Path, texts: Sequence[str] = CORPUS, *, store: bool = True) -> World:
    """Write texts, teacher and student; build the store."""
    world = World(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(world.data, [{"text": text} for text in texts])
    save_tiny_model(world.teacher, seed=1)
    save_tiny_model(world.student, seed=2)
    if store:
        world.build(world.store)
    return world


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gradient(model: Any, chosen: list[Batch]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The means of a step's losses, and its gradient by the names of the parameters."""
    head = distill_kernels.split_head(model)
    means, found = mean_gradient(nn.value_and_grad(model, lambda b: batch_loss(head, SparseKL(), b)), chosen)
    return np.array([mean.item() for mean in means]), {name: np.array(g) for name, g in tree_flatten(found)}
