"""The recipe: the one way from a teacher's logits to the bytes that are kept, and from the bytes to targets.

A build, a miss answered live and a write-back all go through `Recipe.record`; so given the same logits they are the
same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.codec import decode, encode, record_width
from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.selection import Selected, Selection, randomness, select
from logitstore.targets import SparseTargets


@dataclass(frozen=True, eq=False)
class DocumentRecord:
    """A document's tokens and what is kept of the teacher at each of its positions, encoded."""

    token_ids: npt.NDArray[np.int32]
    """[L]"""
    records: npt.NDArray[np.uint8]
    """[L - 1, record width]; row t is about token t + 1."""

    @property
    def key(self) -> bytes:
        """The document's key: 16 bytes."""
        return document_key(self.token_ids)


@dataclass(frozen=True)
class Recipe:
    """What is kept of a position and how: part of a store's fingerprint."""

    selection: Selection
    temperature: float
    seed: int
    vocab_size: int
    """Width of the teacher's LM head."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature:g} is not a number above 0; type --temperature 1")
        self.selection.require_vocab(self.vocab_size)

    @property
    def record_width(self) -> int:
        """Bytes of one position before compression."""
        return record_width(self.selection.k, self.vocab_size)

    def record(
        self, token_ids: npt.NDArray[np.int32], logits: Any, first: int = 0, *, select: Callable[..., Selected] = select
    ) -> npt.NDArray[np.uint8]:
        """Keep what the recipe says of a document of L tokens at positions first .. first + n - 1.

        Args:
            logits: float32 [n, V], those of these positions; what `select` takes.
            select: `logitstore.selection.select`, or `logitstore.device_selection.select` for logits on a GPU.

        Returns:
            uint8 [n, record width].

        Raises:
            ValueError: logits that are no distribution.
        """
        stop = first + len(logits)
        positions = np.arange(first, stop)
        random = randomness(document_key(token_ids), positions, self.selection, self.vocab_size, seed=self.seed)
        labels = token_ids[first + 1 : stop + 1].astype(np.int64)
        selected = select(logits, labels, self.selection, self.temperature, random)
        return encode(selected, random.rounding, self.vocab_size)

    def read(self, records: npt.NDArray[np.uint8]) -> SparseTargets:
        """Decode a document's records uint8 [P, record width]."""
        return decode(records, self.selection, self.vocab_size)
