"""Several processes that train one student: `mlx.launch -n 2 distill-train ...`.

All go through the same batches in the same order, and each takes its own documents of every batch. A step is the sum of
their gradients, weighted by trained positions, as if one process had taken them all: so all have the same weights after
it, and the first alone writes anything. A process by itself computes and draws what it would without this file.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_map

from distill_trainer.batches import Batch
from distill_trainer.config import TrainConfig
from distill_trainer.gradients import Means, mean_gradient, weights_of
from distill_trainer.interrupts import uninterrupted
from distill_trainer.targets import Count
from logitstore.errors import ConfigError, LogitstoreError, ProcessLostError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Those of the run, as one of them sees them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def require_shares(self, config: TrainConfig) -> None:
        """Check that a run can be shared.

        Raises:
            ConfigError: saying what to type.
        """
        size, batch = self.size, config.batch_size
        if size > 1 and batch % size:
            raise ConfigError(
                f"--batch-size {batch} is of all processes together, and {size} of them cannot share it evenly; "
                f"type --batch-size {-(-batch // size) * size}"
            )
        if size > 1 and config.write_back:
            raise ConfigError(
                f"--write-back has one writer, and {size} processes ask the teacher; leave it out, or "
                "type `logitstore build` with this dataset first"
            )

    def share(self, documents: Sequence[T]) -> Sequence[T]:
        """This process's documents of a batch; none where the last batch of an epoch is too short."""
        return documents[self.rank :: self.size]

    def seed(self, seed: int, step: int) -> None:
        """Let each process draw its own dropout, from the run's seed and the step: a resumed run draws it again."""
        if self.size > 1:
            drawn = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            mx.random.seed(int(drawn[0]))

    def total(self, count: Count, *numbers: int) -> tuple[Count, list[int]]:
        """What all processes have counted in a step, and the sums of other numbers of theirs.

        Raises:
            ProcessLostError: one is gone.
        """
        if self.size == 1:
            return count, list(numbers)
        counted = astuple(count)
        sums = cast(list[int], self._sum(mx.array([*counted, *numbers], mx.int32)).tolist())
        total, others = Count(*sums[: len(counted)]), sums[len(counted) :]
        return replace(total, on_policy=count.on_policy), others  # batches, of which each process has a part

    def mean_gradient(
        self, step: Callable[[Batch], tuple[Means, Any]], batches: Sequence[Batch], model: Module, methods: int = 0
    ) -> tuple[Means, Any]:
        """Losses and gradient of all processes' batches as of one that holds all of their documents.

        sum_r (n_r / n) g_r, with n_r trained positions of process r, or the sum of their weights. One that has none
        takes part with zeros.

        Args:
            batches: this process's own.
            methods: how many there are beside the losses: each has a mean too.

        Raises:
            ProcessLostError: one is gone.
        """
        if self.size == 1:
            return mean_gradient(step, batches)
        own = mx.array([[0.0] * (3 + methods), *weights_of(batches)]).sum(axis=0)
        total = self._sum(own)
        shares = own / mx.where(total > 0, total, 1)
        share = cast(float, shares[0].item())
        if batches:
            means, gradients = mean_gradient(step, batches)
        else:
            means = (mx.array(0.0),) * (3 + methods)
            gradients = tree_map(mx.zeros_like, model.trainable_parameters())  # type: ignore[no-untyped-call]
        # evaluated apart: a GPU must not wait in the middle of its own work for the slowest process
        scaled = tree_map(lambda g: self.size * share * g, gradients)  # the next line divides by the size again
        with _lost():
            gradients = nn.average_gradients(scaled)
            mx.eval(gradients)
        sums = self._sum(mx.stack([mean.astype(mx.float32) for mean in means]) * shares)
        return tuple(sums[i] for i in range(len(means))), gradients

    @contextmanager
    def together(self) -> Iterator[None]:
        """Stands around all steps, each of which calls `go_on`: where one process leaves, all leave before that step.

        Raises:
            KeyboardInterrupt: in the others.
        """
        try:
            yield
        except (_Left, ProcessLostError):
            raise
        except (KeyboardInterrupt, LogitstoreError):
            with uninterrupted(last=True), suppress(ProcessLostError):
                self._leave()
            raise
        with uninterrupted(last=True):
            self.go_on()

    def go_on(self) -> None:
        """Begin a step with all others.

        Raises:
            KeyboardInterrupt: one of them has left.
            ProcessLostError: one of them is gone.
        """
        if self.size > 1 and self._sum(mx.array(0)).item():
            raise _Left

    def wait(self) -> None:
        """For the others, the first of which may still be writing: who launched them ends all when one has ended."""
        if self.size > 1:
            with suppress(ProcessLostError):
                self._sum(mx.array(0))

    def _leave(self) -> None:
        if self.size > 1:
            self._sum(mx.array(1))

    @staticmethod
    def _sum(values: mx.array) -> mx.array:
        with _lost():
            total = mx.distributed.all_sum(values)
            mx.eval(total)
        return total


ALONE = Processes()
"""A run of one process."""


class _Left(KeyboardInterrupt):
    """Another process has been interrupted, or has failed."""


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            f"another process of this run is gone ({first_line(error)}); look at what it said, and "
            "type the same command with --resume"
        ) from error


def processes() -> Processes:
    """This process among those that `mlx.launch` started with it; alone where it was started by itself.

    Raises:
        ConfigError: it is not the first, and MLX finds no others: all would train alone, into one folder.
    """
    group = mx.distributed.init()
    rank = os.environ.get("MLX_RANK", "")
    if rank not in ("", str(group.rank())):
        raise ConfigError(
            f"this is process {rank} of a run, and MLX found no others; type mlx.launch with --backend ring, or "
            "unset MLX_RANK"
        )
    return Processes(group.rank(), group.size())
