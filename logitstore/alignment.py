"""One text in two segmentations: where the tokens of two tokenizers end together.

Everything is counted in bytes of the text, which are computed from token ids, never by decoding and encoding again. A
BOS at the beginning is no text. An EOS at the end counts as one byte, 0xFF, which no text holds: so two documents that
both end there go on together to the end, and one that was cut does not. Special tokens between count as what they are
called. A space that a tokenizer puts before a text is no text where its vocabulary says so; a store does not know that
of its teacher, and there one may be ahead by that space (`Spelled.after_space`).
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from logitstore.sequences import TokenSequence
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
    """
    known = len(vocabulary)  # an id beyond it pads the LM head, and says nothing
    tokens = [vocabulary.tokens[token_id] if token_id < known else b"" for token_id in token_ids.tolist()]
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


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a document of L of one's tokens meets the same in the other's."""

    met: npt.NDArray[np.int32]
    """[L]; for each token of one, the token of the other that ends where it does, -1 where none does."""
    beyond: npt.NDArray[np.bool_]
    """[L]; which tokens end where the other's document does not reach."""
    closing: npt.NDArray[np.bool_] | None = None
    """[L]; which tokens close a turn, after which two templates go on each in its own way. None: none."""

    @property
    def going_on(self) -> npt.NDArray[np.int32]:
        """[L - 1]; `met`, but -1 where what follows is another text."""
        met = self.met if self.closing is None else np.where(self.closing, -1, self.met)
        return met[:-1].astype(np.int32)


def by_text(one: Spelled, other: Spelled) -> Alignment:
    """Align two documents as far as their texts begin alike.

    Where several tokens of a document end at one place, which those of no bytes do, they meet at the last of them: what
    comes after it is the same in both. Nothing meets before the first token of one that is spelled with a space of its
    own.
    """
    beyond = one.ends > common_prefix(one.text, other.text)
    at, met = _meet(one.ends, other.ends)
    met &= ~beyond
    if one.spaced or other.spaced:
        met &= one.ends > 0
    return Alignment(np.where(met, at, -1).astype(np.int32), beyond)


def _meet(
    ends: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For each end [L] the number of the last of the others that is no greater, and whether it is equal; of several
    equal ends only the last one's.
    """
    at = np.searchsorted(others, ends, side="right") - 1
    met = (at >= 0) & (others[np.maximum(at, 0)] == ends)
    met[:-1] &= ends[1:] != ends[:-1]
    return at, met


@dataclass(frozen=True)
class Turn:
    """Tokens of a document that are trained, one after another: a completion, or what an assistant said."""

    first: int
    """Number of the first token."""
    stop: int
    """Of the first after its text."""
    closing: int
    """Of the special token that closes it, -1 where it was cut."""


def turns(sequence: TokenSequence, special_ids: Set[int]) -> list[Turn]:
    """What of a document is trained, in its order."""
    labels = np.flatnonzero(sequence.trained) + 1
    found = []
    for numbers in np.split(labels, np.flatnonzero(np.diff(labels) > 1) + 1):
        special = [n for n in numbers.tolist() if int(sequence.token_ids[n]) in special_ids]
        stop = special[0] if special else int(numbers[-1]) + 1
        found.append(Turn(int(numbers[0]), stop, special[0] if special else -1))
    return found


def by_turns(one: Spelled, its: Sequence[Turn], other: Spelled, others: Sequence[Turn]) -> Alignment | None:
    """Align what is trained of two documents that are otherwise rendered differently; None where it is other text.

    The last turn of one may be cut, and the other may go on. Space at either end of a turn is the template's, and may
    be part of a first or last token: turns are compared without it. They meet from what follows it on, and where they
    do not end in the same space, up to before the end of their text; where several tokens end at one place, as in
    `by_text`, at the last of them.
    """
    if not its or len(its) > len(others):
        return None
    met, closing = np.full(len(one.ends), -1, np.int32), np.zeros(len(one.ends), np.bool_)
    for number, (mine, theirs) in enumerate(zip(its, others, strict=False)):
        start, text, space = _turn_text(one, mine)
        place, their_text, their_space = _turn_text(other, theirs)
        cut = number == len(its) - 1 and mine.closing < 0
        if not (their_text.startswith(text) if cut else text == their_text):
            return None
        own = one.ends[mine.first - 1 : mine.stop] - start + place
        among = other.ends[theirs.first - 1 : theirs.stop]
        at, same = _meet(own, among)
        same &= own >= place
        ends_alike = not space if cut else space == their_space
        if not ends_alike:
            same &= own < place + len(text)
        met[mine.first - 1 : mine.stop] = np.where(same, theirs.first - 1 + at, -1)
        if mine.closing >= 0 and theirs.closing >= 0 and ends_alike:
            met[mine.closing], closing[mine.closing] = theirs.closing, True
    return Alignment(met, np.zeros(len(met), np.bool_), closing)


def _turn_text(spelled: Spelled, turn: Turn) -> tuple[int, bytes, bytes]:
    """Where in a text a turn begins, the space before it apart; the turn; and the space after it."""
    start, stop = int(spelled.ends[turn.first - 1]), int(spelled.ends[turn.stop - 1])
    behind = spelled.text[start:stop].lstrip(WHITESPACE)
    text = behind.rstrip(WHITESPACE)
    return stop - len(behind), text, behind[len(text) :]
