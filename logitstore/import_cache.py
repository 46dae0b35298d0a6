"""Import another tool's cache as a store: its entries through the codec, what it forgot from whoever types the command.

Reads the cache twice: once to see that all of it can be read, and how wide it is; then it writes, shard by shard. The
store says in its manifest what is not known. Its teacher is a name and no weights, so no live teacher ever fits it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from logitstore.codec import encode_position, quantize, to_record
from logitstore.contract import Store
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError, first_line
from logitstore.foreign import ForeignDocument, ForeignSource, open_foreign, options_of
from logitstore.foreign.document import MAX_ID
from logitstore.journal import left_by
from logitstore.key import document_key
from logitstore.manifest import MOST_TOKENS, Manifest, TeacherIdentity, tokenizer_identity
from logitstore.measures import ASSUMED
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.sealed import file_digest
from logitstore.selection import Selected, Selection, randomness
from logitstore.target_store import existing, target_store, unzipped, write_all
from logitstore.tokenizer import load_tokenizer
from logitstore.vocabulary import vocabulary_of
from logitstore.zip_store import ZIP_SUFFIX

WRITER = "import"
TAIL_MASS = "tail mass"
SEED = 0
NAMED, KEY_DIGITS = 3, 12
"""So many documents with other targets are named, by so much of their keys as `logitstore query` shows."""


@dataclass(frozen=True)
class ImportConfig:
    """What `logitstore import` takes; the names are its flags."""

    format: str
    source: Path
    out: Path
    teacher: str
    """Its name: no model is loaded."""
    tokenizer: str
    """A folder, a .gguf file or a hub id."""
    vocab_size: int | None = None
    """Width of the teacher's LM head. [default: what the cache says, else the tokenizer's size]"""
    assume_normalised: bool = False
    """Take the kept probabilities for all there are, where the cache does not tell what they leave."""
    check_alignment: bool = True
    compression_config: Path | None = None
    legacy_values: str | None = None
    alignment: str | None = None
    logprobs_field: str | None = None
    temperature: float | None = None
    renormalised: bool | None = None
    split: str | None = None
    tokens: Path | None = None
    """JSON Lines: the token ids of each row, in the cache's order (for dwq: of each batch, a list of rows)."""
    quiet: bool = False


@dataclass(frozen=True)
class ImportReport:
    """What was imported."""

    documents: int
    positions: int
    repeated: int
    """Documents of the cache that repeat an earlier one's tokens; the first is kept."""
    unanswered: int
    """Positions of which the cache says nothing."""
    unknown: tuple[str, ...]
    disk_bytes: int


@dataclass
class _Survey:
    documents: int = 0
    positions: int = 0
    widest: int = 0
    largest_id: int = 0
    unanswered: int = 0


def import_cache(config: ImportConfig, say: Callable[[str], None] = lambda _line: None) -> ImportReport:
    """Write a store with the documents of a cache, or go on with that.

    Raises:
        ConfigError: an option that the format needs and did not get, or takes not.
        DatasetError: the cache cannot be read; nothing is written.
        ModelError: no such tokenizer.
        IncompatibleStoreError: `out` was begun by something else, or has other targets; nothing is written.
        StoreError: `out` is no store; full disk and the like.
    """
    target = existing(config.out)
    source = _open(config)
    if TAIL_MASS in source.unknown and not config.assume_normalised:
        raise ConfigError(
            f"{config.source} does not tell how much probability lies outside the kept entries; type "
            "--assume-normalised to take it for none, which makes the entries too large"
        )
    unknown = tuple(ASSUMED if name == TAIL_MASS else name for name in source.unknown)
    tokenizer = load_tokenizer(config.tokenizer, "--tokenizer")
    vocabulary = vocabulary_of(tokenizer)
    known = source.known.get("vocab_size")
    vocab_size = config.vocab_size or (known if isinstance(known, int) else len(vocabulary))
    if vocab_size < len(vocabulary):
        raise ConfigError(
            f"the tokenizer {config.tokenizer} has {len(vocabulary):,} tokens, the cache's teacher {vocab_size:,}; "
            "type --tokenizer with the one that the cache was made with"
        )
    if vocab_size > MOST_TOKENS:  # a shard counts every id
        raise ConfigError(
            f"the teacher's LM head is said to be {vocab_size:,} wide, expected at most {MOST_TOKENS:,}; "
            "type --vocab-size with its width"
        )
    found = _survey(source, vocab_size, quiet=config.quiet)
    say(f"{found.documents:,} documents, {found.positions:,} positions, at most {found.widest} entries each")

    recipe = Recipe(Selection("top-k", max(found.widest, 1)), (1.0,), SEED, vocab_size)
    manifest = Manifest(
        _teacher(config, unknown), tokenizer_identity(tokenizer, vocabulary), recipe, source.format, unknown
    )
    if target is not None:
        target.manifest.require_compatible(manifest, config.out)
        if config.out.suffix == ZIP_SUFFIX:
            raise ConfigError(f"{config.out} is there, and a zip file cannot be added to; type another path")
    begun = target is not None or unzipped(config.out).exists()
    said = _said(config, recipe) if begun else {}
    if target is not None:
        _require_agreement(target, said, config)
    with (
        target_store(config.out, manifest, vocabulary, lambda d: said.get(d.key) == _digest(d)) as store,
        tqdm(total=found.positions, unit="tok", desc="import", delay=1, disable=config.quiet) as bar,
    ):
        documents = (to_document_record(document, recipe) for document in _open(config).documents)
        write_all(documents, store, WRITER, bar.update)
        held, positions, disk_bytes = len(store), store.positions, store.disk_bytes
    return ImportReport(held, positions, max(found.documents - held, 0), found.unanswered, unknown, disk_bytes)


def to_document_record(document: ForeignDocument, recipe: Recipe) -> DocumentRecord:
    """A document of a cache as a store keeps it.

    Probabilities that sum to more than 1, as a lossy codec's may, are scaled to sum to 1. A label that was not kept has
    the lowest log-prob that there is a code for, and every position the highest entropy: the manifest says that these
    are unknown.
    """
    count, k = len(document.ids), recipe.selection.k
    kept = np.isfinite(document.log_probs[:, :k])
    width = kept.shape[1]
    values = np.zeros((count, k))
    values[:, :width] = np.where(kept, np.exp(document.log_probs[:, :k]), 0)
    values /= np.maximum(values.sum(axis=1), 1)[:, None]
    ids = np.zeros((count, k), np.uint32)
    ids[:, :width] = np.where(kept, document.ids[:, :k], 0)
    label = document.label_log_prob
    selected = Selected(
        ids=ids,
        values=values,
        head_count=kept.sum(axis=1).astype(np.int32),
        tail_mass=np.exp(document.log_tail_mass),
        label_log_prob=np.where(np.isnan(label), -np.inf, label),
        entropy=np.full(count, np.inf),
    )
    key = document_key(document.token_ids)
    random = randomness(key, np.arange(count), recipe.selection, recipe.vocab_size, seed=recipe.seed)
    entries = to_record(quantize(selected, random.rounding, recipe.form), recipe.form)
    position = encode_position(selected, np.empty((count, 0)))
    return DocumentRecord(document.token_ids, np.concatenate([entries, position], axis=1))


def _open(config: ImportConfig) -> ForeignSource:
    taken = options_of(config.format)
    options: dict[str, Any] = {} if config.check_alignment else {"check_alignment": False}
    for name in ("compression_config", "legacy_values", "alignment", "logprobs_field", "temperature", "renormalised"):
        options[name] = getattr(config, name)
    options["split"] = config.split
    if config.tokens is not None:
        tokens = next((name for name in ("token_rows", "token_batches") if name in taken), "tokens")
        options[tokens] = _token_lists(config.tokens, depth=2 if tokens == "token_batches" else 1)
    elif taken.get("token_batches"):
        raise ConfigError(
            f"{config.format} does not record the tokens; type --tokens FILE.jsonl, a line for each batch: "
            "a list of its rows of token ids"
        )
    return open_foreign(config.format, config.source, **{n: v for n, v in options.items() if v is not None})


def _token_lists(path: Path, depth: int) -> Iterator[Any]:
    expected = "a list of rows of token ids" if depth == 2 else "a list of token ids"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                value = json.loads(line)
                rows = value if depth == 2 and isinstance(value, list) else [value]
                if not all(
                    isinstance(row, list) and all(type(i) is int and 0 <= i <= MAX_ID for i in row) for row in rows
                ):
                    raise DatasetError(f"{path.name}:{number}: expected {expected}; write the file again")
                yield value
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read: {first_line(error)}; expected {expected} on each line") from error


def _survey(source: ForeignSource, vocab_size: int, *, quiet: bool) -> _Survey:
    found = _Survey()
    for document in tqdm(source.documents, desc="read", unit="doc", delay=1, leave=False, disable=quiet):
        kept = np.isfinite(document.log_probs).sum(axis=1)
        found.documents += 1
        found.positions += len(kept)
        found.widest = max(found.widest, int(kept.max(initial=0)))
        found.unanswered += int((kept == 0).sum())
        largest = max(int(document.ids.max(initial=0)), int(document.token_ids.max(initial=0)))
        if largest >= vocab_size:
            raise DatasetError(
                f"{document.where}: found id {largest}, expected 0 to {vocab_size - 1}; type --vocab-size with the "
                "width of the teacher's LM head, or --tokenizer with the cache's own"
            )
    if not found.documents:
        raise DatasetError(f"{source.format}: the cache holds no document with two tokens; type the path of another")
    return found


def _said(config: ImportConfig, recipe: Recipe) -> dict[bytes, str]:
    """A digest of what the cache says of each document, by key; of one that it has twice, the first time."""
    said: dict[bytes, str] = {}
    documents = _open(config).documents
    for document in tqdm(documents, desc="compare", unit="doc", delay=1, leave=False, disable=config.quiet):
        record = to_document_record(document, recipe)
        said.setdefault(record.key, _digest(record))
    return said


def _digest(document: DocumentRecord) -> str:
    return file_digest(document.records.tobytes())


def _require_agreement(target: Store, said: dict[bytes, str], config: ImportConfig) -> None:
    """Raise IncompatibleStoreError where a store has other targets for a document than the cache, as it is read now."""
    documents = chain(map(target.record, range(len(target))), left_by(WRITER, target))
    others = [d.key.hex()[:KEY_DIGITS] for d in documents if said.get(d.key, found := _digest(d)) != found]
    if others:
        more = f", and {len(others) - NAMED:,} more," if len(others) > NAMED else ""
        raise IncompatibleStoreError(
            f"documents {', '.join(others[:NAMED])}{more} have other targets in {config.out} than in {config.source}, "
            "read with these options; nothing was written: type the options that it was begun with, or another --out"
        )


def _teacher(config: ImportConfig, unknown: tuple[str, ...]) -> TeacherIdentity:
    """A teacher of which there is a name: its digest is one of what is known, and no digest of weights."""
    told = json.dumps([config.format, config.teacher, unknown])
    digest = f"unknown-{blake2b(told.encode(), digest_size=16).hexdigest()}"
    return TeacherIdentity(config.teacher, digest, None, None, None, "unknown")
