"""What a dataset holds, before the teacher reads any of it: a malformed row at its end is found at its beginning.

A dataset is read twice, here and in the build, so that neither holds it: of each document this keeps its key and
length, 20 bytes.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.contract import Store
from logitstore.documents import Document
from logitstore.key import KEY_BYTES, document_key
from logitstore.plan import Part
from logitstore.sequences import TokenizeReport, require_ids_below, tokenize


@dataclass(frozen=True, eq=False)
class Survey:
    """The different documents of a dataset, in their order."""

    report: TokenizeReport
    keys: npt.NDArray[np.uint8]
    """[D, 16]"""
    positions: npt.NDArray[np.uint32]
    """[D]; positions of each."""

    def to_do(self, part: Part, store: Store | None) -> npt.NDArray[np.int64]:
        """Which of the documents belong to this part and are not in the store."""
        keys = (key.tobytes() for key in self.keys)
        held = store if store is not None and len(store) else ()
        return np.array([i for i, key in enumerate(keys) if part.holds(key) and key not in held], np.int64)


def take_survey(
    rows: Iterable[Document], tokenizer: Any, max_seq_length: int, vocab_size: int, teacher: str, *, quiet: bool = False
) -> Survey:
    """Tokenise a whole dataset, with a progress bar where that takes over a second.

    Raises:
        DatasetError: a malformed row, or not a single usable document.
        ModelError: a token that the teacher does not know.
        ConfigError: as `tokenize`.
    """
    report, keys, positions = TokenizeReport(), bytearray(), array("I")
    bar = tqdm(rows, desc="read", unit="doc", delay=1, leave=False, disable=quiet)
    for sequence in tokenize(bar, tokenizer, max_seq_length, report):
        require_ids_below(vocab_size, [sequence], f"teacher {teacher}")
        keys += document_key(sequence.token_ids)
        positions.append(len(sequence.trained))
    report.require_some(max_seq_length)
    rows_of_keys = np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES)
    _, first = np.unique(rows_of_keys.view(f"V{KEY_BYTES}")[:, 0], return_index=True)
    first.sort()
    return Survey(report, rows_of_keys[first], np.frombuffer(positions, np.uint32)[first])
