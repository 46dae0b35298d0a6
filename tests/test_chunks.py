"""Chunks and files of chunks: bytes by hand, and every byte held against its checksum before it is used."""

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zstandard

from logitstore.chunks import ShardedFile, checked, pack, sharded, unchecked, unpack
from logitstore.files import LocalFiles

Bytes = npt.NDArray[np.uint8]

STREAMS = [np.arange(10, dtype=np.uint8), np.empty(0, np.uint8), np.full(300, 7, np.uint8)]
WHOLE = np.concatenate(STREAMS)


def crc32c(data: bytes) -> bytes:
    """From its definition: reflected polynomial 0x82F63B78, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return (register ^ 0xFFFFFFFF).to_bytes(4, "little")


def frame(data: bytes, content_size: int, size_flag: int = 3) -> bytes:
    """A zstd frame of one raw block that says of itself that it holds `content_size` bytes (RFC 8878, 3.1.1)."""
    header = bytes.fromhex("28b52ffd") + bytes([size_flag << 6 | 0x20])
    block = (len(data) << 3 | 1).to_bytes(3, "little")
    return header + content_size.to_bytes(1 << size_flag, "little") + block + data


def test_a_checksum_is_crc32c() -> None:
    assert checked(b"123456789").hex(" ") == "31 32 33 34 35 36 37 38 39 83 92 06 e3"  # its known check value
    assert checked(WHOLE.tobytes())[-4:] == crc32c(WHOLE.tobytes())
    assert unchecked(checked(b"")) == b""


def test_a_chunk_is_one_frame_of_its_streams_and_their_checksum() -> None:
    packed = pack(STREAMS)
    body = packed[:-4]
    assert packed[-4:] == crc32c(body) and body[:4].hex() == "28b52ffd"
    assert zstandard.ZstdDecompressor().decompress(body) == WHOLE.tobytes()
    assert zstandard.frame_content_size(body) == 310
    np.testing.assert_array_equal(unpack(packed, 310), WHOLE)


def test_every_stream_is_a_block_of_its_own() -> None:
    parts = np.arange(10, dtype=np.uint8), np.arange(10, 20, dtype=np.uint8)
    raw_blocks, last_empty = (
        " ".join(f"500000 {part.tobytes().hex()}" for part in parts),
        "010000",
    )  # 10 << 3; 0 << 3 | 1
    assert pack(parts)[5:-4].hex() == (f"14 {raw_blocks} {last_empty}").replace(" ", "")


@pytest.mark.parametrize("size", [310, 311, 5_000])
def test_a_chunk_is_filled_up_with_zeros(size: int) -> None:
    found = unpack(pack(STREAMS, size), size)
    np.testing.assert_array_equal(found, np.concatenate([WHOLE, np.zeros(size - 310, np.uint8)]))
    assert unpack(pack([], size), size).tolist() == [0] * size


def test_a_chunk_of_nothing_is_a_chunk() -> None:
    assert len(unpack(pack([]), 0)) == 0


def test_a_chunk_may_be_smaller_only_where_that_is_allowed() -> None:
    packed = pack(STREAMS)
    for size in (310, 311, 1_000):
        np.testing.assert_array_equal(unpack(packed, size, at_most=True), WHOLE)
    for size, at_most in ((309, True), (309, False), (311, False)):
        with pytest.raises(ValueError, match=f"310 bytes instead of {size}"):
            unpack(packed, size, at_most=at_most)


def test_any_changed_or_missing_byte_of_a_chunk_is_noticed() -> None:
    packed = pack(STREAMS)
    for at in range(len(packed)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(packed)
            damaged[at] ^= flip
            with pytest.raises(ValueError, match="checksum"):
                unpack(bytes(damaged), 310)
        with pytest.raises(ValueError, match="checksum"):
            unpack(packed[:at], 310)
    with pytest.raises(ValueError, match="checksum"):
        unpack(packed + b"\0", 310)


@pytest.mark.parametrize("content_size", [1, 9, 11, 2**20, 2**40, 2**63 - 1])
@pytest.mark.parametrize("at_most", [False, True])
def test_a_frame_that_lies_about_its_size_is_refused_before_memory_is_taken(content_size: int, at_most: bool) -> None:
    lying = checked(frame(b"0123456789", content_size))
    assert unpack(checked(frame(b"0123456789", 10)), 10, at_most=at_most).tobytes() == b"0123456789"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"instead of 10|compression is broken"):
            unpack(lying, 10, at_most=at_most)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content_size", [9, 11, 20])
def test_a_frame_that_lies_about_its_size_as_its_reader_expects_is_refused(content_size: int) -> None:
    with pytest.raises(ValueError, match="compression is broken"):
        unpack(checked(frame(b"0123456789", content_size)), content_size)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not zstd at all",
        frame(b"0123456789", 10)[:-1],
        frame(b"0123456789", 10)[:9],
        zstandard.ZstdCompressor(write_content_size=False).compress(b"0123456789"),
        bytes.fromhex("502a4d18 0a000000") + b"0123456789",  # a frame to skip
    ],
)
def test_what_is_no_frame_of_known_size_is_refused_though_its_checksum_is_right(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"instead of 10|compression is broken"):
        unpack(checked(body), 10)


CHUNKS = [np.full(50, 1, np.uint8), np.arange(50, dtype=np.uint8), np.full(50, 3, np.uint8)]


def opened(folder: Path, data: bytes, chunks: int = 3) -> ShardedFile:
    (folder / "c").write_bytes(data)
    return ShardedFile(LocalFiles(folder), "c", chunks, 50)


def index(*rows: int) -> bytes:
    return checked(np.array(rows, "<u8").tobytes())


def test_a_file_of_chunks_is_the_chunks_then_offset_and_size_of_each(tmp_path: Path) -> None:
    packed = [pack([chunk]) for chunk in CHUNKS]
    a, b, c = map(len, packed)
    data = sharded(packed)
    assert data == b"".join(packed) + index(0, a, a, b, a + b, c)
    file = opened(tmp_path, data)
    for i in (2, 0, 1):
        np.testing.assert_array_equal(file.chunk(i), CHUNKS[i])


def test_any_changed_or_missing_byte_of_a_file_is_noticed_where_it_is_used(tmp_path: Path) -> None:
    data = sharded([pack([chunk]) for chunk in CHUNKS])
    damaged = [data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :] for at in range(len(data))]
    damaged += [data[:at] for at in range(len(data))] + [data[at:] for at in range(1, len(data))] + [data + b"\0"]
    for wrong in damaged:
        with pytest.raises(ValueError, match=r"checksum|index of chunks"):
            file = opened(tmp_path, wrong)
            for i in range(3):
                np.testing.assert_array_equal(file.chunk(i), CHUNKS[i])


def test_a_damaged_chunk_leaves_the_others_readable(tmp_path: Path) -> None:
    packed = [pack([chunk]) for chunk in CHUNKS]
    packed[1] = bytes(len(packed[1]))
    file = opened(tmp_path, sharded(packed))
    with pytest.raises(ValueError, match="checksum"):
        file.chunk(1)
    np.testing.assert_array_equal(file.chunk(2), CHUNKS[2])


@pytest.mark.parametrize(
    "row", [(0, 2**64 - 1), (2**64 - 1, 2), (2**63, 2**63), (0, 21), (20, 1), (2**64 - 1, 2**64 - 1)]
)
def test_an_index_that_points_beyond_its_chunks_is_refused_though_its_checksum_is_right(
    tmp_path: Path, row: tuple[int, int]
) -> None:
    opened(tmp_path, bytes(20) + index(0, 20, 20, 0), 2)
    with pytest.raises(ValueError, match="index of chunks"):
        opened(tmp_path, bytes(20) + index(0, 20, *row), 2)


def test_a_file_of_another_number_of_chunks_is_refused(tmp_path: Path) -> None:
    data = sharded([pack([chunk]) for chunk in CHUNKS])
    for chunks in (0, 1, 2, 4, 10_000):
        with pytest.raises(ValueError, match=r"checksum|index of chunks"):
            opened(tmp_path, data, chunks)
    with pytest.raises(ValueError, match="index of chunks"):
        opened(tmp_path, index(0, 0), 2)  # an index of one alone


def test_one_chunk_is_not_taken_for_another_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="51 bytes instead of 50"):
        opened(tmp_path, sharded([pack([np.zeros(51, np.uint8)])]), 1).chunk(0)
