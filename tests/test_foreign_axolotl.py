from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitstore.errors import ConfigError, DatasetError
from logitstore.foreign import ForeignDocument, open_foreign
from tests.test_foreign_document import teacher, top

INF = np.inf
PREPARED = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("target_token_ids", pa.list_(pa.list_(pa.int64()))),
        ("target_logprobs", pa.list_(pa.list_(pa.float64()))),
    ]
)
RAW = pa.schema(
    [
        ("input_ids", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float64())])))),
    ]
)
Matrix = npt.NDArray[np.float64]


def write(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema = PREPARED) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "train.parquet", row_group_size=2)
    return folder


def read(path: Path, **options: Any) -> list[ForeignDocument]:
    return list(open_foreign("axolotl", path, **options).documents)


def prepared(
    tokens: npt.NDArray[np.int64], log_probs: Matrix, k: int, *, legacy: bool, temperature: float = 1
) -> dict[str, Any]:
    """As axolotl prepares: to the power 1 / temperature, summing to 1 over the k largest; one row of padding."""
    ids, values = top(log_probs[:-1], k)
    p = np.exp(values) ** (1 / temperature)
    kept = np.log(p / p.sum(axis=1, keepdims=True)).tolist()
    pad_ids, pad = [list(range(k))], [[-INF] * k]
    ids_rows = pad_ids + ids.tolist() if legacy else ids.tolist() + pad_ids
    return {
        "input_ids": tokens.tolist(),
        "target_token_ids": ids_rows,
        "target_logprobs": pad + kept if legacy else [*kept, [-1e9] * k],
    }


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_prepared_columns_are_read_at_temperature_1_over_the_kept_entries(
    tmp_path: Path, legacy: bool, temperature: float
) -> None:
    tokens, log_probs = teacher(300, 80)
    folder = write(tmp_path / "a", [prepared(tokens, log_probs, 10, legacy=legacy, temperature=temperature)])
    alignment = "legacy" if legacy else "current"
    source = open_foreign("axolotl", folder, alignment=alignment, temperature=temperature)
    (found,) = source.documents
    ids, values = top(log_probs[:-1], 10)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.log_probs, values - np.log(np.exp(values).sum(axis=1, keepdims=True)), atol=1e-9)
    assert {"tail mass", "alignment", "temperature"} <= set(source.unknown)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_wrong_alignment_is_refused_and_the_right_one_named(tmp_path: Path, legacy: bool) -> None:
    folder = write(tmp_path / "a", [prepared(*teacher(100, 80), 10, legacy=legacy)])
    right, wrong = ("legacy", "current") if legacy else ("current", "legacy")
    with pytest.raises(DatasetError, match=f"type --alignment {right}"):
        read(folder, alignment=wrong)


def test_positions_without_targets_are_all_padding(tmp_path: Path) -> None:
    row = {
        "input_ids": [1, 2, 3, 4],
        "target_token_ids": [[0, 1], [0, 1], [262_143, 7], [0, 1]],
        "target_logprobs": [[-INF, -INF], [-1e9, -1e9], [np.log(0.75), np.log(0.25)], [-INF, -INF]],
    }
    (found,) = read(write(tmp_path / "a", [row]), alignment="current")
    assert found.ids.tolist() == [[0, 0], [0, 0], [262_143, 7]]
    assert found.log_probs[:2].tolist() == [[-INF, -INF], [-INF, -INF]]
    np.testing.assert_allclose(found.log_tail_mass[:2], 0)
    np.testing.assert_allclose(np.exp(found.log_probs[2]), [0.75, 0.25])


def test_lists_of_different_lengths_are_padded(tmp_path: Path) -> None:
    row = {
        "input_ids": [1, 2, 3],
        "target_token_ids": [[5], [6, 7, 8], None],
        "target_logprobs": [[-0.5], [-1.0, -3.0, -2.0], []],
    }
    (found,) = read(write(tmp_path / "a", [row]), alignment="current", renormalised=False)
    assert found.ids.tolist() == [[5, 0, 0], [6, 8, 7]]
    assert found.log_probs.tolist() == [[-0.5, -INF, -INF], [-1, -2, -3]]
    np.testing.assert_allclose(found.log_tail_mass[0], np.log(1 - np.exp(-0.5)))


def raw(tokens: npt.NDArray[np.int64], log_probs: Matrix, k: int, first: int) -> dict[str, Any]:
    """As vLLM gives prompt log-probs: entry j about token j, null before `first`."""
    ids, values = top(log_probs, k)
    entries: list[Any] = [
        [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*pair, strict=True)]
        for pair in zip(ids[first - 1 : -1].tolist(), values[first - 1 : -1].tolist(), strict=True)
    ]
    return {"input_ids": tokens.tolist(), "logprobs": entries if first > 1 else [None, *entries]}


@pytest.mark.parametrize("first", [1, 41])
def test_raw_rows_end_where_the_tokens_end_and_are_over_the_vocabulary(tmp_path: Path, first: int) -> None:
    tokens, log_probs = teacher(120, 80)
    source = open_foreign(
        "axolotl", write(tmp_path / "a", [raw(tokens, log_probs, 10, first)], RAW), logprobs_field="logprobs"
    )
    (found,) = source.documents
    ids, values = top(log_probs[:-1], 10)
    np.testing.assert_array_equal(found.ids[first - 1 :], ids[first - 1 :])
    np.testing.assert_allclose(found.log_probs[first - 1 :], values[first - 1 :], rtol=1e-12)
    assert np.isneginf(found.log_probs[: first - 1]).all()
    np.testing.assert_allclose(
        found.log_tail_mass[first - 1 :], np.log1p(-np.exp(values[first - 1 :]).sum(axis=1)), rtol=1e-9
    )
    assert "tail mass" not in source.unknown


def test_tokens_may_be_given_where_the_file_has_none(tmp_path: Path) -> None:
    parts = [teacher(length, 80, seed=length) for length in (70, 5, 9)]
    rows = [raw(*part, 10, 1) for part in parts]
    folder = write(tmp_path / "a", [{"logprobs": row["logprobs"]} for row in rows], pa.schema([RAW.field("logprobs")]))
    tokens = [part[0].tolist() for part in parts]
    found = read(folder, logprobs_field="logprobs", token_rows=tokens)
    assert [d.token_ids.tolist() for d in found] == tokens
    assert [d.where for d in found] == [f"train.parquet row {i}" for i in range(3)]
    for wrong, says in [(tokens[:2], "found 2 rows of tokens"), ([*tokens, [1, 2]], "is the last of 3 rows")]:
        with pytest.raises(DatasetError, match=says):
            read(folder, logprobs_field="logprobs", token_rows=wrong)
    with pytest.raises(DatasetError, match="row 0: found 70 rows of targets for 69 tokens"):
        read(folder, logprobs_field="logprobs", token_rows=[tokens[0][1:]])
    with pytest.raises(ConfigError, match="has no input_ids: the tokens must be given"):
        read(folder, logprobs_field="logprobs")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "does not say by which axolotl; type --alignment legacy for 0.18"),
        ({"alignment": "next"}, "alignment 'next'"),
        ({"alignment": "current", "temperature": 0.0}, "temperature 0 is not a number above 0"),
        ({"alignment": "current", "temperature": INF}, "temperature inf"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(write(tmp_path / "a", []), **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_token_ids": [[5, 6], [6]]}, "differ in shape"),
        ({"target_token_ids": [[5, 6]]}, "differ in shape"),
        ({"target_token_ids": [[5, None], [6, 7]]}, "target_token_ids holds a null"),
        ({"target_logprobs": [[-1.0, np.nan], [-1.0, -2.0]]}, "found log-prob nan at position 0"),
        ({"target_token_ids": [[5, 5], [6, 7]]}, "found id 5 twice"),
        ({"target_token_ids": [[5, -5], [6, 7]]}, "found id -5"),
        ({"target_token_ids": None}, "target_token_ids is null"),
        ({"input_ids": [1]}, ""),
    ],
)
def test_a_malformed_row_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    row = {"input_ids": [1, 2], "target_token_ids": [[5, 6], [6, 7]], "target_logprobs": [[-1.0, -2.0], [-1.0, -2.0]]}
    folder = write(tmp_path / "a", [row | change])
    if not says:  # one token has no position
        assert read(folder, alignment="current") == []
        return
    with pytest.raises(DatasetError, match=says) as raised:
        read(folder, alignment="current")
    assert str(raised.value).startswith("train.parquet row 0: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("token", ["5", "token_id:", "token_id:-1", "token_id:5 ", "token_id:" + "9" * 11, None])
def test_a_token_that_is_no_id_is_refused(tmp_path: Path, token: str | None) -> None:
    row = {"input_ids": [1, 2], "logprobs": [None, [{"token": token, "logprob": -1.0}]]}
    with pytest.raises(DatasetError, match="has a token that is not token_id:N"):
        read(write(tmp_path / "a", [row], RAW), logprobs_field="logprobs")


def test_a_column_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a", [{"input_ids": [1, 2], "logprobs": "?"}], pa.schema([RAW.field(0), ("logprobs", pa.string())])
    )
    with pytest.raises(DatasetError, match="the column logprobs is string, expected a list"):
        read(folder, logprobs_field="logprobs")
    with pytest.raises(DatasetError, match=r"lacks the column target_logprobs, expected .*; found input_ids, logprobs"):
        read(folder)
    rows = [{"input_ids": [1, 2], "logprobs": [[0.5], [0.5]]}]
    folder = write(tmp_path / "b", rows, pa.schema([RAW.field(0), ("logprobs", pa.list_(pa.list_(pa.float32())))]))
    with pytest.raises(DatasetError, match=r"logprobs holds float, expected \{token, logprob\}"):
        read(folder, logprobs_field="logprobs")


def test_one_long_list_does_not_make_a_large_table(tmp_path: Path) -> None:
    n = 60_000
    rows = [[0]] * n + [list(range(n))]
    row = {"input_ids": [1] * (n + 1), "target_token_ids": rows, "target_logprobs": [[-9.0] * len(x) for x in rows]}
    with pytest.raises(DatasetError, match="has a list of 60000 entries"):
        read(write(tmp_path / "a", [row]), alignment="current")


def test_a_path_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no \.parquet or \.arrow file and no folder that holds any"):
        read(tmp_path / "nowhere", alignment="current")
