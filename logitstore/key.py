"""The name under which a document's targets are stored: a hash of its token ids.

Stands between the sequences and the store. A document is found by what it says, so that shuffles, edits of other
rows, batch sizes and epochs do not matter. Never a row number, and never Python's salted `hash`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16


def document_key(token_ids: npt.NDArray[np.integer] | Sequence[int]) -> bytes:
    """The 16 bytes of BLAKE2b(token_ids as consecutive little-endian 32-bit integers).

    `token_ids` is [L], of any integer dtype, byte order and strides, each in [0, 2^31).

    Reference: Saarinen and Aumasson, RFC 7693 (2015), digest length 16, no key.
    """
    ids = np.asarray(token_ids)
    assert ids.ndim == 1 and ids.dtype.kind in "iu" and ids.size, "token ids are a non-empty row of integers"
    assert ids.min() >= 0 and ids.max() < 2**31, "a token id fits 31 bits"
    return hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=KEY_BYTES).digest()
