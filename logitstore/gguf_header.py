"""Checks a GGUF file's header before MLX reads the file: MLX's reader is C, and ends the process where a header lies.

Every length and count is held against what is left of the file before it is used, and every tensor must lie inside it.
A file of a kind that MLX cannot read, or reads wrongly, is refused by name. No weight is looked at. The metadata is
kept where it is asked for: a tokenizer can be made of it without MLX.

Reference: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md (2023).
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import ModelError

_UINT32, _STRING, _ARRAY, _FLOAT64 = 4, 8, 9, 12
_NUMBERS = {  # by value type
    kind: np.dtype(name)
    for kind, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", _UINT32: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
    }.items()
}  # fmt: skip
_KEY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # at least, in the header
_MAX_DIMENSIONS = 4
_MAX_COUNT = 2**31 - 1  # MLX keeps dimensions and lengths in an int

# The types of weights that MLX reads: name, values per block, bytes per block.
_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# fmt: off
_OTHERS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}
# fmt: on
_AGAIN = "download it again"


def check_header(path: Path) -> None:
    """Walk the header of `path` to its end.

    Raises:
        ModelError: not a GGUF file of version 2 or 3, cut short, contradicting itself, or of a kind MLX cannot read.
    """
    read_metadata(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Walk the header of `path` to its end; its key-value pairs, numbers as NumPy scalars and arrays.

    Raises:
        ModelError: as `check_header`.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            walk = _Walk(path, content)
            walk.header()
            return walk.values
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read as GGUF: {error}; expected a .gguf file, {_AGAIN}") from error


class _Walk:
    """A place in the file that only moves forward, never past the end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0
        self.values: dict[str, Any] = {}

    def header(self) -> None:
        magic = self._content[:4]
        if magic != b"GGUF":
            raise self._refused(f"it starts with {magic!r}, expected b'GGUF'; type the path of a .gguf file")
        self._skip(4, "the magic")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            raise self._refused(f"it is of version {version}, expected 2 or 3; convert the model again with llama.cpp")
        tensors = self._count(_TENSOR_BYTES, "the list of tensors")
        keys = self._count(_KEY_BYTES, "the metadata")
        alignment = self._metadata(keys)
        self._tensors(tensors, alignment)

    def _metadata(self, count: int) -> int:
        """Walk the metadata; how tensors are aligned."""
        alignment = 32
        seen: set[str] = set()
        for _ in range(count):
            key = self._name("a metadata key", seen)
            what = f"metadata `{key:.64}`"
            kind = self._number("<I", what)
            start = self._at
            self.values[key] = self._value(kind, what)
            if key == "general.alignment":
                (alignment,) = struct.unpack_from("<I", self._content, start) if kind == _UINT32 else (0,)
                if alignment.bit_count() != 1:
                    raise self._refused(f"{what} is no power of two in a uint32, expected 32; {_AGAIN}")
        return alignment

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._text(what)
        if kind in _NUMBERS:
            return self._numbers(kind, 1, what)[0]
        if kind == _ARRAY:
            item = self._number("<I", what)
            if item == _STRING:
                return [self._text(what) for _ in range(self._count(8, what))]
            if item in _NUMBERS:
                return self._numbers(item, self._count(_NUMBERS[item].itemsize, what), what)
            if item == _ARRAY:
                raise self._refused(f"{what} is an array of arrays, expected plain values; use the model's safetensors")
            raise self._unread(item, what)
        raise self._unread(kind, what)

    def _numbers(self, kind: int, count: int, what: str) -> npt.NDArray[Any]:
        start = self._skip(count * _NUMBERS[kind].itemsize, what)
        return np.frombuffer(self._content[start : self._at], _NUMBERS[kind])

    def _unread(self, kind: int, what: str) -> ModelError:
        if kind == _FLOAT64:  # MLX 0.32 takes 4 of its 8 bytes, and everything behind it for something else
            return self._refused(f"{what} is a float64, which MLX misreads; use the model's safetensors instead")
        return self._refused(f"{what} has value type {kind}, expected 0 to {_FLOAT64}; {_AGAIN}")

    def _tensors(self, count: int, alignment: int) -> None:
        seen: set[str] = set()
        end = 0  # of the tensors so far, from the start of the data
        last = ""
        for _ in range(count):
            last = self._name("a tensor name", seen)
            what = f"tensor `{last:.64}`"
            dimensions = self._number("<I", what)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._refused(f"{what} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}; {_AGAIN}")
            shape = [self._number("<Q", what) for _ in range(dimensions)]
            if not all(1 <= length <= _MAX_COUNT for length in shape):
                raise self._refused(f"{what} has shape {shape}, expected 1 to {_MAX_COUNT:,} in each; {_AGAIN}")
            kind = self._number("<I", what)
            if kind not in _BLOCKS:
                known = ", ".join(name for name, _, _ in _BLOCKS.values())
                found = _OTHERS.get(kind, f"type {kind}")
                raise self._refused(f"{what} is {found}, expected one of {known}; use the model's safetensors instead")
            name, block_values, block_bytes = _BLOCKS[kind]
            if shape[0] % block_values:
                raise self._refused(f"{what} has rows of {shape[0]:,}, {name} packs {block_values} at once; {_AGAIN}")
            offset = self._number("<Q", what)
            expected = _aligned(end, alignment)  # llama.cpp asks for the same: no gaps, nothing twice
            if offset != expected:
                raise self._refused(f"{what} starts at {offset:,} of the weights, expected {expected:,}; {_AGAIN}")
            end = offset + math.prod(shape) // block_values * block_bytes
        missing = _aligned(self._at, alignment) + end - len(self._content)
        if count and missing > 0:
            raise self._refused(f"{missing:,} bytes are missing at its end, up to tensor `{last:.64}`; {_AGAIN}")

    def _name(self, what: str, seen: set[str]) -> str:
        name = self._text(what)
        if not name.isprintable() or not name:
            raise self._refused(f"{what} is {name[:64]!r}, expected letters; {_AGAIN}")
        if name in seen:
            raise self._refused(f"{what} is there twice: `{name:.64}`; {_AGAIN}")
        seen.add(name)
        return name

    def _text(self, what: str) -> str:
        length = self._count(1, what)
        start = self._skip(length, what)
        try:
            return self._content[start : start + length].decode()
        except UnicodeDecodeError:
            raise self._refused(f"{what} holds bytes that are not UTF-8; {_AGAIN}") from None

    def _count(self, item_bytes: int, what: str) -> int:
        """The next count; that many items of at least `item_bytes` fit into what is left of the file."""
        count = self._number("<Q", what)
        left = len(self._content) - self._at
        if count > min(left // item_bytes, _MAX_COUNT):
            raise self._refused(f"{what} has length {count:,}, but only {left:,} bytes follow; {_AGAIN}")
        return count

    def _number(self, code: str, what: str) -> int:
        number: int = struct.unpack_from(code, self._content, self._skip(struct.calcsize(code), what))[0]
        return number

    def _skip(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin; moves behind them."""
        start, self._at = self._at, self._at + count
        if self._at > len(self._content):
            raise self._refused(f"it ends within {what}, {self._at - len(self._content):,} bytes early; {_AGAIN}")
        return start

    def _refused(self, reason: str) -> ModelError:
        return ModelError(f"{self._path} cannot be read as GGUF: {reason}")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
