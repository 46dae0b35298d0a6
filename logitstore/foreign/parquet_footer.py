"""How many values each column of a Parquet file unfolds to, from its footer, before Arrow takes memory for them.

Reads the footer's Thrift compact encoding itself, and of it only row groups, columns, their names and their counts:
PyArrow 26 ends the process when it is asked for the metadata of a column whose statistics contradict themselves.
Parquet format, `parquet.thrift`; Thrift compact protocol.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 1 << 23  # some 6,000 row groups
_MAX_DEPTH = 16
# Field ids in parquet.thrift.
_ROW_GROUPS, _COLUMNS, _ROW_COUNT, _META_DATA, _PATH, _VALUE_COUNT = 4, 1, 3, 3, 3, 5
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


def value_counts(path: Path) -> list[tuple[int, dict[str, int]]]:
    """For each row group its rows, and the values of its columns: the largest count among a column's leaves.

    Raises:
        ValueError: the footer is damaged.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or not 0 < length <= min(size - 8, _MAX_FOOTER_BYTES):
            raise ValueError("it does not end in a Parquet footer")
        file.seek(size - 8 - length)
        footer = _Compact(file.read(length))
    try:
        return [_row_group(group) for group in _list(_struct(footer.struct()), _ROW_GROUPS)]
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError("its footer is cut or damaged") from error


def _row_group(group: Any) -> tuple[int, dict[str, int]]:
    counts: dict[str, int] = {}
    for column in _list(_struct(group), _COLUMNS):
        data = _struct(_struct(column)[_META_DATA])
        name, count = _list(data, _PATH)[0], data[_VALUE_COUNT]
        if not isinstance(name, bytes) or not isinstance(count, int) or count < 0:
            raise ValueError("its footer names no values of a column")
        counts[name.decode()] = max(count, counts.get(name.decode(), 0))
    rows = group[_ROW_COUNT]
    if not isinstance(rows, int) or rows < 0:
        raise ValueError("its footer counts no rows")
    return rows, counts


def _struct(value: Any) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise ValueError("its footer is damaged")
    return value


def _list(value: dict[int, Any], field: int) -> list[Any]:
    found = value[field]
    if not isinstance(found, list):
        raise ValueError("its footer is damaged")
    return found


class _Compact:
    """A cursor over bytes in Thrift's compact encoding."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by id."""
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        fields: dict[int, Any] = {}
        last = 0
        for head in iter(self._byte, 0):
            last = last + (head >> 4) if head >> 4 else self._integer()
            fields[last] = head & 15 == 1 if head & 15 in _BOOLEANS else self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in _LISTS:
            return list(self._items(depth))
        if kind == _BYTE or kind in _BOOLEANS:
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        raise ValueError(f"its footer holds a value of unknown kind {kind}")

    def _items(self, depth: int) -> Iterator[Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        for _ in range(count):  # each takes a byte or more, so a false count ends at the end of the data
            yield self._value(head & 15, depth + 1)

    def _byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def _take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        self.at += size
        if len(part) != size:
            raise ValueError("its footer is cut")
        return part

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer holds a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
