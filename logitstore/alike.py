"""Of the documents that begin alike, those that may have most in common with another, however many they are.

Chats with one system prompt all begin alike. Where they are too many to be compared one by one they are put in the
order of their tokens, once, when they are first asked for: one of the two beside another document's place in that order
has most in common with it.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from logitstore.index import BLOCK_TOKENS, FIRST_BLOCKS, MOST_ALIKE, key_hash
from logitstore.key import document_key

MOST_ORDERED = 1 << 16
"""So many that begin alike are put in order, the first ones."""


class Alike:
    """Orders of documents by their tokens, one for each beginning that many share. Safe for several threads."""

    def __init__(self) -> None:
        self._orders: dict[int, tuple[list[int], list[int]]] = {}

    def nearest(
        self,
        numbers: list[int],
        token_ids: npt.NDArray[np.integer],
        end: int,
        read: Callable[[int], npt.NDArray[np.integer]],
    ) -> list[int]:
        """Those of `numbers` to compare a document with that has their first `end` tokens, and no more of a block.

        Args:
            read: the tokens of a document by its number; a number stands for one document as long as this lives.
        """
        if len(numbers) <= MOST_ALIKE:
            return numbers
        stop = next((other for other in FIRST_BLOCKS if other > end), end // BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS)

        def rest(ids: npt.NDArray[np.integer]) -> bytes:
            return ids[end:stop].astype(">u4").tobytes()

        def key(number: int) -> bytes:
            return rest(read(number))

        beginning = key_hash(document_key(token_ids[:end]))
        known, order = self._orders.get(beginning, ([], []))
        if not known or numbers[: len(known)] != known:
            order = sorted(numbers, key=key)
        elif len(numbers) > len(known):
            order = order.copy()
            for number in numbers[len(known) :]:
                insort(order, number, key=key)
        self._orders[beginning] = numbers, order
        at = bisect_left(order, rest(token_ids), key=key)
        return sorted(order[max(at - 1, 0) : at + 1])
