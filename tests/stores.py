"""Small stores made without a teacher: random logits through the recipe. No MLX."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore

VOCAB = 300
VOCABULARY = Vocabulary(tuple(b"<%d>" % i for i in range(VOCAB)), frozenset({0, 1}), None, 1)


def manifest(select: str = "threshold:4", *, weights_digest: str = "a" * 32, seed: int = 0) -> Manifest:
    teacher = TeacherIdentity("tiny", weights_digest, "c" * 32, None, None, "float32")
    tokenizer = TokenizerIdentity(VOCABULARY.fingerprint(), VOCAB, None)
    return Manifest(teacher, tokenizer, Recipe(Selection.parse(select), 1.0, seed, VOCAB))


def tokens(seed: int, length: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def records(lengths: list[int], seed: int = 0, recipe: Recipe | None = None) -> list[DocumentRecord]:
    """Documents of these lengths, each with the answers of a teacher that guesses."""
    recipe = recipe or manifest().recipe
    rng = np.random.default_rng(seed)
    documents = [tokens(100 * seed + i, length) for i, length in enumerate(lengths)]
    logits = [rng.normal(0, 3, (len(d) - 1, VOCAB)).astype(np.float32) for d in documents]
    return [DocumentRecord(d, recipe.record(d, z)) for d, z in zip(documents, logits, strict=True)]


def small_store(path: Path, shards: int = 2, lengths: tuple[int, ...] = (7, 2, 30)) -> ZarrStore:
    """A store of some shards, each of documents of these lengths."""
    store = ZarrStore.create(path, manifest(), VOCABULARY)
    for seed in range(shards):
        store.write_shard(records(list(lengths), seed))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
