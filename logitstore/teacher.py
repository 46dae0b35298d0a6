"""The live teacher: token sequences in, encoded records out.

A build, a miss and online distillation all call `Teacher.records`. No gradient ever flows here.
"""

from collections.abc import Sequence
from hashlib import blake2b

import distill_kernels

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore.device_selection import select as device_select
from logitstore.digest import adapter_digest, config_digest, weights_digest
from logitstore.errors import ModelError
from logitstore.forward import document_logits
from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.model import load_model
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.vocabulary import Vocabulary, vocabulary_of


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
        self._quiet = quiet

    def manifest(self, selection: Selection, temperature: float, seed: int) -> Manifest:
        """What a store of this teacher's answers says of itself. Reads all weights once, for their digest.

        Raises:
            ConfigError: a selection or temperature that cannot be.
        """
        recipe = Recipe(selection, temperature, seed, self.vocab_size)
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

    def records(self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe) -> list[DocumentRecord]:
        """Run documents of token ids [L] as one batch, and keep what the recipe says of each position.

        Raises:
            ModelError: the teacher gives NaN or infinite logits.
        """
        # NumPy selects faster than MLX on a CPU; a GPU keeps [n, V] to itself.
        on_cpu = distill_kernels.on_cpu()
        answers = []
        for token_ids, logits in zip(documents, document_logits(self.head, documents), strict=True):
            parts, first = [], 0
            for rows in logits:
                try:
                    if on_cpu:
                        parts.append(recipe.record(token_ids, np.array(rows.astype(mx.float32), copy=False), first))
                    else:
                        parts.append(recipe.record(token_ids, rows, first, select=device_select))
                except ValueError as error:
                    raise ModelError(f"teacher {self.loaded.name} cannot be used: {error}") from error
                first += len(rows)
            answers.append(DocumentRecord(token_ids, np.concatenate(parts)))
        return answers


def tokenizer_identity(tokenizer: object, vocabulary: Vocabulary) -> TokenizerIdentity:
    """What a manifest says of a tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    digest = blake2b(str(template).encode(), digest_size=16).hexdigest() if template else None
    return TokenizerIdentity(vocabulary.fingerprint(), len(vocabulary), digest)
