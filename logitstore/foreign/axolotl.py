"""Axolotl's knowledge-distillation columns: prepared top-k rows, or the raw log-probs they are prepared from.

Prepared (v2): `target_token_ids` and `target_logprobs`, one list per token; raw (v1): per token a list of {"token":
"token_id:N", "logprob"}, or null. Rows end where the tokens end; where there are fewer, the first tokens have none.
Axolotl up to 0.18 prepared row j about token j, as raw data has it ("legacy"), later versions about token j + 1
("current"). Preparing raises probabilities to 1 / temperature and scales them to sum to 1 over the kept entries; the
first is undone here, the second cannot be. Padding is -inf or -1e9.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from logitstore.errors import ConfigError, DatasetError
from logitstore.foreign.alignment import aligned
from logitstore.foreign.columns import Row, column_names, files_of, read_rows
from logitstore.foreign.document import ForeignDocument, ForeignSource, foreign_document, log_sum_exp

IDS_COLUMN = "target_token_ids"
TOKENS_COLUMN = "input_ids"
_PADDING = -1e6  # below this a log-prob is padding: axolotl pads with -1e9
_TOKEN = "token_id:"
_MAX_K = 1 << 16


def read_axolotl(
    path: Path,
    *,
    alignment: Literal["current", "legacy"] | None = None,
    logprobs_field: str = "target_logprobs",
    temperature: float = 1.0,
    renormalised: bool | None = None,
    token_rows: Iterable[Sequence[int]] | None = None,
    check_alignment: bool = True,
) -> ForeignSource:
    """Open a .parquet or .arrow file, or a folder of them.

    Args:
        alignment: what row j is about: "current", token j + 1; "legacy", token j itself. May be left out where the
            file is raw: then it is "legacy".
        logprobs_field: the column of log-probs. It is raw where the file has no `target_token_ids`.
        temperature: that of the stored distribution (`kd_temperature` where prepared).
        renormalised: whether a position's probabilities were scaled to sum to 1 over its kept entries; if None, they
            were where the file is prepared.
        token_rows: the token ids of each row, in order, where the file has no `input_ids`.

    Raises:
        ConfigError: a temperature or an alignment that is none, or no tokens.
        DatasetError: no such files, or a column is missing.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature {temperature:g} is not a number above 0; type --temperature 1")
    files = files_of(path)
    names = column_names(files[0])
    raw = IDS_COLUMN not in names
    if alignment is None and raw:
        alignment = "legacy"
    if alignment not in ("current", "legacy"):
        raise ConfigError(
            f"{path} is prepared, and alignment {alignment!r} does not say by which axolotl; "
            "type --alignment legacy for 0.18 and before, --alignment current for later ones"
        )
    if token_rows is None and TOKENS_COLUMN not in names:
        raise ConfigError(f"{files[0]} has no {TOKENS_COLUMN}: the tokens must be given, tokenised as for this capture")
    scaled = not raw if renormalised is None else renormalised
    columns = [logprobs_field] if raw else [logprobs_field, IDS_COLUMN]
    rows = read_rows(files, columns if token_rows is not None else [*columns, TOKENS_COLUMN])
    documents = _documents(
        _with_tokens(rows, token_rows),
        logprobs_field,
        first=1 if alignment == "legacy" else 0,
        temperature=temperature,
        over_kept=scaled or temperature != 1,
    )
    advice = f"type --alignment {'current' if alignment == 'legacy' else 'legacy'}, or give the right tokens"
    return ForeignSource(
        format="axolotl",
        documents=aligned(documents, advice) if check_alignment else documents,
        unknown=(
            "teacher",
            "tokenizer",
            "temperature",
            "alignment",
            "label log-prob where the label was not kept",
            "entropy",
            *(() if token_rows is None else ("row order",)),
            *(("tail mass",) if scaled or temperature != 1 else ()),
        ),
        known={"columns": "raw" if raw else "prepared"},
    )


def _with_tokens(
    rows: Iterator[Row], token_rows: Iterable[Sequence[int]] | None
) -> Iterator[tuple[Row, npt.NDArray[Any]]]:
    """Each row with its tokens: its own, or the next of those given."""
    if token_rows is None:
        for row in rows:
            yield row, row.vector(TOKENS_COLUMN)
        return
    given = iter(token_rows)
    where, count = "the first row", 0
    for count, row in enumerate(rows, start=1):
        where = row.where
        tokens = next(given, None)
        if tokens is None:
            raise DatasetError(f"{where}: found {count - 1} rows of tokens, expected one for every row; give them all")
        yield row, np.asarray(tokens, np.int64)
    if next(given, None) is not None:
        raise DatasetError(f"{where} is the last of {count} rows, but more rows of tokens were given; give its own")


def _documents(
    rows: Iterator[tuple[Row, npt.NDArray[Any]]], field: str, *, first: int, temperature: float, over_kept: bool
) -> Iterator[ForeignDocument]:
    """`first` is the row that is about token 1, where there are as many rows as tokens."""
    for row, tokens in rows:
        if len(tokens) < 2:
            continue
        ids, log_probs = _entries(row, field)
        missing = len(tokens) - len(ids)
        if missing < 0:
            raise DatasetError(
                f"{row.where}: found {len(ids)} rows of targets for {len(tokens)} tokens, expected at most as many; "
                "give the tokens of this capture"
            )
        ids = np.pad(ids, ((missing, 0), (0, 0)))
        log_probs = np.pad(log_probs, ((missing, 0), (0, 0)), constant_values=-np.inf)
        about = slice(first, first + len(tokens) - 1)  # the one shift
        if over_kept:
            log_probs = log_probs * temperature  # p_1 is p_T to the power T, scaled
            total = log_sum_exp(log_probs)
            log_probs -= np.where(np.isneginf(total), 0, total)[:, None]
        yield foreign_document(tokens, ids[about], log_probs[about], row.where)


def _entries(row: Row, field: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """A row's ids and log-probs, [rows, k] with k the longest of its lists, -inf where a list has no more."""
    values, lengths = row.lists(field)
    if IDS_COLUMN in row.cells:
        ids, id_lengths = row.lists(IDS_COLUMN)
        if lengths.shape != id_lengths.shape or (lengths != id_lengths).any():
            raise DatasetError(f"{row.where}: {IDS_COLUMN} and {field} differ in shape; leave this row out")
    else:
        ids, values = _split(values, row.where, field)
    k = int(lengths.max(initial=0))
    if k > _MAX_K or len(lengths) * k > 16 * max(int(lengths.sum()), 1 << 16):
        raise DatasetError(f"{row.where}: {field} has a list of {k} entries, expected about as many at each token")
    used = np.arange(k) < lengths[:, None]
    all_ids, log_probs = np.zeros(used.shape, np.int64), np.full(used.shape, -np.inf)
    all_ids[used] = row.numbers(ids, IDS_COLUMN, "iu")
    log_probs[used] = row.numbers(values, field, "f")
    return all_ids, np.where(log_probs < _PADDING, -np.inf, log_probs)


def _split(entries: Any, where: str, field: str) -> tuple[Any, Any]:
    """Arrow arrays of ids and of log-probs from one of {"token": "token_id:N", "logprob"}."""
    import pyarrow
    import pyarrow.compute as compute

    kind = entries.type
    if not pyarrow.types.is_struct(kind) or not {"token", "logprob"} <= {kind.field(i).name for i in range(len(kind))}:
        raise DatasetError(
            f"{where}: {field} holds {kind}, expected {{token, logprob}}, or {IDS_COLUMN} beside it; "
            "type --logprobs-field with the column of log-probs"
        )
    tokens, log_probs = entries.field("token"), entries.field("logprob")
    text = pyarrow.types.is_string(tokens.type) or pyarrow.types.is_large_string(tokens.type)
    pattern = f"^{_TOKEN}[0-9]{{1,10}}$"
    if not text or entries.null_count or not compute.all(compute.match_substring_regex(tokens, pattern)).as_py():
        if len(tokens):
            raise DatasetError(f"{where}: {field} has a token that is not {_TOKEN}N; capture with token ids")
        return pyarrow.array([], pyarrow.int64()), log_probs
    return compute.utf8_slice_codeunits(tokens, len(_TOKEN)).cast(pyarrow.int64()), log_probs
