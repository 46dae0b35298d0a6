"""Small stores made without a teacher: random logits through the recipe. No MLX."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.files import LocalFiles
from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore

VOCAB = 300
VOCABULARY = Vocabulary(tuple(b"<%d>" % i for i in range(VOCAB)), frozenset({0, 1}), None, 1)


def manifest(
    select: str = "threshold:4",
    *,
    weights_digest: str = "a" * 32,
    seed: int = 0,
    vocab_size: int = VOCAB,
    **recipe: Any,
) -> Manifest:
    teacher = TeacherIdentity("tiny", weights_digest, "c" * 32, None, None, "float32")
    tokenizer = TokenizerIdentity(VOCABULARY.fingerprint(), VOCAB, None)
    usual: dict[str, Any] = {"temperatures": (1.0,), "seed": seed, "vocab_size": vocab_size}
    return Manifest(teacher, tokenizer, Recipe(Selection.parse(select), **usual | recipe))


def tokens(seed: int, length: int, vocab_size: int = VOCAB) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


def records(lengths: list[int], seed: int = 0, recipe: Recipe | None = None) -> list[DocumentRecord]:
    """Documents of these lengths, each with the answers of a teacher that guesses."""
    recipe = recipe or manifest().recipe
    rng = np.random.default_rng(seed)
    documents = [tokens(100 * seed + i, length, recipe.vocab_size) for i, length in enumerate(lengths)]
    return [guessed(d, recipe, rng) for d in documents]


def guessed(token_ids: npt.NDArray[np.int32], recipe: Recipe, rng: np.random.Generator) -> DocumentRecord:
    logits = rng.normal(0, 3, (len(token_ids) - 1, recipe.vocab_size)).astype(np.float32)
    return DocumentRecord(token_ids, recipe.record(token_ids, logits, hidden=guessed_hidden(recipe, len(logits), rng)))


def guessed_hidden(recipe: Recipe, n: int, rng: np.random.Generator) -> npt.NDArray[np.float32] | None:
    """Hidden states of n positions, a dimension in a hundred much larger than the others; where the recipe has any."""
    if not recipe.hidden_layers:
        return None
    hidden = rng.normal(0, 2, (n, len(recipe.hidden_layers), recipe.hidden_size))
    return np.asarray(hidden * rng.choice([1, 300], hidden.shape, p=[0.99, 0.01]), np.float32)


def small_store(path: Path, shards: int = 2, lengths: tuple[int, ...] = (7, 2, 30)) -> ZarrStore:
    """A store of some shards, each of documents of these lengths."""
    for name, data in small_contents(shards, tuple(lengths)).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return ZarrStore(LocalFiles(path), path)


@cache
def small_contents(shards: int, lengths: tuple[int, ...]) -> dict[str, bytes]:
    """Its files, made once."""
    with TemporaryDirectory() as folder:
        store = ZarrStore.create(Path(folder) / "s", manifest(), VOCABULARY)
        for seed in range(shards):
            store.write_documents(records(list(lengths), seed))
        return contents(store.folder)


def shard_folder(store: ZarrStore, number: int = 0) -> Path:
    """Where one of the store's shards lies."""
    return store.folder / "shards" / sorted(store.shard_names)[number]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
