"""`logitstore query`: a store's documents by their measures, over all of their positions. Needs no MLX.

Documents are read one after another, those that are shown twice where they are sorted: what is held then is a measure
and a number for each document that fulfils the conditions, or for the first `limit` of them.
"""

import codecs
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.condition import Condition
from logitstore.contract import Store
from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.measures import NAMES, Measures, measure, require_known, require_name, unknown
from logitstore.vocabulary import Vocabulary

Tokens = npt.NDArray[np.int32]
TEXT = 60
"""Characters of a document that are shown."""
LINE = "{:>8}  {:<12}  {:>9}  {:>7}  {:>7}  {:>7}  {:>12}  {}"
HEADER = LINE.format("document", "key", "positions", "nll", "entropy", "correct", "disagreement", "begins")


@dataclass(frozen=True)
class Found:
    """A document that was asked for."""

    number: int
    """As `logitstore inspect --document` takes it."""
    key: str
    measures: Measures
    begins: str
    """The first characters of its text."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; null where the store does not know a measure."""
        values = {name: self.measures.value(name) for name in NAMES}
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        places = {"document": self.number, "key": self.key, "positions": self.measures.positions}
        return places | known | {"length": self.measures.length, "begins": self.begins}

    def to_text(self) -> str:
        """As one line under `HEADER`."""
        names = ("nll", "entropy", "correct", "disagreement")
        values = ("-" if math.isnan(v) else f"{v:.3f}" for v in map(self.measures.value, names))
        return LINE.format(self.number, self.key[:12], f"{self.measures.positions:,}", *values, repr(self.begins))


def query(
    store: Store,
    where: Sequence[str] = (),
    sort: str | None = None,
    *,
    descending: bool = False,
    limit: int | None = None,
    quiet: bool = False,
) -> Iterator[Found]:
    """The documents that fulfil all conditions, in the store's order or by a measure; of equals the first first.

    Raises:
        ConfigError: a condition or measure that is none, or that the store does not know; a limit below 1.
        CorruptStoreError: the bytes are not those that were written.
    """
    conditions = [Condition.parse(text) for text in where]
    if sort is not None:
        require_name(sort, f"--sort {sort}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1; type --limit 10, or leave it out for all")
    require_known(store.manifest, [c.name for c in conditions] + ([sort] if sort else []), store.path)
    return _found(store, conditions, sort, descending, limit, quiet)


def _found(
    store: Store, conditions: list[Condition], sort: str | None, descending: bool, limit: int | None, quiet: bool
) -> Iterator[Found]:
    lacking, vocabulary = unknown(store.manifest), store.vocabulary
    one = partial(_measured, store, lacking)
    bar = tqdm(range(len(store)), unit="doc", desc="query", delay=1, leave=False, disable=quiet)
    asked = (each for each in map(one, bar) if all(c.holds(each[2]) for c in conditions))
    if sort is None:
        yield from (_shown(vocabulary, *each) for each in islice(asked, limit))
        return
    sign = -1 if descending else 1
    places = ((sign * measures.value(sort), number) for number, _, measures in asked)
    for _, number in sorted(places) if limit is None else heapq.nsmallest(limit, places):
        yield _shown(vocabulary, *one(number))


def found(store: Store, number: int) -> Found:
    """One document by its number.

    Raises:
        IndexError, CorruptStoreError: as for `Store.document`.
    """
    return _shown(store.vocabulary, *_measured(store, unknown(store.manifest), number))


def _measured(store: Store, lacking: Iterable[str], number: int) -> tuple[int, Tokens, Measures]:
    token_ids, targets = store.document(number)
    return number, token_ids, measure(token_ids, targets).without(lacking)


def _shown(vocabulary: Vocabulary, number: int, token_ids: Tokens, measures: Measures) -> Found:
    return Found(number, document_key(token_ids).hex(), measures, beginning(vocabulary, token_ids.tolist()))


def beginning(vocabulary: Vocabulary, token_ids: list[int]) -> str:
    """The first characters, without the rest of one that is cut."""
    first = (vocabulary.tokens[i] for i in token_ids[: 4 * TEXT] if i < len(vocabulary))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(first))[:TEXT]
