import struct

import numpy as np
import pytest

from logitstore.foreign.numbers import floats, rounded, unpack_bytes, unpack_words


def packed(values: list[int], bits: int) -> list[int]:
    """One stream of bits, highest first, as bytes: written with text."""
    stream = "".join(format(value, f"0{bits}b") for value in values)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 16, 17, 18, 19, 31, 32, 57])
def test_ids_of_any_width_are_unpacked_highest_bit_first(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = [[2**bits - 1, 0, *(int(v) for v in rng.integers(2**bits, size=11))] for _ in range(3)]
    data = np.array([packed(row, bits) for row in rows], np.uint8)
    assert unpack_bytes(data, bits, 13).tolist() == rows


@pytest.mark.parametrize("bits", [1, 16, 17, 18, 21, 31])
def test_ids_are_taken_from_words_lowest_bits_first(bits: int) -> None:
    rng = np.random.default_rng(bits)
    ids = [2**bits - 1, *(int(v) for v in rng.integers(2**bits, size=129))]
    per_word = 64 // bits
    words = [sum(v << (bits * i) for i, v in enumerate(ids[at : at + per_word])) for at in range(0, 130, per_word)]
    assert unpack_words(np.array([words], np.uint64), bits, 130).tolist() == [ids]


def test_three_ids_of_18_bits_lie_in_one_word() -> None:
    assert unpack_words(np.array([[(262_143 << 36) | (5 << 18) | 9]], np.uint64), 18, 3).tolist() == [[9, 5, 262_143]]


@pytest.mark.parametrize(("dtype", "code"), [("float16", "e"), ("float32", "f"), ("float64", "d")])
def test_floats_are_little_endian(dtype: str, code: str) -> None:
    data = np.frombuffer(struct.pack(f"<3{code}", -1.5, 0.25, -np.inf), np.uint8)
    assert floats(data[None], dtype).tolist() == [[-1.5, 0.25, -np.inf]]


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    data = np.frombuffer(struct.pack("<f", -2.71875)[2:] + struct.pack("<f", -np.inf)[2:], np.uint8)
    assert floats(data, "bfloat16").tolist() == [-2.71875, -np.inf]


def test_rounding_is_to_nearest_and_ties_to_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -np.inf])
    assert rounded(values, "bfloat16").tolist() == [1, 1 + 2**-6, 1 + 2**-7, -np.inf]
    assert rounded(np.array([0.1]), "float16")[0] == float(np.float16(0.1))
    assert rounded(np.array([0.1]), "float64")[0] == 0.1
