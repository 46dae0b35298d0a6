"""Finds a store's documents by their text, whatever tokens spell it: for students of another tokenizer.

Reads the tokens of every document of the store once, and keeps hashes of how their texts begin.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.alignment import Spelled, common_prefix, spell
from logitstore.contract import Store

FIRST = 16
"""Bytes of the shortest beginning that is looked up; each further one is four times as long."""
MOST_ALIKE = 64
"""Of documents that begin alike, so many are compared with the text that is looked up."""


class Texts:
    """The documents of some stores with one tokenizer, by text."""

    def __init__(self, stores: Sequence[Store], without: bytes, quiet: bool) -> None:
        """Read every document's tokens.

        Args:
            without: bytes that are left out of all texts.

        Raises:
            CorruptStoreError: a store's bytes are not those that were written.
        """
        self._stores, self._without = stores, without
        self._places: defaultdict[bytes, list[tuple[int, int]]] = defaultdict(list)
        total = sum(map(len, stores))
        bar = tqdm(total=total, desc="read the store's texts", unit="doc", delay=1, leave=False, disable=quiet)
        with bar:
            for which, store in enumerate(stores):
                for number in range(len(store)):
                    text = self._read(which, number)[1].text
                    for beginning in _beginnings(text):
                        self._places[beginning].append((which, number))
                    bar.update()

    def find(self, own: Spelled) -> tuple[npt.NDArray[np.int32], Spelled, Spelled] | None:
        """The document with the longest beginning of a text: the store's tokens, how they spell it, and how the
        student's do beside them; None where none begins like it.

        Raises:
            CorruptStoreError: a store's bytes are not those that were written.
        """
        for spelled in (own, own.after_space()):
            for beginning in reversed(list(_beginnings(spelled.text))):
                places = self._places.get(beginning, [])[:MOST_ALIKE]
                if places:
                    text = spelled.text
                    found = (self._read(*place) for place in places)
                    return *max(found, key=lambda document: common_prefix(document[1].text, text)), spelled
        return None

    def _read(self, which: int, number: int) -> tuple[npt.NDArray[np.int32], Spelled]:
        store = self._stores[which]
        token_ids = store.token_ids(number)
        return token_ids, spell(token_ids, store.vocabulary, self._without)


def _beginnings(text: bytes) -> Iterator[bytes]:
    """Hashes of a text's first 16, 64, 256, ... bytes, and of all of it."""
    for power in count():
        end = FIRST * 4**power
        if end >= len(text):
            break
        yield hashlib.blake2b(text[:end], digest_size=8).digest()
    yield hashlib.blake2b(text, digest_size=8).digest()
