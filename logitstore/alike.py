"""Of the documents that begin alike, those that may have most in common with another, however many they are.

Chats with one system prompt all begin alike. Where they are too many to be compared one by one they are put in the
order of their tokens, once, when they are first asked for: one of the two beside another document's place in that order
has most in common with it.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from logitstore.index import BLOCK_TOKENS, MOST_ALIKE, block_ends, common_length, key_hash
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
    ) -> tuple[int, int] | None:
        """The first of those documents that has most tokens in common with this one, and how many these are.

        None where none has the first `end` tokens, which is one of `block_ends`: a hash alone does not decide.

        Args:
            numbers: that may have the first `end` tokens, and none more of `block_ends`.
            read: the tokens of a document by its number; a number stands for one document as long as this lives.
        """
        best, most = None, end - 1
        few = numbers if len(numbers) <= MOST_ALIKE else self._beside(numbers, token_ids, end, read)
        for number in few:
            common = common_length(read(number), token_ids)
            if common > most:
                best, most = number, common
            if most == len(token_ids):
                break
        return None if best is None else (best, most)

    def _beside(
        self,
        numbers: list[int],
        token_ids: npt.NDArray[np.integer],
        end: int,
        read: Callable[[int], npt.NDArray[np.integer]],
    ) -> list[int]:
        """The two between which a document would stand in the order of their tokens from `end` on."""
        stop = next(other for other in block_ends(end + BLOCK_TOKENS) if other > end)

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
