import tracemalloc
from pathlib import Path

import pytest

from logitstore.errors import CorruptStoreError
from logitstore.files import LocalFiles
from logitstore.sealed import (
    GROUP,
    MOST_JSON_BYTES,
    PIECE,
    are_file_entries,
    file_entries,
    file_problems,
    read_group,
    seal_group,
    unseal_group,
)

GOLDEN = b"""{
 "attributes": {
  "a": 1,
  "digest": "1120dd21b96b05ae86665eecf59ecbaf"
 },
 "node_type": "group",
 "zarr_format": 3
}
"""


def test_a_sealed_group_is_the_golden_bytes() -> None:
    assert seal_group({"a": 1}) == GOLDEN


def test_attributes_come_back() -> None:
    attributes = {"text": "é\n\"'", "numbers": [1, -2.5, 1e300], "nothing": None, "nested": {"b": {}, "a": [True]}}
    assert unseal_group(seal_group(attributes), Path("x")) == attributes


def test_any_changed_added_or_missing_byte_is_noticed() -> None:
    for at in range(len(GOLDEN)):
        for changed in (GOLDEN[at] ^ 1, GOLDEN[at] ^ 0x20, 0x20):
            if changed != GOLDEN[at]:
                with pytest.raises(CorruptStoreError, match="is damaged"):
                    unseal_group(GOLDEN[:at] + bytes([changed]) + GOLDEN[at + 1 :], Path("x"))
        with pytest.raises(CorruptStoreError, match="is damaged"):
            unseal_group(GOLDEN[:at], Path("x"))
    with pytest.raises(CorruptStoreError, match="is damaged"):
        unseal_group(GOLDEN + b" ", Path("x"))


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b'{"attributes": 3}', b'{"attributes": {}}', b"\xff", b"[" * 10**6])
def test_what_is_no_sealed_group_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptStoreError, match="is damaged"):
        unseal_group(data, Path("x"))


def test_files_are_named_with_size_and_digest_but_for_hidden_ones_and_the_group_itself(tmp_path: Path) -> None:
    for name, data in {"zarr.json": b"{}", "a/zarr.json": b"{}", "a/c": b"abc", ".x": b"", ".p/y": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    entries = file_entries(tmp_path)
    assert set(entries) == {"a/c", "a/zarr.json"} and set(LocalFiles(tmp_path).names()) == {"zarr.json", *entries}
    assert entries["a/c"] == {"bytes": 3, "digest": "cf4ab791c62b8d2b2109c90275287816"}  # b2sum -l 128


def test_files_are_named_a_piece_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8 * PIECE))
    tracemalloc.start()
    file_entries(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * PIECE


def test_a_file_that_changed_grew_or_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("changed", "grown", "gone", "same"):
        (tmp_path / name).write_bytes(name.encode())
    entries = file_entries(tmp_path)
    (tmp_path / "changed").write_bytes(b"Changed")
    (tmp_path / "grown").write_bytes(b"grown ")
    (tmp_path / "gone").unlink()
    problems = {
        problem.file: problem.fault for problem in file_problems(LocalFiles(tmp_path.parent), tmp_path.name, entries)
    }
    assert set(problems) == {"changed", "grown", "gone"}
    assert problems["grown"] == "holds 6 bytes instead of 5" and "No such file" in problems["gone"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"a": 1},
        {"a": {"bytes": "1", "digest": ""}},
        {"a": {"bytes": 1}},
        {"/etc/hosts": {"bytes": 1, "digest": ""}},
        {"a/../../b": {"bytes": 1, "digest": ""}},
    ],
)
def test_what_is_no_list_of_files_is_not_taken_for_one(value: object) -> None:
    assert not are_file_entries(value)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"attributes":' * 100_000, b'{"attributes": {"x": "' + b"x" * (100 << 20) + b'"}}']
)
def test_a_group_that_is_too_deep_or_too_long_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(CorruptStoreError, match=r"^zarr\.json is damaged[^\n]*$"):
        unseal_group(data, GROUP)


def test_of_a_group_that_is_too_long_no_more_is_read_than_tells_so(tmp_path: Path) -> None:
    with (tmp_path / GROUP).open("wb") as file:
        file.truncate(1 << 40)  # of which nothing lies on disk
    assert len(read_group(LocalFiles(tmp_path))) == MOST_JSON_BYTES + 1
