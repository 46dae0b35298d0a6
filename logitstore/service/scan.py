"""What is known of all documents of a served store at once: their measures, their texts and the store's histograms.

That takes reading the store once. Shards are written once, so what was read of one is kept, and new ones are added.
Each request reads on for a moment, and answers with how far that is: nothing is read that nobody waits for, and no
request waits for a whole store. What is kept is bounded, and belongs to one process.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import numpy.typing as npt

from logitstore.condition import Condition
from logitstore.measures import NAMES, measure, unknown
from logitstore.service.shelf import Served
from logitstore.stats import Collection, StoreStats
from logitstore.store_stats import about, known
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary

MOST_DOCUMENTS = 1 << 20
"""Of a store, those that come first; 48 bytes each."""
MOST_TEXT_BYTES = 32 << 20
"""Of a store's documents, as many as come first have their texts kept, to be searched."""
READ_S = 0.4
"""How long a request reads on."""


@dataclass(frozen=True)
class Rows:
    """Documents that were asked for."""

    numbers: npt.NDArray[np.int64]
    """In the order asked for."""
    searched: int
    """How many documents' texts were there to be searched."""


@dataclass(frozen=True)
class Progress:
    """How far a store has been read."""

    scanned: int
    of: int
    finished: bool
    """Nothing is left that would be read: all, or `MOST_DOCUMENTS`."""


@dataclass
class _Part:
    """A shard, as far as it was read."""

    values: npt.NDArray[np.float64]
    """[D, len(NAMES)]"""
    texts: list[bytes] = field(default_factory=list)
    """Of the first documents, without case."""
    done: int = 0


class Scan:
    """The documents of one store."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._reading = Lock()
        self._lock = Lock()
        self._manifest = served.store.manifest
        self._forget()

    def _forget(self) -> None:
        self._parts: dict[str, _Part] = {}
        self._collection = Collection()
        self._documents = self._text_bytes = 0

    def read_on(self, seconds: float = READ_S) -> Progress:
        """Read documents that are not known yet, for so long; while another request does, wait for it as long.

        Raises:
            CorruptStoreError: the bytes are not those that were written.
        """
        deadline = time.monotonic() + seconds
        if self._reading.acquire(timeout=seconds):
            try:
                self._read(deadline)
            finally:
                self._reading.release()
        return self.progress()

    def progress(self) -> Progress:
        """How far that is."""
        numbers = self._numbers()
        of = sum(int((shard >= 0).sum()) for shard in numbers.values())
        with self._lock:
            scanned = sum(int((numbers[name][: part.done] >= 0).sum()) for name, part in self._known(numbers))
            return Progress(scanned, of, scanned == of or self._documents >= MOST_DOCUMENTS)

    def rows(
        self, conditions: Sequence[Condition] = (), text: str = "", sort: str | None = None, descending: bool = False
    ) -> Rows:
        """The known documents that fulfil all conditions and have this in their text, whatever its case, in the
        store's order or by a measure; of equals the first first.
        """
        wanted = text.casefold().encode()
        numbers = self._numbers()
        with self._lock:
            known = [(numbers[name][: part.done], part) for name, part in self._known(numbers)]
            values = np.concatenate([part.values[: part.done] for _, part in known] or [np.empty((0, len(NAMES)))])
            searched = sum(len(part.texts) for _, part in known)
            texts = [(part.done, list(part.texts)) for _, part in known] if wanted else []
        found = np.concatenate([shard for shard, _ in known] or [np.empty(0, np.int64)])
        keep = found >= 0
        for condition in conditions:
            keep &= condition.compare(values[:, NAMES.index(condition.name)])
        if wanted:
            keep &= np.fromiter(
                (n < len(some) and wanted in some[n] for done, some in texts for n in range(done)), bool
            )
        found, values = found[keep], values[keep]
        order = np.argsort(found)
        if sort is not None:
            column = values[order, NAMES.index(sort)]
            order = order[np.argsort(-column if descending else column, kind="stable")]
        elif descending:
            order = order[::-1]
        return Rows(found[order], searched)

    def stats(self) -> StoreStats:
        """The store's histograms over the documents read so far."""
        with self.served.reading() as store:
            plane_bytes, fidelity, manifest = store.plane_bytes(), store.fidelity, store.manifest
        with self._lock:
            found = self._collection.stats(plane_bytes, fidelity, name=self.served.name, about=about(manifest))
            return known(found, manifest)

    def _numbers(self) -> dict[str, npt.NDArray[np.int64]]:
        with self.served.reading() as store:
            return store.catalog.numbers()

    def _known(self, numbers: Mapping[str, object]) -> list[tuple[str, _Part]]:
        return [(name, self._parts[name]) for name in numbers if name in self._parts]

    def _read(self, deadline: float) -> None:
        numbers = self._numbers()
        with self.served.reading() as store:
            vocabulary, manifest = store.vocabulary, store.manifest
        lacking = unknown(manifest)
        with self._lock:
            if self._parts.keys() - numbers.keys() or manifest != self._manifest:
                self._forget()  # a shard was taken away, and the histograms count it; or this is another store
                self._manifest = manifest
        for name, shard in numbers.items():
            part = self._parts.get(name) or _Part(np.empty((len(shard), len(NAMES))))
            while part.done < len(shard):
                if self._documents >= MOST_DOCUMENTS or time.monotonic() > deadline:
                    return
                with self.served.reading() as store:
                    token_ids, targets = store.document_of(store.shard(name), part.done)
                self._add(name, part, token_ids, targets, vocabulary, lacking, bool(shard[part.done] >= 0))

    def _add(
        self,
        name: str,
        part: _Part,
        token_ids: npt.NDArray[np.int32],
        targets: SparseTargets,
        vocabulary: Vocabulary,
        lacking: Mapping[str, str],
        counts: bool,
    ) -> None:
        measures = measure(token_ids, targets).without(lacking)
        text = b""
        if keeps_text := self._text_bytes < MOST_TEXT_BYTES:
            text = vocabulary.joined(token_ids.tolist()).decode(errors="replace").casefold().encode()
        with self._lock:
            self._parts[name] = part
            part.values[part.done] = [measures.value(column) for column in NAMES]
            if keeps_text:
                part.texts.append(text)
                self._text_bytes += len(text)
            part.done += 1
            self._documents += 1
            if counts:
                self._collection.add(token_ids, targets)
