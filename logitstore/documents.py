"""Dataset to rows: the first room of the flow, in the formats of mlx-lm.

A dataset is a JSON Lines file, a Parquet file, mlx-lm's folder of ``train.jsonl`` and its siblings, or whatever
`datasets.load_dataset` knows by name or folder, or `save_to_disk` has written. Files are streamed, never held in
memory. A row is checked here, once, and handed on as it is: nothing is tokenised, shuffled or repaired.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError, DatasetError, first_line

# In the order in which mlx-lm looks for them.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_EXPECTED = '{"text"}, {"prompt", "completion"} or {"messages"}'
_PARQUET_ROWS = 1024
MOST_FILES = 10_000
"""Below a folder that Hugging Face datasets is given, which looks at every one of them."""


@dataclass(frozen=True)
class Document:
    """One row of a dataset, and the place where a user finds it again.

    `where` is ``train.jsonl:17`` (lines count from 1) or ``docs.parquet row 17`` (rows count from 0, as in `datasets`).
    """

    row: Mapping[str, Any]
    where: str


def read_documents(
    dataset: str, *, split: str = "train", limit: int | None = None, columns: Sequence[str] = ()
) -> Iterator[Document]:
    """The rows of `dataset` in their order, each known to have one of the formats; the first `limit` of them if given.

    `dataset` is the path of a ``.jsonl`` (or ``.json``, one object per line) or ``.parquet`` file; a folder that holds
    ``{split}.jsonl`` or ``{split}.parquet``; else a name or folder for `datasets.load_dataset`. A file is its own
    "train" split and has no other. Blank lines are skipped, and counted in line numbers.

    Args:
        columns: fields that every row must have beside its format's; other fields may be left unread.

    Raises:
        DatasetError: the dataset is missing, empty or cannot be loaded (at once), or a row is malformed or lacks one of
            the columns (on its turn).
        ConfigError: `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1; type --limit 100, or leave it out to read all")
    documents = islice(_open(dataset, split, columns), limit)
    first = next(documents, None)
    if first is None:
        raise DatasetError(f"dataset {dataset!r}, split {split!r}: no rows; expected at least one of {_EXPECTED}")
    return chain([first], documents)


def format_of(row: Mapping[str, Any]) -> str | None:
    """The name in `FORMATS` of the first format whose fields `row` holds; None if it holds no format."""
    for name, fields in FORMATS.items():
        if all(row.get(field) is not None for field in fields):
            return name
    return None


def _open(dataset: str, split: str, columns: Sequence[str]) -> Iterator[Document]:
    """Choose the reader: by suffix for a file, by content for a folder, Hugging Face for the rest."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        if file := _split_file(path, split):
            return _read_file(file, columns)
        if train := _split_file(path, "train"):
            raise DatasetError(
                f"{path} holds {train.name} but neither {split}.jsonl nor {split}.parquet; add one, or type the "
                "name of another split"
            )
        if sum(1 for _ in islice(path.rglob("*"), MOST_FILES)) == MOST_FILES:
            raise DatasetError(f"{path} has no train.jsonl or train.parquet, and too many files to be a dataset")
        return _read_hugging_face(str(path), split, columns)
    if path.is_file() or path.suffix in (".jsonl", ".json", ".parquet"):
        if split != "train":
            raise DatasetError(f"{path} is one file and has no split {split!r}; give a folder that holds {split}.jsonl")
        return _read_file(path, columns)
    if path.is_absolute() or dataset.startswith((".", "~")):
        raise DatasetError(f"{path} does not exist; expected a .jsonl or .parquet file, or a folder with train.jsonl")
    return _read_hugging_face(dataset, split, columns)


def _split_file(folder: Path, split: str) -> Path | None:
    candidates = (folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet"))
    return next((file for file in candidates if file.is_file()), None)


def _read_file(path: Path, columns: Sequence[str]) -> Iterator[Document]:
    if not path.exists():
        raise DatasetError(f"{path} does not exist; expected a .jsonl or .parquet file, or a folder with train.jsonl")
    if path.suffix == ".parquet":
        return _read_parquet(path, columns)
    if path.suffix in (".jsonl", ".json"):
        return _read_json_lines(path, columns)
    raise DatasetError(f"{path}: found a file of type {path.suffix or 'unknown'!r}, expected .jsonl, .json or .parquet")


def _read_json_lines(path: Path, columns: Sequence[str]) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path.name}:{number}"
                    yield _checked(_parse(line, where), where, columns)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {first_line(error)}") from error


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # half of an escaped pair: valid JSON, yet no text that a tokenizer could take
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise DatasetError(f"{where}: found a lone surrogate escape such as \\ud83d, expected the pair") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not valid JSON ({first_line(error)}); expected one object per line") from error
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: found {_kind(row)}, expected one JSON object per line: {_EXPECTED}")
    return row


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            needed = _needed(file.schema_arrow.names, columns)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=needed):
                for row in batch.to_pylist():
                    where = f"{path.name} row {number}"
                    yield _checked(_without_nulls(row), where, columns)
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} is not a whole Parquet file (at row {number}): {first_line(error)}") from error


def _read_hugging_face(dataset: str, split: str, columns: Sequence[str]) -> Iterator[Document]:
    import datasets

    saved = (Path(dataset) / "state.json").is_file()  # by Dataset.save_to_disk, which knows no splits
    if saved and split != "train":
        raise DatasetError(f"{dataset} was saved as one dataset and has no split {split!r}; leave --split out")
    try:
        rows = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset, split=split)
    except Exception as error:  # network, hub, file formats and scripts: no common base short of this one
        raise DatasetError(
            f"dataset {dataset!r}, split {split!r}, is no file here and Hugging Face datasets cannot load it: "
            f"{first_line(error.__cause__ or error)}"
        ) from error
    rows = rows.select_columns(_needed(rows.column_names, columns))
    return (
        _checked(_without_nulls(row), f"{dataset}[{split}] row {number}", columns) for number, row in enumerate(rows)
    )


def _needed(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The fields worth reading: the formats' and the columns; all if something lacks, for the error to name them."""
    known = {"tools", *chain.from_iterable(FORMATS.values()), *columns}
    whole = format_of(dict.fromkeys(names, True)) and set(columns) <= set(names)
    return [name for name in names if name in known] if whole else list(names)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it was before it was a table: in one, an object also has, as nulls, the fields of all other rows'.

    A turn's content stays: it is null where the turn calls tools, and templates ask for that.
    """
    found = dict(row)
    if isinstance(turns := row.get("messages"), list):
        found["messages"] = [_filled(turn, "content") for turn in turns]
    if "tools" in row:
        found["tools"] = _filled(row["tools"])
    return found


def _filled(value: Any, *kept: str) -> Any:
    """The value without the null fields of its objects, but for those that are kept in the outermost."""
    if isinstance(value, dict):
        return {name: _filled(field) for name, field in value.items() if field is not None or name in kept}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _checked(row: Mapping[str, Any], where: str, columns: Iterable[str]) -> Document:
    """The row as a document, or a DatasetError that names the place, what was found and what was expected."""
    name = format_of(row)
    if name is None:
        found = ", ".join(field if value is not None else f"{field} (null)" for field, value in row.items())
        raise DatasetError(f"{where}: found the fields {found or '(none)'}; expected {_EXPECTED}")
    if name == "messages":
        _check_messages(row["messages"], where)
    else:
        for field in FORMATS[name]:
            if not isinstance(row[field], str):
                raise DatasetError(f"{where}: {field} is {_kind(row[field])}, expected a string")
    if not (row.get("tools") is None or _is_list_of_objects(row["tools"])):
        raise DatasetError(f"{where}: tools is {_kind(row['tools'])}, expected a list of objects")
    for column in columns:
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(row)}"
            raise DatasetError(f"{where}: has no column {column!r}, which this command reads; {hint}")
    return Document(row, where)


def _check_messages(messages: Any, where: str) -> None:
    if not _is_list_of_objects(messages) or not messages:
        raise DatasetError(f"{where}: messages is {_kind(messages)}, expected a list of one object or more")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise DatasetError(f"{where}: messages[{i}].role is {_kind(role)}, expected a string")
        called = content is None and message.get("tool_calls")
        if not (isinstance(content, str) or called or _is_list_of_objects(content)):
            raise DatasetError(
                f"{where}: messages[{i}].content is {_kind(content)}, expected a string or a list of parts"
            )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's own words."""
    if value is None:
        return "null or missing"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list that starts with {_kind(value[0])}"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
