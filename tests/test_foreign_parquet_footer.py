from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitstore.errors import DatasetError
from logitstore.foreign.columns import read_rows
from logitstore.foreign.parquet_footer import value_counts

COLUMNS = ["ids", "entries"]


def write(path: Path, rows: int = 40, **options: Any) -> Path:
    table = pa.table(
        {
            "ids": pa.array([list(range(i % 5)) for i in range(rows)], pa.list_(pa.int32())),
            "entries": [[[{"token": "a", "logprob": 0.5}] * 2, []] for _ in range(rows)],
            "text": [None if i % 3 else "é" for i in range(rows)],
        }
    )
    pq.write_table(table.replace_schema_metadata({"note": "x" * 200}), path, row_group_size=15, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"version": "1.0"}, {"write_page_index": True}, {"write_statistics": False}])
def test_counts_are_those_that_arrow_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.parquet", **options)
    groups = pq.read_metadata(path)
    assert groups.num_row_groups == 3
    for i, (rows, counts) in enumerate(value_counts(path)):
        group = groups.row_group(i)
        leaves = [group.column(c) for c in range(group.num_columns)]
        assert rows == group.num_rows
        assert counts == {leaf.path_in_schema.partition(".")[0]: leaf.num_values for leaf in leaves}


@pytest.mark.parametrize("size", [0, 7, 8, 12, -1, -9])
def test_a_file_without_a_whole_footer_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="footer"):
        value_counts(path)


def footer_file(path: Path, footer: bytes) -> Path:
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return path


@pytest.mark.parametrize(
    "footer",
    [
        b"\x00",  # no row groups
        b"\x1c" * 100,  # structs in structs
        b"\x19" * 100,  # lists of lists
        b"\x19\xf9" + b"\xff" * 20,  # a count of more than 64 bits
        b"\x19\xfc\xff\xff\xff\xff\x0f\x00\x00",  # 2^32 structs, of which there are two
        b"\x18\xff\xff\xff\xff\x0f",  # a string of 2^32 bytes
        b"\x1d\x00",  # an unknown kind
        b"\x49\x15\x02\x00",  # row groups that are numbers
    ],
)
def test_a_footer_that_is_none_is_refused(tmp_path: Path, footer: bytes) -> None:
    with pytest.raises(ValueError, match="footer"):
        value_counts(footer_file(tmp_path / "a.parquet", footer))


def test_no_flipped_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows=4)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 2 % 8)]) + whole[place + 1 :])
        try:
            list(read_rows([path], COLUMNS))
        except DatasetError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
