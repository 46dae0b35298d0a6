"""Rows of tensors from safetensors files of other tools, a row at a time.

`safetensors` checks the header: sizes, offsets and that they cover the file. The bytes of a row are then read where the
header has them, bfloat16 too, which NumPy does not know.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError, first_line
from logitstore.foreign.numbers import floats

_DTYPES = {"I32": "<i4", "U32": "<u4", "BOOL": "?"}
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U32": 4, "BOOL": 1}
FLOATS = tuple(_FLOATS)
_MAX_ROW_BYTES = 1 << 30


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its bytes in the file."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=object)) * _SIZES[self.dtype]


class TensorFile:
    """A safetensors file, open for reading; a context manager."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            DatasetError: not a whole safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
            self._file = path.open("rb")
            header_bytes = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(header_bytes))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise DatasetError(
                f"{path} is not a whole safetensors file: {first_line(error)}; copy or write it again"
            ) from error
        header.pop("__metadata__", None)
        self._tensors = {
            name: _Tensor(entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def shape(self, name: str, dtypes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, of one of these dtypes and of this rank.

        Raises:
            DatasetError: it is not.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            found = ", ".join(self._tensors)[:200] or "nothing"
            raise DatasetError(f"{self.path} lacks the tensor {name}, found {found}; type the folder of such a cache")
        if tensor.dtype not in dtypes or len(tensor.shape) != rank:
            raise DatasetError(
                f"{self.path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(dtypes)} with "
                f"{rank} axes; type the folder of such a cache"
            )
        if tensor.row_bytes > _MAX_ROW_BYTES:
            raise DatasetError(
                f"{self.path}: {name} has rows of {tensor.row_bytes:,} bytes, expected at most {_MAX_ROW_BYTES:,}; "
                "write the cache again with shorter sequences"
            )
        return tensor.shape

    def row(self, name: str, index: int) -> npt.NDArray[Any]:
        """tensor[index] of a tensor whose `shape` was asked for; floats of any size as float64."""
        tensor = self._tensors[name]
        try:
            self._file.seek(tensor.start + index * tensor.row_bytes)
            data = np.frombuffer(self._file.read(tensor.row_bytes), np.uint8)
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read: {first_line(error)}; copy it again") from error
        if len(data) != tensor.row_bytes:
            raise DatasetError(f"{self.path} was cut while it was read; write it again")
        if tensor.dtype in _FLOATS:
            size = _SIZES[tensor.dtype]
            values: npt.NDArray[Any] = floats(data.reshape(-1, size), _FLOATS[tensor.dtype])
        else:
            values = data.view(_DTYPES[tensor.dtype])
        return values.reshape(tensor.shape[1:])
