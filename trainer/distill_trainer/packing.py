"""`--pack`: short documents of a batch side by side in one row, so that less of it is padding.

A document sees itself alone: the model is given, as the cache of each of its layers, an object that makes the attention
mask and hands keys and values back as they are. Rotary embeddings depend on distances, so a document may begin anywhere
in a row. Whether all this holds for a model is tried on it before the first step, not guessed from its name.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module

from logitstore.errors import ModelError, first_line
from logitstore.trace import layers_of

Place = tuple[int, int]
"""Row and position in it where a document begins."""


def rows_of(lengths: Sequence[int], longest: int | None) -> list[Place]:
    """Where documents go; one a row if `longest` is None.

    Of all numbers of rows the one for which rows times the length of the longest is least, and of equal ones the most
    rows. For a number of rows the documents go, long ones first, each to the row that is the shortest so far.

    Args:
        lengths: of the documents, in positions.
        longest: of a row, in positions; a document that is longer than that is not put with others.

    Reference: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969 (longest processing time first).
    """
    best = [(row, 0) for row in range(len(lengths))]
    if longest is None:
        return best
    least, order = len(lengths) * max(lengths), sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for count in range(len(lengths) - 1, 0, -1):
        filled = [(0, row) for row in range(count)]  # a heap
        places: list[Place] = [(0, 0)] * len(lengths)
        for i in order:
            at, row = filled[0]
            places[i] = row, at
            heapq.heapreplace(filled, (at + lengths[i], row))
        length = max(at for at, _ in filled)
        if length > longest:
            break  # fewer rows are longer ones
        if count * length < least:
            least, best = count * length, places
    return best


def padding(batches: Iterable[Sequence[int]], longest: int | None) -> float:
    """The share of positions that hold no document, of batches of these lengths."""
    held = taken = 0
    for lengths in filter(None, batches):  # of several processes one may have none
        places = rows_of(lengths, longest)
        width = max(at + length for (_, at), length in zip(places, lengths, strict=True))
        held += sum(lengths)
        taken += width * (1 + max(row for row, _ in places))
    return 1 - held / taken if taken else 0.0


class Apart:
    """Stands where a layer's cache would, and keeps the documents of a row apart.

    Args:
        documents: int32 [B, T]; which document of its row each position belongs to, -1 for padding.
    """

    offset = 0

    def __init__(self, documents: mx.array) -> None:
        self._documents = documents

    def make_mask(self, _length: int, *, window_size: int | None = None, **_options: Any) -> mx.array:
        """Where a query sees a key, bool [B, 1, T, T]: in its own document, not after itself, within the window."""
        distance = mx.arange(self._documents.shape[1])
        distance = distance[:, None] - distance[None]
        seen = distance >= 0 if window_size is None else (distance >= 0) & (distance < window_size)
        return (seen & (self._documents[:, :, None] == self._documents[:, None, :]))[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Nothing is kept."""
        return keys, values


def kept_apart(model: Module, documents: mx.array) -> list[Apart]:
    """What a model takes as its cache for a batch with these documents, int32 [B, T]: see `Apart`."""
    return [Apart(documents)] * len(layers_of(model))


def require_apart(model: Any, name: str) -> None:
    """Try on a model that documents in one row are what they are alone.

    Rows of two documents: the logits of each must be those of the document by itself, up to the rounding of its dtype,
    and must not change with the tokens of the other one. Three rows, a number that no head count of a mask fits.

    Raises:
        ModelError: they are not.
    """
    one, two, other = [0, 1, 2, 1], [2, 0, 1], [1, 2, 2]
    rows, changed = [one + two, two + one, one + two], [one + other, other + one, one + other]
    first, second = [0] * 4 + [1] * 3, [0] * 3 + [1] * 4
    every: Any = model.modules
    modes = [(module, module.training) for module in every()]
    model.eval()  # dropout would fall differently
    reason = ""
    try:
        cache = kept_apart(model, mx.array([first, second, first]))
        packed, moved = (model(mx.array(tokens), cache).astype(mx.float32) for tokens in (rows, changed))
        alone = [model(mx.array([tokens]))[0] for tokens in (one, two)]
        largest = mx.abs(alone[0]).max().astype(mx.float32).item()
        tolerance = (1e-3 if alone[0].dtype == mx.float32 else 0.05) * largest
        for row, of_one in ((0, slice(0, 4)), (1, slice(3, 7))):
            if mx.abs(packed[row, of_one] - moved[row, of_one]).max() > 1e-3 * largest:
                raise ValueError("a document's logits change with the tokens of another in its row")
        for row, at, truth in ((0, 0, alone[0]), (0, 4, alone[1]), (1, 0, alone[1]), (1, 3, alone[0])):
            found = packed[row, at : at + len(truth)]
            if mx.abs(found - truth.astype(mx.float32)).max() > tolerance:
                raise ValueError("a document's logits are others than those of the document alone")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ModelError) as error:
        reason = first_line(error)
    finally:
        for module, training in modes:
            module.train(training)
    if reason:
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"student {name} is a {kind}, which does not keep documents apart in one row: {reason}; leave --pack out"
        )
