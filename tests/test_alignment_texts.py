"""Spans between two tokenizers' tokens cover a text whole: for every kind, over ten thousand random texts."""

import numpy as np
import pytest

from logitstore.alignment import END, Spelled, by_text, spell, uncommon
from logitstore.vocabulary import Vocabulary, vocabulary_of
from tests import tokenizers
from tests.test_vocabulary_texts import EXACT, TEXTS, UNLESS_THERE

STARTING = [text for text in TEXTS if not text.startswith(" ")]
"""Of a space at the beginning some kinds cannot tell whose it is."""


def spelled(tokenizer: object, vocabulary: Vocabulary, without: bytes) -> list[Spelled]:
    """Each text between BOS and EOS, in the tokenizer's tokens."""
    bos, eos = (np.array([i], np.int32) for i in (vocabulary.bos_id, vocabulary.eos_id))
    every = tokenizer.backend_tokenizer.encode_batch(STARTING, add_special_tokens=False)  # type: ignore[attr-defined]
    return [spell(np.concatenate([bos, np.array(e.ids, np.int32), eos]), vocabulary, without) for e in every]


@pytest.mark.parametrize("kind", [*EXACT, *UNLESS_THERE])
def test_spans_cover_the_text_whole_and_both_sides_end_together(kind: str) -> None:
    """Beside a byte BPE that knows every byte and puts no space before a text."""
    pair = (EXACT | UNLESS_THERE)[kind](), tokenizers.byte_bpe(300)
    one, other = map(vocabulary_of, pair)
    without = uncommon(one, other)
    sides = [spelled(tokenizer, v, without) for tokenizer, v in zip(pair, (one, other), strict=True)]
    for text, a, b in zip(STARTING, *sides, strict=True):
        assert a.text == b.text == text.encode().translate(None, without) + END
        for from_, to in ((a, b), (b, a)):
            met = by_text(from_, to).met
            at = np.flatnonzero(met >= 0)
            assert (from_.ends[at] == to.ends[met[at]]).all()
            assert (np.diff(met[at]) > 0).all()
            assert (at[-1], met[at[-1]]) == (len(from_.ends) - 1, len(to.ends) - 1)


def test_a_store_whose_tokens_begin_with_a_space_is_a_space_ahead() -> None:
    """What a store's vocabulary does not say of its teacher: the text behind a space is the teacher's."""
    tokenizer = tokenizers.sentencepiece_bpe("Prepend")
    known = vocabulary_of(tokenizer)
    of_store = Vocabulary(known.tokens, known.special_ids, known.bos_id, known.eos_id)
    own = vocabulary_of(tokenizers.byte_bpe(300))
    theirs, ours = (
        spell(np.array(t.encode("The store holds", add_special_tokens=False), np.int32), v)
        for t, v in ((tokenizer, of_store), (tokenizers.byte_bpe(300), own))
    )
    assert theirs.text == b" " + ours.text
    met = by_text(ours.after_space(), theirs).met
    assert met[-1] == len(theirs.ends) - 1
    assert (by_text(ours, theirs).met == -1).all()
