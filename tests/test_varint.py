from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore import varint
from logitstore.varint import Varints

GOLDEN = [  # value, first byte, second, third, fourth and fifth
    (0, "00", "", "", ""),
    (127, "7f", "", "", ""),
    (128, "80", "00", "", ""),
    (383, "80", "ff", "", ""),
    (384, "81", "00", "", ""),
    (30_847, "f7", "ff", "", ""),
    (30_848, "f8", "00", "00", ""),
    (30_848 + 0xFFFF, "f8", "ff", "ff", ""),
    (30_848 + 0x10000, "f9", "00", "00", ""),
    (489_599, "fe", "ff", "ff", ""),
    (489_600, "ff", "00", "00", "00 00"),
    (489_600 + 0x12345678, "ff", "78", "56", "34 12"),
    (2**31 - 1, "ff", "7f", "87", "f8 7f"),  # 0x7fffffff - 489,600 = 0x7ff8877f
    (2**32 - 1, "ff", "7f", "87", "f8 ff"),
]
VALUES = np.array([value for value, *_ in GOLDEN], np.uint32)

near_a_boundary = st.sampled_from(VALUES.tolist())
integers = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 600_000) | st.integers(0, 200) | near_a_boundary)


def of(values: list[int]) -> Varints:
    return Varints.of(np.array(values, np.uint32))


def spelled(planes: tuple[npt.NDArray[np.uint8], ...]) -> list[str]:
    return [plane.tobytes().hex(" ") for plane in planes]


@pytest.mark.parametrize(("value", "first", "second", "third", "upper"), GOLDEN)
def test_an_integer_is_its_golden_bytes(value: int, first: str, second: str, third: str, upper: str) -> None:
    assert spelled(of([value]).planes) == [first, second, third, upper]
    assert sum(map(len, of([value]).planes)) == varint.most_bytes(value + 1)


def test_integers_lie_in_planes_all_first_bytes_then_all_second_ones() -> None:
    planes = of([5, 30_848 + 0x0201, 128 + 0x103, 489_600 + 0x04030201, 127, 489_600 + 0x0D0C0B0A]).planes
    assert spelled(planes) == ["05 f8 81 ff 7f ff", "01 03 01 0a", "02 02 0b", "03 04 0c 0d"]


def test_golden_bytes_read_as_the_integers_that_they_stand_for() -> None:
    planes = ["".join(column) for column in list(zip(*GOLDEN, strict=True))[1:]]
    read = Varints(*(np.frombuffer(bytes.fromhex(plane), np.uint8) for plane in planes)).values()
    assert read.dtype == np.uint32 and read.tolist() == VALUES.tolist()


@given(integers)
def test_integers_come_back(values: list[int]) -> None:
    assert of(values).values().tolist() == values


@given(integers, st.data())
def test_a_slice_is_what_the_slice_alone_would_be(values: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    assert spelled(of(values).slice(slice(start, stop)).planes) == spelled(of(values[start:stop]).planes)


@given(st.lists(integers, min_size=1, max_size=4))
def test_one_after_another_is_as_if_encoded_at_once(parts: list[list[int]]) -> None:
    joined = varint.concatenate([of(part) for part in parts])
    assert spelled(joined.planes) == spelled(of([*chain(*parts)]).planes)


@pytest.mark.parametrize(
    ("limit", "most"), [(1, 1), (128, 1), (129, 2), (30_848, 2), (30_849, 3), (489_600, 3), (489_601, 5), (2**31, 5)]
)
def test_no_integer_below_a_limit_takes_more_than_it_says(limit: int, most: int) -> None:
    assert varint.most_bytes(limit) == most == sum(map(len, of([limit - 1]).planes))
