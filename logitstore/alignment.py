"""One text in two segmentations: where the tokens of two tokenizers end together.

Everything is counted in bytes of the text, which are computed from token ids, never by decoding and encoding again. A
BOS at the beginning is no text. An EOS at the end counts as one byte, 0xFF, which no text holds: so two documents that
both end there go on together to the end, and one that was cut does not.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitstore.vocabulary import Vocabulary

END = b"\xff"


@dataclass(frozen=True, eq=False)
class Spelled:
    """A document of L tokens as text."""

    text: bytes
    ends: npt.NDArray[np.int64]
    """[L]; bytes of the text up to the end of each token, never falling."""


def spell(token_ids: npt.NDArray[np.integer], vocabulary: Vocabulary) -> Spelled:
    """The text of a document, and where its tokens end.

    Raises:
        IndexError: a token beyond the vocabulary.
    """
    tokens = [vocabulary.tokens[token_id] for token_id in token_ids.tolist()]
    if tokens and token_ids[0] == vocabulary.bos_id:
        tokens[0] = b""
    if len(tokens) > 1 and token_ids[-1] == vocabulary.eos_id:
        tokens[-1] = END
    return Spelled(b"".join(tokens), np.cumsum([len(token) for token in tokens], dtype=np.int64))


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading bytes two texts have in common."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    differs = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    return int(differs.argmax())


def meetings(one: Spelled, other: Spelled) -> npt.NDArray[np.int32]:
    """For each token of one, the token of the other that ends where it does, -1 where none does: [L].

    Where several tokens of a document end at one place, which those of no bytes do, it is the last of them: what comes
    after it is the same in both. Nothing meets beyond the texts' common beginning.
    """
    limit = common_prefix(one.text, other.text)
    at = np.searchsorted(other.ends, one.ends, side="right") - 1
    met = (at >= 0) & (other.ends[np.maximum(at, 0)] == one.ends) & (one.ends <= limit)
    met[:-1] &= one.ends[1:] != one.ends[:-1]
    return np.where(met, at, -1).astype(np.int32)
