import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from logitstore.errors import DatasetError
from logitstore.foreign import ForeignDocument, open_foreign
from tests.test_foreign_document import teacher, top
from tests.test_foreign_numbers import packed

V = 262_144  # 18 bits; the largest id is among the entries
BUDGET = {"k": 50, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "residual_bins": []}
EXACT = {"k": 20, "exact_k": 20, "exact_dtype": "float32", "polynomial_terms": None, "residual_bins": []}
BINS = [
    {"scale_dtype": "float16", "element_bits": 8, "num_elements": 5},
    {"scale_dtype": "float32", "element_bits": 3, "num_elements": 7},
    {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 2},
]


def settings(**changes: Any) -> dict[str, Any]:
    base = {"d": V, "term_dtype": "float32", "delta_encoding": False, "error_diffusion": False, "normalize_t": False}
    return base | changes


def number(value: float, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return struct.pack("<f", value)[2:]  # cut, not rounded: the nearest below in size
    return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], value)


def basis(config: dict[str, Any], t: float) -> list[float]:
    return [t**0.5 if x == "sqrt" else np.exp(t) if x == "exp" else t**x for x in config["polynomial_terms"] or []]


def compressed(values: Sequence[float], config: dict[str, Any]) -> list[int]:
    """One position's `compressed_logprobs`, written from the layout."""
    if config["delta_encoding"]:
        values = [values[0], *(b - a for a, b in pairwise(values))]
    head, rest = values[: config["exact_k"]], list(values[config["exact_k"] :])
    out = b"".join(number(value, config["exact_dtype"]) for value in head)
    if config["polynomial_terms"]:
        n = len(rest)
        rows = np.array(
            [basis(config, i / max(n - 1, 1) if config["normalize_t"] else i) for i in range(n)], np.float64
        )
        fit = np.linalg.lstsq(rows, np.array(rest), rcond=None)[0]
        out += b"".join(number(c, config["term_dtype"]) for c in fit)
        rest = [value - row @ fit for value, row in zip(rest, rows, strict=True)]
    for entry in config["residual_bins"]:
        bits, part = entry["element_bits"], rest[: entry["num_elements"]]
        rest = rest[entry["num_elements"] :]
        scale = max(map(abs, part)) / (1 if bits == 1 else 2 ** (bits - 1)) or 1.0
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = [int(value > 0) if bits == 1 else min(max(round(value / scale), low), high) - low for value in part]
        out += number(scale, entry["scale_dtype"]) + bytes(packed(codes, bits))
    return list(out)


Rows = list[dict[str, Any]]
LISTS = pa.list_(pa.list_(pa.uint8()))
SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", LISTS), ("bytepacked_indices", LISTS)]
)


def curve_row(tokens: Iterable[int], log_probs: npt.NDArray[np.float64], config: dict[str, Any]) -> dict[str, Any]:
    ids, values = top(log_probs, config["k"])
    bits = (config["d"] - 1).bit_length()
    return {
        "input_ids": [int(token) for token in tokens],
        "compressed_logprobs": [compressed(row.tolist(), config) for row in values],
        "bytepacked_indices": [packed(row.tolist(), bits) for row in ids],
    }


def write(folder: Path, files: list[Rows], config: Any, schema: pa.Schema = SCHEMA) -> Path:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"data_{i}.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def read(path: Path, **options: Any) -> list[ForeignDocument]:
    return list(open_foreign("distillkit", path, **options).documents)


def spread_over(vocab: int, log_probs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The same distributions with ids strewn over a large vocabulary, its last id among them."""
    wide = np.full((len(log_probs), vocab), -1e9)
    wide[:, np.linspace(0, vocab - 1, log_probs.shape[1]).astype(int)] = log_probs
    return wide


@pytest.mark.parametrize(
    ("changes", "atol"),
    [
        (EXACT, 1e-5),
        (EXACT | {"exact_dtype": "float64"}, 0),
        (EXACT | {"delta_encoding": True}, 1e-4),
        (EXACT | {"exact_dtype": "bfloat16"}, 0.13),
        (BUDGET, 1.5),
        ({"k": 20, "exact_k": 6, "polynomial_terms": [0, 1, 2, 3, "sqrt"], "residual_bins": BINS}, 0.12),
        ({"k": 20, "exact_k": 6, "polynomial_terms": [0, 1, "exp"], "residual_bins": BINS, "normalize_t": True}, 0.4),
        ({"k": 18, "exact_k": 4, "polynomial_terms": None, "residual_bins": BINS, "delta_encoding": True}, 0.5),
    ],
)
def test_what_the_codec_wrote_is_read_back(tmp_path: Path, changes: dict[str, Any], atol: float) -> None:
    config = settings(exact_dtype="float32") | changes
    tokens, narrow = teacher(9, 60, spread=2)
    log_probs = spread_over(V, narrow)
    tokens = np.linspace(0, V - 1, 60).astype(int)[tokens]
    (found,) = read(write(tmp_path / "c", [[curve_row(tokens, log_probs[:-1], config)]], config))
    ids, values = top(log_probs[:-1], config["k"])
    assert found.token_ids.tolist() == tokens.tolist()
    for t in range(8):
        order = np.argsort(ids[t])
        mine = np.argsort(found.ids[t])
        np.testing.assert_array_equal(found.ids[t][mine], ids[t][order])
        np.testing.assert_allclose(found.log_probs[t][mine], values[t][order], rtol=1e-6, atol=atol)
    assert (np.diff(found.log_probs, axis=1) <= 0).all()
    assert found.ids.max() == V - 1


def test_a_curve_is_evaluated_as_written(tmp_path: Path) -> None:
    config = settings(**BUDGET) | {"k": 4, "d": 8}
    data = number(-0.5, "bfloat16") + struct.pack("<3f", -2.0, -0.25, -0.5)
    row = {"input_ids": [1, 2], "compressed_logprobs": [list(data)], "bytepacked_indices": [packed([7, 3, 0, 1], 3)]}
    (found,) = read(write(tmp_path / "c", [[row]], config))
    assert found.ids.tolist() == [[7, 3, 0, 1]]
    np.testing.assert_allclose(found.log_probs, [[-0.5, -2, -2.75, -2.5 - 0.5 * 2**0.5]], rtol=1e-6)


@pytest.mark.parametrize("extra", [0, 1])
def test_rows_are_about_the_next_token_with_or_without_one_about_none(tmp_path: Path, extra: int) -> None:
    tokens, log_probs = teacher(300, 64)
    config = settings(**EXACT, d=64)
    (found,) = read(write(tmp_path / "c", [[curve_row(tokens, log_probs[: 299 + extra], config)]], config))
    ids, values = top(log_probs[:-1], 20)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.log_probs, values, rtol=1e-6)


def test_rows_that_are_one_off_are_refused(tmp_path: Path) -> None:
    tokens, log_probs = teacher(300, 64)
    folder = write(tmp_path / "c", [[curve_row(tokens, np.roll(log_probs, 1, 0), c := settings(**EXACT, d=64))]], c)
    with pytest.raises(DatasetError, match=r"data_0\.parquet row 0: over 298 positions"):
        read(folder)
    assert len(read(folder, check_alignment=False)) == 1


def test_packed_rows_come_apart_into_their_documents(tmp_path: Path) -> None:
    config = settings(**EXACT, d=64)
    parts = [teacher(length, 64, seed=length) for length in (5, 2, 7)]
    rows = [curve_row(tokens, log_probs, config) for tokens, log_probs in parts]
    joined: dict[str, Any] = {name: [x for row in rows for x in row[name]] for name in rows[0]}
    joined["attention_mask"] = [1] * 5 + [2] * 2 + [3] * 7
    lonely = curve_row([9, 9, 9], parts[0][1][:3], config) | {"attention_mask": [1, 0, 0]}
    folder = write(
        tmp_path / "c", [[joined, lonely]], config, SCHEMA.append(pa.field("attention_mask", pa.list_(pa.int64())))
    )
    found = read(folder)
    assert [d.where for d in found] == [f"data_0.parquet row 0 document {i}" for i in range(3)]
    for document, (tokens, log_probs) in zip(found, parts, strict=True):
        assert document.token_ids.tolist() == tokens.tolist()
        np.testing.assert_array_equal(document.ids, top(log_probs[:-1], 20)[0])


def test_arrow_files_of_save_to_disk_are_read_too(tmp_path: Path) -> None:
    tokens, log_probs = teacher(6, 64)
    config = settings(**EXACT, d=64)
    folder = write(tmp_path / "c", [], config)
    table = pa.Table.from_pylist([curve_row(tokens, log_probs, config)] * 3, SCHEMA)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_table(table, max_chunksize=2)
    assert [d.where for d in read(folder)] == [f"data-00000-of-00001.arrow row {i}" for i in range(3)]
    whole = (folder / "data-00000-of-00001.arrow").read_bytes()
    (folder / "data-00000-of-00001.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="is not a whole Parquet or Arrow file"):
        read(folder)


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    config = settings(**EXACT, d=64)
    files = [[curve_row([i, i], teacher(2, 64)[1][:1], config)] for i in range(11)]
    folder = write(tmp_path / "c", files, config)
    (folder / "._data-00000-of-00001.parquet").write_bytes(b"\0\5\x16\7")  # as macOS leaves on a disk of others
    assert [int(d.token_ids[0]) for d in read(folder)] == list(range(11))


def test_entries_that_vllm_left_out_are_padding(tmp_path: Path) -> None:
    config = settings(**EXACT, d=64) | {"k": 3, "exact_k": 3}
    row = {
        "input_ids": [1, 2],
        "compressed_logprobs": [compressed([-1.0, -np.inf, -np.inf], config)],
        "bytepacked_indices": [packed([5, 63, 63], 6)],
    }
    (found,) = read(write(tmp_path / "c", [[row]], config))
    assert found.ids.tolist() == [[5, 0, 0]]
    np.testing.assert_allclose(found.log_tail_mass, np.log(1 - np.exp(-1)))


def test_a_capture_says_what_it_forgot(tmp_path: Path) -> None:
    source = open_foreign("distillkit", write(tmp_path / "c", [[]], settings(**EXACT)))
    assert source.known == {"codec": "curve", "top_k": 20, "vocab_size": V}
    assert {"teacher", "tokenizer", "temperature"} <= set(source.unknown) and "tail mass" not in source.unknown


LEGACY = {"k": 12, "exact_k": 4, "polynomial_degree": 3, "vocab_size": 200_000, "with_sqrt_term": True}
LEGACY_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("packed_indices", pa.list_(pa.list_(pa.uint64()))),
        ("exact_values", pa.list_(pa.list_(pa.float32()))),
        ("coeffs", pa.list_(pa.list_(pa.float32()))),
    ]
)


def legacy_row(tokens: Iterable[int], values: npt.NDArray[np.float64], config: dict[str, Any]) -> dict[str, Any]:
    """Ids 199,999, 199,998, ...: three of 18 bits to a word."""
    ids = [199_999 - i for i in range(12)]
    words = [ids[i] | ids[i + 1] << 18 | ids[i + 2] << 36 for i in range(0, 12, 3)]
    sign = -1 if config.get("invert_polynomial", True) else 1
    x = np.array([[t ** (sign * i) for i in range(4)] + [t**0.5] for t in range(1, 9)], np.float64)
    fits = [np.linalg.lstsq(x, row[4:], rcond=None)[0].tolist() for row in values]
    return {
        "input_ids": [int(token) for token in tokens],
        "packed_indices": [words] * len(values),
        "exact_values": values[:, :4].tolist(),
        "coeffs": fits,
    }


@pytest.mark.parametrize("inverted", [True, False])
def test_the_first_codec_is_read_back(tmp_path: Path, inverted: bool) -> None:
    config = LEGACY | {"invert_polynomial": inverted}
    t = np.arange(1, 9)
    values = np.concatenate([[-1, -2, -2.5, -3], -3.5 - 0.3 * np.sqrt(t) + 0.2 / t])[None].repeat(3, axis=0)
    folder = write(tmp_path / "c", [[legacy_row([1, 2, 199_999], values, config)]], config, LEGACY_SCHEMA)
    (found,) = read(folder)
    assert found.ids[0].tolist() == [199_999 - i for i in range(12)]
    np.testing.assert_allclose(found.log_probs, values[:2], atol=1e-5 if inverted else 0.02)
    assert found.ids.shape == (2, 12)


def test_the_first_codec_with_logits_is_told(tmp_path: Path) -> None:
    logits = np.array([[9, 8, 7.5, 7, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5]])
    config = {"legacy_logit_compression": LEGACY | {"exact_k": 12, "polynomial_degree": 1, "with_sqrt_term": False}}
    row = legacy_row([1, 2], logits, {}) | {"exact_values": logits.tolist(), "coeffs": [[]]}
    folder = write(tmp_path / "c", [[row]], config, LEGACY_SCHEMA)
    with pytest.raises(DatasetError, match=r"found a value of 9, expected log-probs; type --legacy-values logits"):
        read(folder)
    source = open_foreign("distillkit", folder, legacy_values="logits")
    (found,) = source.documents
    np.testing.assert_allclose(found.log_probs, logits - np.log(np.exp(logits).sum()), rtol=1e-12)
    assert "tail mass" in source.unknown
