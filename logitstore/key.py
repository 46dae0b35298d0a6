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

    Raises:
        ValueError: they are not.

    Reference: Saarinen and Aumasson, RFC 7693 (2015), digest length 16, no key.
    """
    ids = np.asarray(token_ids)
    if not (ids.ndim == 1 and ids.dtype.kind in "iu" and ids.size) or ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(
            f"token ids are {ids.dtype} of shape {ids.shape}, expected a non-empty row of integers in [0, 2^31)"
        )
    return hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=KEY_BYTES).digest()
