"""The live teacher: token sequences in, encoded records out.

A build, a miss and online distillation all call `Teacher.records`. No gradient ever flows here.
"""

from collections.abc import Sequence
from hashlib import blake2b

import distill_kernels
from distill_kernels.select import select_threshold_ops, select_top_k_ops

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore.digest import adapter_digest, config_digest, weights_digest
from logitstore.errors import ModelError
from logitstore.forward import document_logits
from logitstore.key import document_key
from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.model import load_model
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selected, Selection, randomness
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
        answers = []
        for token_ids, logits in zip(documents, document_logits(self.head, documents), strict=True):
            parts, first = [], 0
            for rows in logits:
                try:
                    parts.append(self._record(token_ids, rows, first, recipe))
                except ValueError as error:
                    raise ModelError(f"teacher {self.loaded.name} cannot be used: {error}") from error
                first += len(rows)
            answers.append(DocumentRecord(token_ids, np.concatenate(parts)))
        return answers

    def _record(
        self, token_ids: npt.NDArray[np.int32], logits: mx.array, first: int, recipe: Recipe
    ) -> npt.NDArray[np.uint8]:
        """Select on the device where the logits are: NumPy is faster on a CPU, a GPU keeps [n, V] to itself."""
        if mx.default_device() == mx.cpu:
            return recipe.record(token_ids, np.array(logits.astype(mx.float32), copy=False), first)
        stop = first + len(logits)
        selection = recipe.selection
        random = randomness(
            document_key(token_ids), np.arange(first, stop), selection, recipe.vocab_size, seed=recipe.seed
        )
        labels = mx.array(token_ids[first + 1 : stop + 1])
        if selection.kind == "threshold":
            order, start = mx.array(random.block_order.astype(np.uint32)), mx.array(random.start.astype(np.float32))
            kept = select_threshold_ops(logits, labels, selection.k, recipe.temperature, order, start)
        else:
            kept = select_top_k_ops(logits, labels, selection.k, recipe.temperature)
        if not mx.isfinite(kept.entropy).all().item():
            raise ValueError("its logits hold NaN, +inf or nothing finite")
        ids, probs, count, tail, label, entropy = (np.array(array) for array in kept)
        float64 = [array.astype(np.float64) for array in (probs, tail, label, entropy)]
        return recipe.pack(Selected(ids, float64[0], count, *float64[1:]), random.rounding)


def tokenizer_identity(tokenizer: object, vocabulary: Vocabulary) -> TokenizerIdentity:
    """What a manifest says of a tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    digest = blake2b(str(template).encode(), digest_size=16).hexdigest() if template else None
    return TokenizerIdentity(vocabulary.fingerprint(), len(vocabulary), digest)
