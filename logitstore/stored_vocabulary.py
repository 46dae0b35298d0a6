"""A vocabulary's tokens as the two arrays that a store keeps: their lengths, and their bytes one after another."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from logitstore.streams import integers

LEVEL = 19
"""Of zstd: written once, and most of a small store."""
MOST_BYTES = 1 << 28

Bytes = npt.NDArray[np.uint8]


def lengths(tokens: tuple[bytes, ...]) -> npt.NDArray[np.uint32]:
    """Of every token: [V']."""
    return np.array([len(token) for token in tokens], np.uint32)


def text(tokens: tuple[bytes, ...]) -> Bytes:
    """Of all tokens, one after another: [n]."""
    return np.frombuffer(b"".join(tokens), np.uint8)


def read_tokens(size: int, read: Callable[[str, int], Bytes]) -> tuple[bytes, ...]:
    """The tokens of a vocabulary of so many.

    Args:
        read: gives an array, "lengths" or "bytes", of so many bytes.

    Raises:
        ValueError: more bytes than any vocabulary has; and what `read` raises.
    """
    ends = np.cumsum(integers(read("lengths", 4 * size), 4), dtype=np.uint64).tolist() if size else []
    total = ends[-1] if ends else 0
    if total > MOST_BYTES:
        raise ValueError(f"tokens of {total:,} bytes")
    data = read("bytes", total).tobytes() if total else b""
    return tuple(data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
