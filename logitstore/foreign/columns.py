"""Rows of list columns from Parquet files, or from the Arrow files of `Dataset.save_to_disk`, a few at a time.

Serves the readers of caches that are tables. A file may come from anyone: how many values it unfolds to is held against
its size before they are read, Arrow buffers are validated before they are looked into, and nothing is unpickled.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError, first_line
from logitstore.foreign.parquet_footer import value_counts

_FREE_VALUES = 1 << 24  # a row group may unfold to this many, and to _VALUES_PER_BYTE more for each byte of its file
_VALUES_PER_BYTE = 16
_BATCH_VALUES = 1 << 22


@dataclass(frozen=True, eq=False)
class Row:
    """One row: its place, and its cells as Arrow arrays (None for null)."""

    where: str
    cells: Mapping[str, Any]

    def vector(self, name: str) -> npt.NDArray[Any]:
        """The whole numbers of a cell that is a list of them, [n]."""
        return self.numbers(self._cell(name), name, "iub")

    def lists(self, name: str) -> tuple[Any, npt.NDArray[np.int64]]:
        """A cell that is a list of lists: all their values as one Arrow array, and their lengths [n], 0 for a null."""
        import pyarrow

        cell = self._cell(name)
        if not _is_list(cell.type):
            raise DatasetError(f"{self.where}: {name} is a list of {cell.type}, expected a list of lists")
        lengths = np.diff(np.asarray(cell.offsets)) if not pyarrow.types.is_fixed_size_list(cell.type) else None
        if lengths is None:
            lengths = np.full(len(cell), cell.type.list_size)
        valid = np.asarray(cell.is_valid())
        return cell.flatten(), np.where(valid, lengths, 0).astype(np.int64)

    def matrix(self, name: str, kinds: str) -> npt.NDArray[Any]:
        """The numbers of a cell that is a list of lists of one length, [n, width], of these NumPy kinds."""
        values, lengths = self.lists(name)
        width = int(lengths[0]) if len(lengths) else 0
        if (lengths != width).any():
            raise DatasetError(
                f"{self.where}: {name} has lists of {int(lengths.min())} to {int(lengths.max())} values, "
                "expected one length; write the cache again"
            )
        return self.numbers(values, name, kinds).reshape(len(lengths), width)

    def numbers(self, values: Any, name: str, kinds: str) -> npt.NDArray[Any]:
        """An Arrow array's numbers, which must be of one of these NumPy kinds ("iu" for whole ones) and none null."""
        from pyarrow import types

        kind = values.type
        number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        if number and not values.null_count:
            found = np.asarray(values.to_numpy(zero_copy_only=False))
            if found.dtype.kind in kinds:
                return found
        raise DatasetError(
            f"{self.where}: {name} holds {'a null' if values.null_count else f'values of type {kind}'}, "
            f"expected {'whole numbers' if 'i' in kinds else 'floats'}; leave this row out"
        )

    def _cell(self, name: str) -> Any:
        cell = self.cells[name]
        if cell is None:
            raise DatasetError(f"{self.where}: {name} is null, expected a list; leave this row out")
        return cell


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's Parquet files, or its Arrow files, in the order of the numbers in their names.

    Raises:
        DatasetError: there are none.
    """
    if path.is_file():
        return [path]
    for suffix in (".parquet", ".arrow"):
        if files := sorted(path.glob(f"[!.]*{suffix}"), key=_by_number):  # no ._NAME, which macOS puts beside a file
            return files
    raise DatasetError(f"{path} is no .parquet or .arrow file and no folder that holds any; type the path of one")


def column_names(file: Path) -> list[str]:
    """The names of a file's columns."""
    import pyarrow.parquet

    with _as_dataset_error(file):
        if file.suffix == ".arrow":
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                return list(stream.schema.names)
        return list(pyarrow.parquet.read_schema(file).names)


def read_rows(files: Sequence[Path], columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of the files, in order, with these columns and those of `optional` that a file has.

    Raises:
        DatasetError: a file is damaged, too large for its size, or lacks a column.
    """
    for file in files:
        names = column_names(file)
        if missing := [name for name in columns if name not in names]:
            raise DatasetError(
                f"{file} lacks the column {missing[0]}, expected {', '.join(columns)}; found {', '.join(names)[:200]}"
            )
        wanted = [*columns, *(name for name in optional if name in names)]
        number = 0
        for batch in _batches(file, wanted):
            for i in range(batch.num_rows):
                yield Row(f"{file.name} row {number}", {name: batch.column(name)[i].values for name in wanted})
                number += 1


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    """Record batches of these list columns, valid through and through."""
    import pyarrow
    import pyarrow.parquet

    with _as_dataset_error(file):
        if file.suffix == ".arrow":
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                for batch in stream:
                    yield _checked(batch.select(columns), file)
            return
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True) as table:
            for group, (rows_in_it, counts) in enumerate(value_counts(file)):
                rows = _rows_at_once(rows_in_it, [counts.get(name, 0) for name in columns], file)
                for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    yield _checked(batch, file)


def _rows_at_once(row_count: int, values: list[int], file: Path) -> int:
    """How many rows of a row group to read together; raises where it unfolds to more than its file can mean."""
    limit = _FREE_VALUES + _VALUES_PER_BYTE * file.stat().st_size
    if max(values) > limit:
        raise DatasetError(
            f"{file} holds {max(values):,} values in a row group, expected at most {limit:,} in a file of its size; "
            "write it again with smaller row groups"
        )
    return max(1, min(256, _BATCH_VALUES * row_count // max(1, sum(values))))


def _checked(batch: Any, file: Path) -> Any:
    batch.validate(full=True)
    for field in batch.schema:
        if not _is_list(field.type):
            raise DatasetError(f"{file}: the column {field.name} is {field.type}, expected a list")
    return batch


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _by_number(file: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"[0-9]{1,18}", file.name)], file.name


@contextmanager
def _as_dataset_error(file: Path) -> Iterator[None]:
    """Turn what Arrow raises on a damaged file into a DatasetError of one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DatasetError(
            f"{file} is not a whole Parquet or Arrow file: {first_line(error)}; copy or write it again"
        ) from error
