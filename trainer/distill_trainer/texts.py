"""Finds what a teacher with another tokenizer reads in place of a student's document, and aligns the two.

By their text, among the documents of its stores, whoever made their tokens (`Texts`); or by reading the dataset again
with the teacher's own tokenizer, where that is at hand (`Readings`).
"""

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import count, takewhile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distill_trainer.two_prompts import UNCUT
from logitstore.alignment import Alignment, Spelled, by_text, by_turns, common_prefix, spell, turns
from logitstore.contract import Store
from logitstore.documents import Document
from logitstore.index import FIRST_BLOCKS
from logitstore.sequences import TokenSequence, tokenize
from logitstore.vocabulary import vocabulary_of

FIRST = 16
"""Bytes of the shortest beginning that is looked up; each further one is `STEP` times as long."""
STEP = 4
MOST_ALIKE = 64
"""Of documents that begin alike, so many are compared with the text that is looked up; more are put in order."""


Found = tuple[npt.NDArray[np.int32], Alignment]
"""The teacher's tokens, and the student's document aligned with them."""


class Known(Protocol):
    """Who finds what the teacher reads."""

    def find(self, sequence: TokenSequence, own: Spelled) -> Found | None:
        """What the teacher reads in place of a student's document; None where that is not known, or other text.

        Args:
            own: how the student's tokens spell it.
        """
        ...


class Texts:
    """The documents of some stores with one tokenizer, by text: hashes of how each begins are kept."""

    def __init__(self, stores: Sequence[Store], without: bytes, quiet: bool) -> None:
        """Read every document's tokens.

        Args:
            without: bytes that are left out of all texts.

        Raises:
            CorruptStoreError: a store's bytes are not those that were written.
        """
        self._stores, self._without = stores, without
        self._places: defaultdict[bytes, list[tuple[int, int]]] = defaultdict(list)
        self._sorted: set[bytes] = set()
        total = sum(map(len, stores))
        bar = tqdm(total=total, desc="read the store's texts", unit="doc", delay=1, leave=False, disable=quiet)
        with bar:
            for which, store in enumerate(stores):
                for number in range(len(store)):
                    text = self._read(which, number)[1].text
                    for beginning, _ in _beginnings(text):
                        self._places[beginning].append((which, number))
                    bar.update()

    def find(self, sequence: TokenSequence, own: Spelled) -> Found | None:
        """See `Known`: the document with the longest beginning of the student's.

        Raises:
            CorruptStoreError: a store's bytes are not those that were written.
        """
        del sequence  # its text is all that a store knows of it
        for spelled in (own, own.after_space()):
            for beginning, length in reversed(list(_beginnings(spelled.text))):
                if beginning in self._places:
                    text = spelled.text
                    found = (self._read(*place) for place in self._alike(beginning, length, text))
                    token_ids, other = max(found, key=lambda document: common_prefix(document[1].text, text))
                    return token_ids, by_text(spelled, other)
        return None

    def _alike(self, beginning: bytes, length: int, text: bytes) -> list[tuple[int, int]]:
        """The documents with a beginning; where they are many, those beside the place of a text in their order, one of
        which has the longest beginning of it.
        """
        places, most = self._places[beginning], STEP * length  # no document has more of it: the next step found none

        def key(place: tuple[int, int]) -> bytes:
            return self._read(*place)[1].text[:most]

        if len(places) <= MOST_ALIKE:
            return places
        if beginning not in self._sorted:
            places.sort(key=key)
            self._sorted.add(beginning)
        at = bisect_left(places, text[:most], key=key)
        return places[max(at - 1, 0) : at + 1]

    def _read(self, which: int, number: int) -> tuple[npt.NDArray[np.int32], Spelled]:
        store = self._stores[which]
        token_ids = store.token_ids(number)
        return token_ids, spell(token_ids, store.vocabulary, self._without)


class Readings:
    """A dataset as the teacher's tokenizer reads it.

    Args:
        rows: of the dataset that the student reads.
        special_ids: of the student's tokens.
        without: bytes that are left out of all texts.
        mask_prompt: as the student reads it; else both are trained on all of a document, which has no turns apart.

    Raises:
        DatasetError, ModelError: as `tokenize`.
    """

    def __init__(
        self,
        rows: Iterable[Document],
        tokenizer: Any,
        special_ids: Set[int],
        without: bytes,
        quiet: bool,
        *,
        mask_prompt: bool = True,
    ) -> None:
        self._vocabulary, self._special_ids, self._without = vocabulary_of(tokenizer), special_ids, without
        bar = tqdm(rows, desc="read as the teacher does", unit="doc", delay=1, leave=False, disable=quiet)
        sequences = tokenize(bar, tokenizer, UNCUT, mask_prompt=mask_prompt)
        self._sequences = {sequence.where: sequence for sequence in sequences}

    def find(self, sequence: TokenSequence, own: Spelled) -> Found | None:
        """See `Known`. By all of the text where it is the same; else turn by turn, where templates differ."""
        read = self._sequences.get(sequence.where)
        if read is None:
            return None
        other = spell(read.token_ids, self._vocabulary, self._without)
        found: Alignment | None = by_text(own, other)
        if common_prefix(own.text, other.text) < min(len(own.text), len(other.text)):
            its, others = turns(sequence, self._special_ids), turns(read, self._vocabulary.special_ids)
            found = by_turns(own, its, other, others)
        if found is None:
            return None
        needed = int(found.met.max(initial=0)) + 2  # what comes after is another text, or was cut for the student
        return read.token_ids[: max(needed, FIRST_BLOCKS[0])], found  # a store finds no shorter beginning


def _beginnings(text: bytes) -> Iterator[tuple[bytes, int]]:
    """Hashes of a text's first 16, 64, 256, ... bytes, and of all of it; and how many these are."""
    ends = takewhile(lambda end: end < len(text), (FIRST * STEP**power for power in count()))
    for end in (*ends, len(text)):
        yield hashlib.blake2b(text[:end], digest_size=8).digest(), end
