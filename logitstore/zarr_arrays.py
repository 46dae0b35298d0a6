"""Arrays of a store as Zarr v3 describes them: the only file that speaks to zarr.

zarr writes each array's `zarr.json`, and nothing else: what lies beside it is packed by `chunks`, and read there,
without zarr. Every array is one file, of one chunk or of many.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.metadata.v3 import ArrayV3Metadata

from logitstore.chunks import ZSTD_LEVEL, checked, pack, sharded
from logitstore.errors import first_line
from logitstore.streams import planes

MOST_METADATA_BYTES = 1 << 16


def chunk_file(dimensions: int) -> str:
    """The name of an array's only file."""
    return "/".join(["c", *["0"] * dimensions])


def write_chunks(
    group: Path,
    name: str,
    chunks: Iterable[Iterable[npt.NDArray[np.uint8]]],
    chunk_bytes: int,
    *,
    level: int = ZSTD_LEVEL,
) -> None:
    """Write a two-dimensional array of bytes whose rows are chunks, each given as its streams."""
    packed = [pack(streams, chunk_bytes, level) for streams in chunks]
    _describe(group, name, (len(packed), chunk_bytes), "uint8", zstd=True, chunk=(1, chunk_bytes))
    _write(group / name, 2, sharded(packed))


def write_array(group: Path, name: str, data: npt.NDArray[Any], *, level: int = ZSTD_LEVEL) -> None:
    """Write an array of integers as one compressed chunk."""
    _describe(group, name, data.shape, str(data.dtype), zstd=True)
    if data.size:
        raw = np.ascontiguousarray(data, data.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        _write(group / name, data.ndim, pack([raw], level=level))


def write_planes(group: Path, name: str, data: npt.NDArray[np.integer], *, level: int = ZSTD_LEVEL) -> None:
    """Write integers below 2^32 [n] as bytes [4, n], lowest first: each plane has statistics of its own."""
    _describe(group, name, (4, len(data)), "uint8", zstd=True)
    if data.size:
        _write(group / name, 2, pack(planes(data, 4).reshape(4, -1), level=level))


def write_column(group: Path, name: str, data: npt.NDArray[Any]) -> None:
    """Write a column of integers as it is, with its checksum after it: a file that can be mapped into memory."""
    _describe(group, name, data.shape, str(data.dtype), zstd=False)
    if data.size:
        _write(group / name, 1, checked(np.ascontiguousarray(data, data.dtype.newbyteorder("<")).tobytes()))


def problem_of(metadata: bytes, shape: tuple[int, ...], dtype: str) -> str | None:
    """What is wrong with an array's `zarr.json`, that should describe an array written here; None if nothing is."""
    try:
        if len(metadata) > MOST_METADATA_BYTES:
            return f"is longer than {MOST_METADATA_BYTES:,} bytes"
        found = ArrayV3Metadata.from_dict(json.loads(metadata))
        described = found.shape, str(found.dtype.to_native_dtype())
    except Exception as error:  # zarr raises whatever its parsers raise
        return f"cannot be read ({first_line(error)})"
    return None if described == (shape, dtype) else f"says {described[1]} {described[0]} instead of {dtype} {shape}"


def _describe(
    group: Path, name: str, shape: tuple[int, ...], dtype: str, *, zstd: bool, chunk: tuple[int, ...] | None = None
) -> None:
    whole = tuple(max(n, 1) for n in shape)
    zarr.create_array(
        store=str(group),
        name=name,
        shape=shape,
        chunks=chunk or whole,
        shards=whole if chunk else None,
        dtype=dtype,
        # A chunk that is lost reads as what no encoder writes, not as zeros.
        fill_value=int(np.iinfo(dtype).max),
        filters=[],
        compressors=[*([ZstdCodec(level=ZSTD_LEVEL)] if zstd else []), Crc32cCodec()],
        zarr_format=3,
    )


def _write(array: Path, dimensions: int, data: bytes) -> None:
    file = array / chunk_file(dimensions)
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
