"""Bits and bytes of other tools' caches to NumPy numbers: short floats, ids packed into bytes and into words.

Knows layouts, not formats. Lengths are the caller's to check.
"""

import numpy as np
import numpy.typing as npt

FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_PACKED_BITS = 57  # what eight bytes hold of a value that starts at any bit of the first


def floats(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    """Little-endian floats of a type in `FLOAT_BYTES`: float64 [..., n] from uint8 [..., n · size]."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        bits = data.view("<u2").astype(np.uint32) << np.uint32(16)
        values = bits.view(np.float32)
    else:
        values = data.view(f"<f{FLOAT_BYTES[dtype]}")
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return values.astype(np.float64)


def rounded(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """The nearest numbers of a type in `FLOAT_BYTES`, ties to even, as float64."""
    if dtype == "float64":
        return values
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return values.astype(np.float16 if dtype == "float16" else np.float32).astype(np.float64)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = (bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), nearest.view(np.float32).astype(np.float64), values)


def unpack_bytes(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint64]:
    """`count` numbers of `bits` bits from a stream whose first bit is each byte's highest.

    Args:
        data: uint8 [N, at least ceil(count · bits / 8)].
        bits: 1 to `MAX_PACKED_BITS`.

    Returns:
        uint64 [N, count].
    """
    start = np.arange(count) * bits
    padded = np.concatenate([data, np.zeros((len(data), 8), np.uint8)], axis=1)
    word = np.zeros((len(data), count), np.uint64)
    for byte in range(8):
        word = (word << np.uint64(8)) | padded[:, start // 8 + byte]
    shift = (64 - bits - start % 8).astype(np.uint64)
    return (word >> shift) & np.uint64((1 << bits) - 1)


def unpack_words(words: npt.NDArray[np.uint64], bits: int, count: int) -> npt.NDArray[np.uint64]:
    """`count` numbers of `bits` bits, 64 // bits of them in each word, the first in its lowest bits.

    Args:
        words: uint64 [N, at least ceil(count / (64 // bits))].

    Returns:
        uint64 [N, count].
    """
    in_word = 64 // bits
    index = np.arange(count)
    shift = (index % in_word * bits).astype(np.uint64)
    return (words[:, index // in_word] >> shift) & np.uint64((1 << bits) - 1)
