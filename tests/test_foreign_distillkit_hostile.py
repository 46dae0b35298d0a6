import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitstore.errors import DatasetError
from tests.test_foreign_distillkit import BINS, EXACT, LEGACY, SCHEMA, curve_row, read, settings, write
from tests.test_foreign_document import teacher


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compressed_logprobs": [[0] * 79] * 3}, "compressed_logprobs has 79 values a position, expected 80"),
        ({"compressed_logprobs": [[0] * 80, [0] * 3, [0] * 80]}, "has lists of 3 to 80 values"),
        ({"compressed_logprobs": [[0] * 80]}, r"columns have \(1, 3\) positions"),
        ({"compressed_logprobs": None}, "compressed_logprobs is null"),
        ({"input_ids": [1, 2]}, "found 2 tokens and 3 positions"),
        ({"input_ids": [1, None, 3, 4]}, "input_ids holds a null"),
        ({"input_ids": [1, 2**63, 3, 4]}, "found token 9223372036854775808"),
        ({"bytepacked_indices": [[0] * 15] * 3}, "found id 0 twice"),
        ({"compressed_logprobs": [[0, 0, 192, 127] * 20] * 3}, "found log-prob nan at position 0"),
        ({"compressed_logprobs": [[0, 0, 0, 128] * 20] * 3}, r"sum to 20 \(median\)"),
    ],
)
def test_a_malformed_row_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    tokens, log_probs = teacher(4, 64)
    config = settings(**EXACT, d=64)
    folder = write(tmp_path / "c", [[curve_row(tokens, log_probs[:-1], config) | change]], config)
    with pytest.raises(DatasetError, match=says) as raised:
        read(folder)
    assert str(raised.value).startswith("data_0.parquet row 0: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([1], "holds no settings"),
        (settings(**EXACT, d=1), "d is 1, expected 2 to"),
        (settings(**EXACT) | {"k": "20"}, "k is '20', expected of type int"),
        (settings(**EXACT) | {"exact_k": 21}, "exact_k is 21, expected 0 to 20"),
        (settings(**EXACT) | {"exact_dtype": "int8"}, "a dtype is 'int8'"),
        (settings(**EXACT) | {"colour": 1}, "the setting 'colour', expected d, k"),
        (settings(**EXACT) | {"polynomial_terms": ["sin"]}, "a term is 'sin'"),
        (settings(**EXACT) | {"polynomial_terms": [-1]}, "a term is -1"),
        (settings(**EXACT) | {"residual_bins": BINS}, "residual_bins hold 14 elements, expected at most 0"),
        (settings(**EXACT) | {"residual_bins": [3]}, "found 3, expected the settings of ResidualBin"),
        ({"k": 3}, "missing 2 required positional arguments: 'd' and 'exact_k'"),
        (LEGACY | {"polynomial_degree": 99}, "polynomial_degree is 99"),
        (LEGACY, "lacks the column packed_indices"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, config: Any, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as raised:
        read(write(tmp_path / "c", [[]], config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "&a [*a", "[" * 5000, "\x00", "d: " + "1" * 70_000])
def test_settings_that_are_no_yaml_are_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "c", [[]], {})
    (folder / "compression_config.yaml").write_text(text)
    with pytest.raises(DatasetError, match="cannot be read as YAML"):
        read(folder)


def test_settings_may_lie_elsewhere_and_must_lie_somewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [[]], {})
    (folder / "compression_config.yaml").unlink()
    with pytest.raises(DatasetError, match=r"does not exist; type --compression-config"):
        read(folder)
    other = tmp_path / "run.json"
    other.write_text(
        json.dumps({"model": "m", "teacher": {"kind": "dataset", "logprob_compressor": settings(**EXACT)}})
    )
    assert read(folder, compression_config=other) == []


def test_a_cut_or_flipped_file_is_refused(tmp_path: Path) -> None:
    tokens, log_probs = teacher(20, 64)
    config = settings(**EXACT, d=64)
    folder = write(tmp_path / "c", [[curve_row(tokens, log_probs, config)] * 4], config)
    file = folder / "data_0.parquet"
    whole = file.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"data_0\.parquet"):
            read(folder)
    for place in range(0, len(whole), 997):  # whatever a flipped bit does, it does no more than that
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read(folder)
        except DatasetError as error:
            assert "\n" not in str(error)


def test_a_small_file_that_unfolds_to_a_large_table_is_refused_unread(tmp_path: Path) -> None:
    zeros = pa.array(np.zeros(40_000_000, np.uint8))
    inner = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)
    outer = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), inner)
    folder = write(tmp_path / "c", [], settings(**EXACT))
    table = pa.table([pa.array([[1, 2]], pa.list_(pa.uint64())), outer, outer], schema=SCHEMA)
    pq.write_table(table, folder / "data_0.parquet", compression="zstd")
    assert (folder / "data_0.parquet").stat().st_size < 100_000
    with pytest.raises(DatasetError, match=r"holds 40,000,000 values in a row group, expected at most 1[0-9,]+ in a"):
        read(folder)
