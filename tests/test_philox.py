import numpy as np
import pytest

from logitstore.philox import philox4x32, position_words, uniform

KEY = bytes(range(16))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_words_are_random123s_known_answers(counter: str, key: str, words: str) -> None:
    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    k0, k1 = parse(key)
    assert philox4x32(np.array(parse(counter), np.uint32), (k0, k1)).tolist() == parse(words)


def test_a_position_draws_the_same_words_alone_and_among_others_few_and_many() -> None:
    together = position_words(KEY, np.arange(5), 11, seed=3)
    alone = position_words(KEY, np.array([4]), 7, seed=3)
    assert (together[4, :7] == alone[0]).all()


def test_word_w_of_a_position_is_word_w_mod_4_of_the_counter_that_the_specification_says() -> None:
    words = position_words(KEY, np.array([7, 9]), 6, seed=2, replica=5, temperature_index=3)
    key = (0x03020100 + 2, 0x07060504)  # the key's first 8 bytes, little-endian, and the seed
    counters = [[[0, t, 5, 3], [1, t, 5, 3]] for t in (7, 9)]  # word index / 4, position, replica, temperature index
    expected = philox4x32(np.array(counters, np.uint32), key)
    assert words.shape == (2, 6) and (words == expected.reshape(2, 8)[:, :6]).all()


def test_keys_positions_seeds_replicas_and_temperatures_draw_different_words() -> None:
    draws = [
        position_words(KEY, np.array([0, 1]), 4, seed=0),
        position_words(KEY[::-1], np.array([0, 1]), 4, seed=0),
        position_words(KEY, np.array([0, 1]), 4, seed=1),
        position_words(KEY, np.array([0, 1]), 4, seed=-1),
        position_words(KEY, np.array([0, 1]), 4, seed=0, replica=1),
        position_words(KEY, np.array([0, 1]), 4, seed=0, temperature_index=1),
        position_words(KEY, np.array([0, 1]), 4, seed=0, replica=1, temperature_index=1),
    ]
    rows = {row.tobytes() for words in draws for row in words}
    assert len(rows) == 2 * len(draws)


def test_a_position_beyond_31_bits_and_a_seed_beyond_64_are_taken() -> None:
    words = position_words(b"\xff" * 16, np.array([2**31, 2**32 - 1]), 4, seed=2**64 + 1)
    assert (words == position_words(b"\xff" * 16, np.array([2**31, 2**32 - 1]), 4, seed=1)).all()


def test_uniform_numbers_are_below_one() -> None:
    assert uniform(np.array([0, 2**31, 2**32 - 1], np.uint32)).tolist() == [0.0, 0.5, 1 - 2.0**-32]
