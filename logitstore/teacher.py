"""The live teacher: token sequences in, encoded records out.

A build, a miss and online distillation all call `Teacher.records`. No gradient ever flows here.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import distill_kernels

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore import device_selection
from logitstore.digest import adapter_digest, config_digest, weights_digest
from logitstore.errors import ModelError, UnusableLogitsError
from logitstore.forward import document_logits, document_outputs
from logitstore.manifest import Manifest, TeacherIdentity, tokenizer_identity
from logitstore.model import load_model
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.sequences import require_places
from logitstore.trace import traced
from logitstore.vocabulary import Vocabulary, vocabulary_of
from logitstore.worker import at_once

T = TypeVar("T")
Submit = Callable[[Callable[[], Any]], "Future[Any]"]


class Teacher:
    """A loaded model that answers with records.

    Args:
        source: an mlx-lm directory, a `.gguf` file or a hub id.
        adapter_path: a LoRA adapter folder as mlx-lm writes it.

    Raises:
        ModelError: it does not load.
    """

    def __init__(self, source: str, adapter_path: str | None = None, *, quiet: bool = False) -> None:
        self.loaded = load_model(source, adapter_path=adapter_path)
        self.tokenizer = self.loaded.tokenizer
        self.vocabulary: Vocabulary = vocabulary_of(self.tokenizer)
        self.head = distill_kernels.split_head(self.loaded.model)
        self.vocab_size = int(self.loaded.model(mx.array([[0]])).shape[-1])
        self.places = self.loaded.places
        self._quiet = quiet

    def manifest(self, recipe: Recipe) -> Manifest:
        """What a store of this teacher's answers says of itself. Reads all weights once, for their digest."""
        loaded = self.loaded
        teacher = TeacherIdentity(
            name=loaded.name,
            weights_digest=weights_digest(loaded.path, quiet=self._quiet),
            config_digest=config_digest(loaded.path),
            adapter_digest=adapter_digest(loaded.adapter_path, quiet=self._quiet) if loaded.adapter_path else None,
            quantization=loaded.quantization,
            dtype=loaded.dtype,
        )
        return Manifest(teacher, tokenizer_identity(self.tokenizer, self.vocabulary), recipe)

    def hidden_size(self, layers: Sequence[int]) -> int:
        """The width of what these layers give; 0 of none.

        Raises:
            ConfigError: a number that the model has no layer of.
            ModelError: its layers cannot be read, or differ in width.
        """
        if not layers:
            return 0
        with traced(self.loaded.model, layers) as found:
            self.loaded.model(mx.array([[0]]))
        sizes = {hidden.shape[-1] for hidden in found.values()}
        if len(sizes) > 1:
            raise ModelError(
                f"teacher {self.loaded.name} has layers of widths {sorted(sizes)}; type --hidden-layers of one width"
            )
        return int(sizes.pop())

    def records(self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe) -> list[DocumentRecord]:
        """Run documents of token ids [L] as one batch, and keep what the recipe says of each position.

        Raises:
            UnusableLogitsError: the teacher gives NaN or infinite logits or hidden states.
        """
        return [finish() for finish in self.submit(documents, recipe, at_once)]

    def submit(
        self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe, submit: Submit
    ) -> list[Callable[[], DocumentRecord]]:
        """The same, but what needs no model is left to `submit`, as `Worker.submit`; calling the results waits for it.

        Raises:
            UnusableLogitsError: the teacher gives NaN or infinite logits or hidden states; here, or when a result is
                called. Or it has learned fewer places than a document has.
        """
        require_places(self.places, max(map(len, documents)) - 1, f"teacher {self.loaded.name}")
        return [
            partial(
                self._finish,
                token_ids,
                [self._begin(token_ids, rows, hidden, first, recipe, submit) for first, rows, hidden in parts],
            )
            for token_ids, parts in zip(documents, self._outputs(documents, recipe.hidden_layers), strict=True)
        ]

    def logits(self, token_ids: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of one document's L - 1 positions, in parts float32 [n, V]."""
        for parts in document_logits(self.head, [token_ids]):
            for rows in parts:
                yield np.array(rows.astype(mx.float32), copy=False)

    def outputs(
        self, token_ids: npt.NDArray[np.int32], layers: Sequence[int]
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
        """The same, each part with the hidden states of these layers [n, layers, D] beside it; None for no layers."""
        for parts in document_outputs(self.head, [token_ids], layers):
            for rows, hidden in parts:
                yield np.array(rows.astype(mx.float32), copy=False), _on_cpu(hidden)

    def _outputs(
        self, documents: Sequence[npt.NDArray[np.int32]], layers: Sequence[int]
    ) -> "Iterator[Iterator[tuple[int, mx.array, npt.NDArray[np.float32] | None]]]":
        """Of each document, where each part of its logits begins, the part, and the hidden states beside it."""
        for parts in document_outputs(self.head, documents, layers):
            yield _numbered(parts)

    def _begin(
        self,
        token_ids: npt.NDArray[np.int32],
        rows: mx.array,
        hidden: npt.NDArray[np.float32] | None,
        first: int,
        recipe: Recipe,
        submit: Submit,
    ) -> "Future[npt.NDArray[np.uint8]]":
        # NumPy selects faster than MLX on a CPU; a GPU keeps [n, V] to itself.
        if distill_kernels.on_cpu():
            logits = np.array(rows.astype(mx.float32), copy=False)
            return submit(lambda: self._checked(lambda: recipe.record(token_ids, logits, first, hidden=hidden)))
        kept = self._checked(lambda: recipe.select(token_ids, rows, first, selector=device_selection))
        return submit(lambda: self._checked(lambda: recipe.encode(replace(kept, hidden=hidden))))

    def _finish(self, token_ids: npt.NDArray[np.int32], parts: "list[Future[npt.NDArray[np.uint8]]]") -> DocumentRecord:
        return DocumentRecord(token_ids, np.concatenate([part.result() for part in parts]))

    def _checked(self, select: Callable[[], T]) -> T:
        try:
            return select()
        except ValueError as error:
            raise UnusableLogitsError(f"teacher {self.loaded.name} cannot be used: {error}") from error


def _numbered(
    parts: "Iterator[tuple[mx.array, mx.array | None]]",
) -> "Iterator[tuple[int, mx.array, npt.NDArray[np.float32] | None]]":
    first = 0
    for rows, hidden in parts:
        yield first, rows, _on_cpu(hidden)
        first += len(rows)


def _on_cpu(hidden: mx.array | None) -> npt.NDArray[np.float32] | None:
    return None if hidden is None else np.array(hidden.astype(mx.float32), copy=False)
