"""DistillKit's captured logits: Parquet files of its writer, or the Arrow files that its packing leaves.

A row is `input_ids` and, one list per position, the bytes of one of its two codecs. Row t is about token t + 1: a vLLM
capture of L tokens has L - 1 rows, a packed or otherwise captured one has L, the last about a token that is not there.
Packed rows hold several documents, numbered from 1 in `attention_mask`, which are told apart again here. Where vLLM
captured, the last token may be a pad put there to have the last real position answered; it is kept, for a document
without it is a prefix.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from logitstore.errors import DatasetError, first_line
from logitstore.foreign.alignment import aligned
from logitstore.foreign.columns import Row, column_names, files_of, read_rows
from logitstore.foreign.distillkit_codec import CurveCodec
from logitstore.foreign.distillkit_legacy import LegacyCodec
from logitstore.foreign.document import ForeignDocument, ForeignSource, foreign_document, log_sum_exp

CONFIG_NAME = "compression_config.yaml"
_MAX_CONFIG_BYTES = 1 << 16
_CURVE_COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_LEGACY_COLUMNS = ("input_ids", "packed_indices", "exact_values", "coeffs")
_NESTED = ("logprob_compressor", "legacy_logit_compression")


def read_distillkit(
    path: Path,
    *,
    compression_config: Path | None = None,
    legacy_values: Literal["log-probs", "logits"] = "log-probs",
    check_alignment: bool = True,
) -> ForeignSource:
    """Open a .parquet or .arrow file, or a folder of them.

    Args:
        compression_config: the settings of the capture, as YAML or JSON; if None, ``compression_config.yaml`` beside
            the data. DistillKit's own training config does as well.
        legacy_values: what a capture of the first codec holds. Logits become log-probs over the kept entries.

    Raises:
        DatasetError: no such files, or settings that cannot be read.
    """
    files = files_of(path)
    settings = _read_settings(compression_config or files[0].parent / CONFIG_NAME)
    where = str(compression_config or CONFIG_NAME)
    legacy = "polynomial_degree" in settings
    codec = LegacyCodec.parse(settings, where) if legacy else CurveCodec.parse(settings, where)
    wanted = _LEGACY_COLUMNS if legacy else _CURVE_COLUMNS
    if missing := [name for name in wanted if name not in column_names(files[0])]:
        raise DatasetError(
            f"{files[0]} lacks the column {missing[0]}, which {where} asks for; "
            "type --compression-config with the settings of this capture"
        )
    logits = legacy and legacy_values == "logits"
    documents = _documents(files, codec, wanted, logits=logits)
    advice = "type --compression-config with the settings of this capture"
    vocab_size = codec.vocab_size if isinstance(codec, LegacyCodec) else codec.d
    return ForeignSource(
        format="distillkit",
        documents=aligned(documents, advice) if check_alignment else documents,
        unknown=(
            "teacher",
            "tokenizer",
            "temperature",
            "label log-prob where the label was not kept",
            "entropy",
            *(("values: log-probs or logits",) if legacy else ()),
            *(("tail mass",) if logits else ()),
        ),
        known={"codec": "legacy" if legacy else "curve", "top_k": codec.k, "vocab_size": vocab_size},
    )


def _documents(
    files: list[Path], codec: CurveCodec | LegacyCodec, columns: tuple[str, ...], *, logits: bool
) -> Iterator[ForeignDocument]:
    for row in read_rows(files, columns, ["attention_mask"]):
        tokens = row.vector("input_ids")
        if isinstance(codec, CurveCodec):
            ids, log_probs = _curve_rows(row, codec)
        else:
            ids, log_probs = _legacy_rows(row, codec, logits=logits)
        if len(ids) not in (len(tokens) - 1, len(tokens)):
            raise DatasetError(
                f"{row.where}: found {len(tokens)} tokens and {len(ids)} positions, expected as many or one fewer; "
                "leave this row out"
            )
        spans = _spans(row, len(tokens))
        for part, (start, stop) in enumerate(spans):
            where = row.where if len(spans) == 1 else f"{row.where} document {part}"
            positions = slice(start, stop - 1)  # the one shift: row t is about token t + 1
            yield foreign_document(tokens[start:stop], ids[positions], log_probs[positions], where)


def _curve_rows(row: Row, codec: CurveCodec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    values = _sized(row, "compressed_logprobs", codec.value_bytes, np.uint8)
    ids = _sized(row, "bytepacked_indices", codec.id_bytes, np.uint8)
    _require_as_many(row, len(values), len(ids))
    return codec.decode_ids(ids), codec.decode_log_probs(values)


def _legacy_rows(
    row: Row, codec: LegacyCodec, *, logits: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    words = _sized(row, "packed_indices", codec.word_count, np.uint64)
    exact = _sized(row, "exact_values", codec.exact_k, np.float64)
    coefficients = _sized(row, "coeffs", codec.term_count, np.float64)
    _require_as_many(row, len(words), len(exact), len(coefficients))
    values = codec.decode_values(exact, coefficients)
    if logits:
        return codec.decode_ids(words), values - log_sum_exp(values)[:, None]
    if values.size and float(np.nanmax(values)) > 0.5:
        raise DatasetError(
            f"{row.where}: found a value of {np.nanmax(values):.3g}, expected log-probs; type --legacy-values logits"
        )
    return codec.decode_ids(words), values


def _sized(row: Row, name: str, width: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A matrix of a known width and kind."""
    found = row.matrix(name, "f" if dtype is np.float64 else "iu")
    if len(found) and found.shape[1] != width:
        raise DatasetError(
            f"{row.where}: {name} has {found.shape[1]} values a position, expected {width}; "
            "type --compression-config with the settings of this capture"
        )
    if dtype is np.uint8 and found.size and not 0 <= found.min() <= found.max() <= 255:
        raise DatasetError(f"{row.where}: {name} holds more than bytes, expected 0 to 255; write it again")
    return found.reshape(len(found), width).astype(dtype)


def _require_as_many(row: Row, *counts: int) -> None:
    if len(set(counts)) > 1:
        raise DatasetError(f"{row.where}: the columns have {counts} positions, expected as many; leave this row out")


def _spans(row: Row, length: int) -> list[tuple[int, int]]:
    """[start, stop) of each document of two tokens or more; 0 in `attention_mask` is padding."""
    if row.cells.get("attention_mask") is None:
        return [(0, length)] if length > 1 else []
    mask = row.vector("attention_mask").astype(np.int64)
    if len(mask) != length:
        raise DatasetError(f"{row.where}: attention_mask has {len(mask)} values, expected {length}; leave this row out")
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), length]
    return [(start, stop) for start, stop in pairwise(edges) if stop - start > 1 and mask[start]]


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise ValueError(f"more than {_MAX_CONFIG_BYTES:,} bytes")
        settings = yaml.safe_load(data)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} does not exist; type --compression-config with the capture's settings") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read as YAML: {first_line(error)}; write it again") from error
    for level in ("teacher", *_NESTED):
        if isinstance(settings, dict) and isinstance(settings.get(level), dict):
            settings = settings[level]
    if not isinstance(settings, dict):
        raise DatasetError(f"{path} holds no settings, expected d, k, exact_k and so on; use the capture's own file")
    return settings
