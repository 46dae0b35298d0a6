"""A teacher without a model, a store of its answers, and a way to damage it. No MLX."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.store import create_store
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCAB, VOCABULARY, guessed, manifest, tokens


class Stub:
    """A teacher that guesses, always the same of the same document."""

    tokenizer = None
    vocab_size = VOCAB

    def __init__(self, weights_digest: str = "a" * 32) -> None:
        self.weights_digest = weights_digest
        self.asked = 0

    def manifest(self, recipe: Recipe) -> Manifest:
        return replace(manifest(weights_digest=self.weights_digest), recipe=recipe)

    def submit(
        self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe, submit: Callable[[Callable[[], Any]], Any]
    ) -> list[Callable[[], DocumentRecord]]:
        self.asked += len(documents)
        return [submit(lambda d=d: answer(d, recipe)).result for d in documents]


def answer(token_ids: npt.NDArray[np.int32], recipe: Recipe) -> DocumentRecord:
    return guessed(token_ids, recipe, np.random.default_rng(list(document_key(token_ids))))


def make(path: Path, lengths: Sequence[int] = (60, 30, 20, 90, 40, 70, 12, 33)) -> ZarrStore:
    """Shards of some 100 positions."""
    store = create_store(path, manifest(), VOCABULARY)
    with store.writer("build") as writer:
        for seed, length in enumerate(lengths):
            writer.append([answer(tokens(seed, length), manifest().recipe)])
            if sum(len(document.records) for document in writer.pending.values()) >= 100:
                writer.commit(list(writer.pending))
        writer.commit(list(writer.pending))
    store.save_fidelity({"documents": len(lengths)})
    assert isinstance(store, ZarrStore)
    return store


def flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1
    file.write_bytes(data)
