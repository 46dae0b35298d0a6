"""One text in two segmentations: where the tokens of two tokenizers end together.

Everything is counted in bytes of the text, which are computed from token ids, never by decoding and encoding again. A
BOS at the beginning is no text. An EOS at the end counts as one byte, 0xFF, which no text holds: so two documents that
both end there go on together to the end, and one that was cut does not. Special tokens between count as what they are
called. A space that a tokenizer puts before a text is no text where its vocabulary says so; a store does not know that
of its teacher, and there one may be ahead by that space (`Spelled.after_space`).
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from logitstore.vocabulary import Vocabulary

END = b"\xff"
WHITESPACE = b" \t\n\v\f\r"


@dataclass(frozen=True, eq=False)
class Spelled:
    """A document of L tokens as text."""

    text: bytes
    ends: npt.NDArray[np.int64]
    """[L]; bytes of the text up to the end of each token, never falling."""
    spaced: bool = False
    """Whether the space before the first token of text is no part of the text: `spell` took one off that the tokenizer
    puts there, or `after_space` put one on that another tokenizer's token has."""

    def after_space(self) -> "Spelled":
        """The same text behind a space, which some teachers' first tokens have."""
        return replace(self, text=b" " + self.text, ends=np.where(self.ends > 0, self.ends + 1, 0), spaced=True)


def uncommon(one: Vocabulary, other: Vocabulary) -> bytes:
    """The bytes that at least one of two tokenizers passes over: their texts are compared without them."""
    lost = set(one.lost_bytes) | set(other.lost_bytes)
    if one.drops_whitespace or other.drops_whitespace:
        lost |= set(WHITESPACE)
    return bytes(sorted(lost))


def spell(token_ids: npt.NDArray[np.integer], vocabulary: Vocabulary, without: bytes = b"") -> Spelled:
    """The text of a document, and where its tokens end.

    Args:
        without: bytes that are left out of it.

    Raises:
        IndexError: a token beyond the vocabulary.
    """
    tokens = [vocabulary.tokens[token_id] for token_id in token_ids.tolist()]
    if without:
        tokens = [token.translate(None, without) for token in tokens]
    if tokens and token_ids[0] == vocabulary.bos_id:
        tokens[0] = b""
    if len(tokens) > 1 and token_ids[-1] == vocabulary.eos_id:
        tokens[-1] = END
    first = next((number for number, token in enumerate(tokens) if token), None)
    if first is not None and vocabulary.leading_space:
        tokens[first] = tokens[first].removeprefix(b" ")
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    return Spelled(b"".join(tokens), ends, bool(vocabulary.leading_space))


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
    after it is the same in both. Nothing meets beyond the texts' common beginning, nor before the first token of one
    that is spelled with a space of its own.
    """
    limit = common_prefix(one.text, other.text)
    at = np.searchsorted(other.ends, one.ends, side="right") - 1
    met = (at >= 0) & (other.ends[np.maximum(at, 0)] == one.ends) & (one.ends <= limit)
    met[:-1] &= one.ends[1:] != one.ends[:-1]
    if one.spaced or other.spaced:
        met &= one.ends > 0
    return np.where(met, at, -1).astype(np.int32)
