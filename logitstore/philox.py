"""Philox-4x32-10: random numbers that are a function of where they are used, not of when.

Every random choice about a position is drawn from (document key, position, temperature, replica), so that a build that
was killed, a miss that is answered live and another machine all draw the same numbers.
"""

import numpy as np
import numpy.typing as npt

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW_32 = np.uint64(0xFFFFFFFF)


def philox4x32(counters: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Map counters uint32 [..., 4] under a 64-bit key (two 32-bit words) to random words uint32 [..., 4].

    Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
    """
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * np.uint64(MULTIPLIERS[0])
        product1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), product1 & LOW_32
        c2, c3 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), product0 & LOW_32
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def position_words(
    document_key: bytes,
    positions: npt.NDArray[np.int64],
    count: int,
    *,
    seed: int,
    replica: int = 0,
    temperature_index: int = 0,
) -> npt.NDArray[np.uint32]:
    """Draw `count` random words for each position of a document: uint32 [P, count].

    Philox's key is the first 64 bits of the document's, with the seed added; its counter is (word index / 4, position,
    replica, temperature index).
    """
    key = (int.from_bytes(document_key[:8], "little") + seed) & 0xFFFFFFFFFFFFFFFF
    groups = -(-count // 4)
    counters = np.zeros((len(positions), groups, 4), dtype=np.uint32)
    counters[..., 0] = np.arange(groups, dtype=np.uint32)
    counters[..., 1] = positions.astype(np.uint32)[:, None]
    counters[..., 2] = replica
    counters[..., 3] = temperature_index
    words = philox4x32(counters, (key & 0xFFFFFFFF, key >> 32))
    return words.reshape(len(positions), groups * 4)[:, :count]


def uniform(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Turn random words into float64 in [0, 1)."""
    return words * np.float64(2.0**-32)
