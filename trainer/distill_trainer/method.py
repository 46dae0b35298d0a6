"""Ways of learning from a teacher beside its next-token distributions: terms that are added to a step's loss.

    loss = sum_t w_t (alpha KL_t + (1 - alpha) CE_t + sum_m c_m l_m,t) / sum_t w_t

over the trained positions t of a step, with position weights w (1 unless a run asks for others) and c_m the weight of
method m. Where the teacher gave a method nothing, l_m,t is 0; what is reported is the mean over the other positions.

The loop knows methods by this file alone. What a method trains of its own, it trains in the student's optimizer step;
that is saved apart, in `projectors.safetensors`, and is no part of the student.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from distill_trainer.batches import Batch, Beside
from logitstore.errors import ModelError, first_line
from logitstore.targets import SparseTargets

PROJECTORS = "projectors.safetensors"
Answers = Sequence[SparseTargets | None]


class Method(Protocol):
    """A term of the loss."""

    @property
    def name(self) -> str:
        """`NAME_loss` is its mean in the metrics."""
        ...

    @property
    def weight(self) -> float:
        """c_m, above 0."""
        ...

    @property
    def module(self) -> Module:
        """What it trains of its own; empty where it is nothing."""
        ...

    def beside(self, batch: Batch, answers: Answers) -> Beside:
        """What the teacher says of a batch, of which no gradient is taken."""
        ...

    def watching(self) -> AbstractContextManager[Any]:
        """Stands around the student's forward pass, and gives what `losses` reads."""
        ...

    def losses(self, seen: Any, batch: Batch, beside: Beside) -> mx.array:
        """l_t of the batch's trained positions, float32 [N]; finite where the teacher said nothing, too."""
        ...


class _Together(Module):
    """The student and what the methods train, as one module of which a gradient is taken."""

    def __init__(self, student: Module, methods: Sequence[Method]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.student = student
        for method in methods:
            self[method.name] = method.module


def learner(student: Module, methods: Sequence[Method]) -> Module:
    """What a step trains: the student itself, or together with what methods train of their own."""
    return _Together(student, methods) if own_parameters(methods) else student


def with_teacher(batch: Batch | None, methods: Sequence[Method], answers: Answers) -> Batch | None:
    """The batch with what its methods ask of the teacher."""
    if batch is None or not methods:
        return batch
    return batch._replace(beside=tuple(method.beside(batch, answers) for method in methods))


def read_by_teacher(batch: Batch, answers: Answers) -> tuple[mx.array, mx.array, mx.array]:
    """What a live teacher is given to read beside its answers: the documents that it answered.

    Returns:
        (tokens, rows, weights): int32 [B, T'], zeros in place of other documents, and no longer than what was answered;
        int32 [N], where the batch's rows are in them; float32 [N], what these weigh, 0 of what was not answered.
    """
    lengths = [0 if targets is None else len(targets) for targets in answers]
    longest = max(*lengths, 1)
    documents, positions = batch.rows // batch.tokens.shape[1], batch.rows % batch.tokens.shape[1]
    there = mx.array(lengths)
    tokens = mx.where(there[:, None] > 0, batch.tokens[:, :longest], 0)
    rows = documents * longest + mx.minimum(positions, longest - 1)
    return tokens, rows, mx.where(positions < there[documents], batch.each_weight, 0)


def with_methods(
    loss: Callable[[Batch], tuple[mx.array, ...]], methods: Sequence[Method], batch: Batch
) -> tuple[mx.array, ...]:
    """The losses of a batch, the total first, with the methods' terms in it and their means at the end."""
    with ExitStack() as stack:
        seen = [stack.enter_context(method.watching()) for method in methods]
        total, *means = loss(batch)
        for method, watched, beside in zip(methods, seen, batch.beside, strict=True):
            weights = beside.weights
            summed = mx.where(weights > 0, weights * method.losses(watched, batch, beside), 0).sum()
            total = total + method.weight * summed / batch.weight
            means.append(summed / mx.where(weights.sum() > 0, weights.sum(), 1))
    return total, *means


def reported(methods: Sequence[Method], batches: Sequence[Batch], means: Sequence[float]) -> dict[str, float | None]:
    """The methods' metrics of a step; None where the teacher said nothing about any of its positions."""
    found: dict[str, float | None] = {}
    for number, method in enumerate(methods):
        there = any((batch.beside[number].weights > 0).any().item() for batch in batches)
        # there may be some in another process's part of the step alone
        found[f"{method.name}_loss"] = means[number] if means and (there or means[number]) else None
    return found


def own_parameters(methods: Sequence[Method]) -> dict[str, mx.array]:
    """What the methods train of their own, as METHOD.NAME."""
    found: dict[str, mx.array] = {}
    for method in methods:
        parameters = cast(dict[str, mx.array], tree_flatten(method.module.parameters(), destination={}))  # type: ignore[no-untyped-call]
        found |= {f"{method.name}.{name}": values for name, values in parameters.items()}
    return found


def save_own(methods: Sequence[Method], folder: Path) -> None:
    """Write what the methods train of their own, where there is any, into a folder that is there."""
    parameters = own_parameters(methods)
    if parameters:
        partial = folder / f".partial-{PROJECTORS}"
        try:
            mx.save_safetensors(str(partial), parameters)
            partial.rename(folder / PROJECTORS)
        finally:
            partial.unlink(missing_ok=True)


def load_own(methods: Sequence[Method], folder: Path) -> None:
    """Put back what `save_own` wrote.

    Raises:
        ModelError: it is not there, or does not fit.
    """
    if not own_parameters(methods):
        return
    try:
        kept = cast(dict[str, mx.array], mx.load(str(folder / PROJECTORS)))
        mx.eval(kept)
        for method in methods:
            start = f"{method.name}."
            mine = [(name.removeprefix(start), values) for name, values in kept.items() if name.startswith(start)]
            method.module.load_weights(mine)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / PROJECTORS} cannot be read: {first_line(error)}; remove {folder} to go on from an older one"
        ) from error
