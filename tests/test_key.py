import hashlib

import numpy as np
import pytest

from logitstore.key import document_key


def test_key_is_the_golden_bytes() -> None:
    assert document_key([1, 2, 300, 70_000]).hex() == "32d238a78909d4e1d66b6e12592e14e5"


def test_key_is_blake2b_of_little_endian_words() -> None:
    by_hand = bytes([5, 0, 0, 0, 0x70, 0x11, 0x01, 0])
    assert document_key([5, 70_000]) == hashlib.blake2b(by_hand, digest_size=16).digest()


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u4", "<i8", ">u8", "<u2"])
def test_key_depends_on_neither_dtype_nor_byte_order_nor_strides(dtype: str) -> None:
    ids = np.arange(12).astype(dtype)
    strided = np.stack([ids, ids[::-1]], axis=1)
    expected = document_key(list(range(12)))
    assert document_key(ids) == document_key(strided[:, 0]) == document_key(strided[::-1, 1]) == expected


def test_key_differs_when_a_token_is_changed_moved_added_or_cut() -> None:
    rows = [[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3, 0], [1, 2], [0, 1, 2, 3]]
    assert len({document_key(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("ids", [[], [-1], [2**31], [[1, 2]], [1.0]])
def test_key_refuses_what_is_no_row_of_token_ids(ids: list[int]) -> None:
    with pytest.raises(ValueError):
        document_key(ids)
