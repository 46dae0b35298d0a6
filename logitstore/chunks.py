"""An array's file as Zarr lays it out, written and read here: chunks of bytes, each compressed and with its checksum.

Not by zarr, for two things that it does not do: a chunk's streams are compressed one by one, each with statistics of
its own (a zstd frame may hold many blocks, and every reader of zstd reads them), and one chunk is read in microseconds.
zarr-python and tensorstore read the same files; the tests hold them to it.

    packed   a zstd frame; then crc32c of the frame
    sharded  packed chunks; then offset and size of each (u64 each); then crc32c of these
"""

import struct
import threading
from collections.abc import Iterable

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard

from logitstore.files import Files

ZSTD_LEVEL = 15
"""A threshold:12 token takes 19.93 bytes at level 15 (a million a second), 20.20 at 1, 20.17 at 9, 19.95 at 19."""
MOST_BYTES = 1 << 30
CRC = struct.Struct("<I")
_THREAD = threading.local()

Bytes = npt.NDArray[np.uint8]


def pack(streams: Iterable[Bytes], size: int | None = None, level: int = ZSTD_LEVEL) -> bytes:
    """Compress streams of bytes into one chunk, filled up to `size` bytes with zeros."""
    parts = [stream for stream in streams if len(stream)]
    filler = (size or 0) - sum(map(len, parts))
    if filler > 0:
        parts.append(np.zeros(filler, np.uint8))
    packer = zstandard.ZstdCompressor(level=level).compressobj(size=sum(map(len, parts)))
    frame = []
    for part in parts:
        frame += [packer.compress(part.tobytes()), packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return checked(b"".join([*frame, packer.flush()]))


def unpack(packed: bytes, size: int, *, at_most: bool = False) -> Bytes:
    """The bytes of a chunk, which must be `size`, or no more; what it says of itself is checked before memory is taken.

    Raises:
        ValueError: any byte of it is not what was written.
    """
    frame = unchecked(packed)
    if size > MOST_BYTES:
        raise ValueError(f"a chunk of {size:,} bytes, more than any encoder writes")
    try:
        found = zstandard.frame_content_size(frame)
        if not (0 <= found <= size if at_most else found == size):
            raise ValueError(f"a chunk of {found:,} bytes instead of {size:,}")
        return np.frombuffer(_decompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"its compression is broken ({error})") from error


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: to make one takes as long as a small chunk."""
    if not hasattr(_THREAD, "decompressor"):
        _THREAD.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _THREAD.decompressor
    return found


def checked(data: bytes) -> bytes:
    """Bytes with their crc32c after them."""
    return data + CRC.pack(google_crc32c.value(data))


def unchecked(data: bytes) -> bytes:
    """The bytes before their crc32c.

    Raises:
        ValueError: it is not theirs.
    """
    body = data[: -CRC.size]
    if len(data) < CRC.size or CRC.pack(google_crc32c.value(body)) != data[-CRC.size :]:
        raise ValueError("a checksum does not match")
    return body


def sharded(packed: list[bytes]) -> bytes:
    """The file of several packed chunks."""
    sizes = np.array([len(chunk) for chunk in packed], "<u8")
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
    return b"".join([*packed, checked(index.tobytes())])


class ShardedFile:
    """Reads chunks of a sharded file. Every byte that is used has been held against its checksum.

    Raises:
        ValueError: its index is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, files: Files, name: str, chunks: int, chunk_bytes: int) -> None:
        self._files, self._name, self._chunk_bytes = files, name, chunk_bytes
        size = files.size(name)
        index_bytes = 16 * chunks + CRC.size
        index = unchecked(files.read(name, max(size - index_bytes, 0)))
        self._index = np.frombuffer(index[: 16 * (len(index) // 16)], "<u8").reshape(-1, 2)
        begins, sizes = self._index.T
        room = np.uint64(max(size - index_bytes, 0))
        if len(index) != 16 * chunks or (begins > room).any() or (sizes > room - begins).any():
            raise ValueError("its index of chunks is not one of this array")

    def chunk(self, number: int) -> Bytes:
        """One chunk's bytes.

        Raises:
            ValueError: they are not those that were written.
        """
        begin, size = map(int, self._index[number])
        return unpack(self._files.read(self._name, begin, begin + size), self._chunk_bytes)
