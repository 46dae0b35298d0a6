import json
from pathlib import Path
from typing import Any

import pytest

from logitstore.documents import Document, format_of, read_documents
from logitstore.errors import ConfigError, DatasetError
from logitstore.sequences import tokenize
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face datasets without network, and with its cache in tmp_path."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_every_format_is_read_in_order_with_its_place(tmp_path: Path) -> None:
    rows = [{"text": "Où?"}, {"prompt": "2+2=", "completion": "4"}, {"messages": TURNS, "tools": None}]
    documents = list(read_documents(write_lines(tmp_path / "a.jsonl", rows)))
    assert documents == [Document(row, f"a.jsonl:{line}") for line, row in enumerate(rows, start=1)]
    assert [format_of(document.row) for document in documents] == ["text", "completion", "messages"]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}')
    assert [document.where for document in read_documents(str(path))] == ["a.json:1", "a.json:4"]


def test_parquet_rows_are_the_same_across_row_groups_and_batches(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "extra": i} for i in range(2500)]
    documents = list(read_documents(write_parquet(tmp_path / "a.parquet", rows, row_group_size=700)))
    assert len(documents) == 2500
    assert documents[-1] == Document({"messages": TURNS}, "a.parquet row 2499")


def test_a_file_is_read_only_as_far_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nnever parsed\n', encoding="utf-8")
    assert [document.row["text"] for document in read_documents(str(path), limit=2)] == ["one", "two"]


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit is 0, expected at least 1; type --limit 100"):
        read_documents(write_lines(tmp_path / "a.jsonl", [{"text": "one"}]), limit=0)


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "train"}])
    write_lines(tmp_path / "valid.jsonl", [{"text": "valid"}])
    write_parquet(tmp_path / "test.parquet", [{"text": "test"}])
    for split in ("train", "valid", "test"):
        (document,) = read_documents(str(tmp_path), split=split)
        assert document.row == {"text": split}


def test_a_folder_without_the_split_never_gives_another(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "train"}])
    says = r"holds train\.jsonl but neither valid\.jsonl nor valid\.parquet; add one, or type the name of another split"
    with pytest.raises(DatasetError, match=says):
        read_documents(str(tmp_path), split="valid")
    with pytest.raises(DatasetError, match="is one file and has no split 'valid'"):
        read_documents(str(tmp_path / "train.jsonl"), split="valid")


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "./none", "~/none-at-all"])
def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"none.* does not exist; expected a \.jsonl or \.parquet file"):
        read_documents(name)


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"found a file of type '\.csv', expected \.jsonl, \.json or \.parquet"):
        read_documents(str(tmp_path / "a.csv"))


def test_an_empty_dataset_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n \n", encoding="utf-8")
    filled = write_parquet(tmp_path / "filled.parquet", [{"text": "one"}])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(filled).slice(0, 0), tmp_path / "empty.parquet")
    for name in ("blank.jsonl", "empty.parquet"):
        with pytest.raises(DatasetError, match="no rows; expected at least one"):
            read_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', r"a\.jsonl:3: not valid JSON"),
        (b"[" * 100_000, r"a\.jsonl:3: not valid JSON"),
        (b"1" * 5_000, r"a\.jsonl:3: not valid JSON"),
        (b'["one"]', r"a\.jsonl:3: found a list that starts with a string, expected one JSON object per line"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: byte 10 of the line is not UTF-8"),
        (b'{"text": "\\ud83d"}', r"a\.jsonl:3: found a lone surrogate"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n\n' + line + b"\n")
    documents = read_documents(str(path))
    assert next(documents).row == {"text": "\N{GRINNING FACE}"}
    with pytest.raises(DatasetError, match=message) as error:
        next(documents)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a", "id": 3}, r'found the fields txt, id; expected \{"text"\}, \{"prompt", "completion"\} or'),
        ({"prompt": "a"}, "found the fields prompt; expected"),
        ({"text": None}, r"found the fields text \(null\); expected"),
        ({}, r"found the fields \(none\); expected"),
        ({"text": 3}, "text is a number, expected a string"),
        (
            {"text": "", "prompt": "a", "completion": ["b"]},
            "completion is a list that starts with a string, expected a",
        ),
        ({"messages": "hello"}, "messages is a string, expected a list"),
        ({"messages": []}, "messages is an empty list, expected a list of one object or more"),
        ({"messages": ["hello"]}, "messages is a list that starts with a string, expected a list"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role is null or missing, expected a string"),
        ({"messages": [*TURNS, {"role": "user", "content": True}]}, r"messages\[2\]\.content is a boolean"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\]\.content is null or missing"),
        ({"messages": TURNS, "tools": "[]"}, "tools is a string, expected a list of objects"),
    ],
)
def test_a_row_of_no_format_tells_place_found_and_expected(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: " + message):
        read_documents(write_lines(tmp_path / "a.jsonl", [row]))


def test_tool_calls_and_lists_of_parts_are_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Add."}]}
    row = {"messages": [parts, call], "tools": [{"type": "function"}]}
    (document,) = read_documents(write_lines(tmp_path / "a.jsonl", [row]))
    assert document.row == row


@pytest.mark.usefixtures("offline")
def test_tool_calls_of_other_rows_leave_no_nulls_in_a_table(tmp_path: Path) -> None:
    import datasets

    def calling(name: str, **arguments: Any) -> dict[str, Any]:
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": name, "arguments": arguments}]}
        schema = {field: {"type": "string"} for field in arguments}
        return {"messages": [TURNS[0], call], "tools": [{"name": name, "properties": schema}]}

    rows = [calling("weather", city="Paris"), calling("add", a=1, b=[2]), {"messages": TURNS, "tools": None}]
    parquet = write_parquet(tmp_path / "a.parquet", rows)
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "disk")
    for dataset in (parquet, str(tmp_path / "disk")):
        assert [document.row for document in read_documents(dataset)] == rows


def test_a_parquet_file_of_no_format_names_all_its_fields(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "2+2=", "answer": "4"}])
    with pytest.raises(DatasetError, match=r"a\.parquet row 0: found the fields prompt, answer; expected"):
        read_documents(path)


@pytest.mark.parametrize("damage", ["cut", "middle", "text"])
def test_a_broken_parquet_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = Path(write_parquet(tmp_path / "a.parquet", [{"text": "one " * i} for i in range(500)]))
    whole = path.read_bytes()
    broken = {"cut": whole[:-20], "middle": whole[:10] + bytes(300) + whole[310:], "text": b'{"text": "one"}\n'}
    path.write_bytes(broken[damage])
    with pytest.raises(DatasetError, match=r"a\.parquet is not a whole Parquet file") as error:
        list(read_documents(str(path)))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("offline")
def test_another_local_folder_goes_through_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    write_lines(folder / "train-00000.jsonl", [{"messages": TURNS, "id": i} for i in range(3)])
    write_lines(folder / "test-00000.jsonl", [{"messages": TURNS, "id": 3}])
    documents = list(read_documents(str(folder)))
    assert documents[2] == Document({"messages": TURNS}, f"{folder}[train] row 2")
    assert len(documents) == 3
    assert len(list(read_documents(str(folder), split="test"))) == 1


@pytest.mark.usefixtures("offline")
def test_a_dataset_that_was_saved_to_disk_is_read_as_its_own_train_split(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": text, "extra": 1} for text in ("one", "two", "three")]
    datasets.Dataset.from_list(rows).filter(lambda row: row["text"] != "two").save_to_disk(tmp_path / "saved")
    documents = list(read_documents(str(tmp_path / "saved")))
    assert [document.row for document in documents] == [{"text": "one"}, {"text": "three"}]
    with pytest.raises(
        DatasetError, match=r"saved was saved as one dataset and has no split 'valid'; leave --split out"
    ):
        read_documents(str(tmp_path / "saved"), split="valid")


def test_a_folder_of_all_sorts_of_things_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.documents.MOST_FILES", 3)
    for name in "abc":
        (tmp_path / name).write_text("{}")
    with pytest.raises(DatasetError, match=r"has no train\.jsonl or train\.parquet, and too many files"):
        read_documents(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_what_hugging_face_cannot_load_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    write_lines(folder / "train-00000.jsonl", [{"text": "one"}])
    for dataset, split in (
        ("no-such-org/no-such-name", "train"),
        (str(folder), "valid"),
        (str(tmp_path / "e"), "train"),
    ):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(DatasetError, match=f"split '{split}', is no file here and Hugging Face") as error:
            read_documents(dataset, split=split)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_asked_for_are_read_and_carried_by_the_sequences(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "One and two.", "right": i % 2 == 0, "domain": "ab"[i % 2], "extra": i} for i in range(3)]
    path = tmp_path / f"a.{kind}"
    file = write_parquet(path, rows) if kind == "parquet" else write_lines(path, rows)
    names = ("right", "domain")
    documents = list(read_documents(file, columns=names))
    assert [d.row["right"] for d in documents] == [True, False, True]
    assert kind == "jsonl" or "extra" not in documents[0].row
    found = list(tokenize(documents, tiny_tokenizer(), 64, columns=names))
    assert [s.columns for s in found] == [{name: row[name] for name in names} for row in rows]
    assert all(s.columns == {} for s in tokenize(documents, tiny_tokenizer(), 64))
    with pytest.raises(DatasetError, match=r"a\.\w+(:1| row 0): has no column 'rihgt', .* did you mean 'right'\?"):
        list(read_documents(file, columns=["rihgt"]))
    with pytest.raises(DatasetError, match=r"has no column 'xyz', .*; it has text, right, domain, extra"):
        list(read_documents(file, columns=["xyz"]))
