"""Two segmentations of one text: where their tokens end together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.alignment import END, by_text, common_prefix, spell
from logitstore.vocabulary import Vocabulary

LETTERS = (b"", b"<s>", b"</s>", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b"\xc3\xa9")
VOCABULARY = Vocabulary(LETTERS, frozenset({1, 2}), 1, 2)
A, B, AB, BA, AAB, C3, A9, E = range(3, 11)
BOS, EOS = 1, 2


def met(one: list[int], other: list[int]) -> list[int]:
    return by_text(*(spell(np.array(ids, np.int32), VOCABULARY) for ids in (one, other))).met.tolist()


def test_a_begin_is_no_text_an_end_is_one_byte_and_both_are_text_elsewhere() -> None:
    spelled = spell(np.array([BOS, A, EOS, BA, EOS]), VOCABULARY)
    assert spelled.text == b"a</s>ba" + END
    assert spelled.ends.tolist() == [0, 1, 5, 7, 8]
    assert spell(np.array([EOS]), VOCABULARY).text == b"</s>"


def test_an_id_that_only_pads_the_lm_head_is_no_text() -> None:
    spelled = spell(np.array([A, len(LETTERS), B]), VOCABULARY)
    assert (spelled.text, spelled.ends.tolist()) == (b"ab", [1, 1, 2])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([A, B, EOS], [AB, EOS], [-1, 0, 1]),
        ([AB, EOS], [A, B, EOS], [1, 2]),
        ([BOS, A, B], [A, B], [-1, 0, 1]),
        ([BOS, A, B], [BOS, AB], [0, -1, 1]),
        ([A, BA, B], [AB, AB], [-1, -1, 1]),
        ([C3, A9], [E], [-1, 0]),
        ([A, B], [A, A, B], [0, -1]),  # another text after the first letter
        ([A, B, EOS], [A, B], [0, 1, -1]),  # the other was cut
        ([A, B], [A, B, A], [0, 1]),
    ],
)
def test_tokens_meet_where_they_end_at_the_same_byte_of_the_same_text(
    one: list[int], other: list[int], expected: list[int]
) -> None:
    assert met(one, other) == expected


@given(st.lists(st.sampled_from([A, B, AB, BA, AAB]), min_size=1), st.randoms(use_true_random=False))
def test_segmentations_of_one_text_meet_exactly_at_their_common_ends(
    one: list[int], random: np.random.Generator
) -> None:
    text = b"".join(LETTERS[i] for i in one)
    other, at = [], 0
    while at < len(text):
        fits = [i for i in (A, B, AB, BA, AAB) if text.startswith(LETTERS[i], at)]
        other.append(random.choice(fits))
        at += len(LETTERS[other[-1]])
    ends = [np.cumsum([len(LETTERS[i]) for i in ids]).tolist() for ids in (one, other)]
    assert met(one, other) == [ends[1].index(end) if end in ends[1] else -1 for end in ends[0]]
    assert met(one, other)[-1] == len(other) - 1


def test_the_common_beginning_of_texts() -> None:
    assert [common_prefix(*pair) for pair in ((b"", b"a"), (b"abc", b"abd"), (b"ab", b"abc"), (b"x", b"y"))] == [
        0,
        2,
        2,
        0,
    ]
