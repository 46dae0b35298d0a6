"""What a store writes, others read; what is not as it was written is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from logitstore.durable import alone_in
from logitstore.errors import (
    CorruptStoreError,
    IncompatibleStoreError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
)
from logitstore.key import document_key
from logitstore.sealed import GROUP, seal_group
from logitstore.store import open_store
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, contents, manifest, records, shard_folder, small_store, tokens


def reseal(path: Path, **changes: object) -> None:
    """Change a sealed group as one who knows how to seal it."""
    attributes = json.loads(path.read_bytes())["attributes"]
    del attributes["digest"]
    path.write_bytes(seal_group(attributes | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_document_that_was_written_is_found_and_any_other_is_a_miss(tmp_path: Path) -> None:
    documents = records([7, 2, 30])
    store = small_store(tmp_path / "s", shards=1)
    for document in documents:
        targets = store.get(document.token_ids)
        expected = store.manifest.recipe.read(document.records)
        assert targets is not None and len(targets) == len(document.token_ids) - 1
        assert (targets.ids == expected.ids).all() and (targets.weights == expected.weights).all()
    assert store.get(tokens(99, 7)) is None and store.get(documents[0].token_ids[:-1]) is None


@pytest.mark.parametrize("form", ["<i4", ">i8", "<u2", "list"])
def test_a_document_is_found_whatever_its_ids_are_kept_in(tmp_path: Path, form: str) -> None:
    store = small_store(tmp_path / "s")
    ids = tokens(0, 7)
    assert store.get(ids.tolist() if form == "list" else ids.astype(form)) is not None


def test_documents_are_numbered_across_shards_and_counted(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=3)
    assert (len(store), store.positions, store.shard_count) == (9, 3 * 36, 3)
    lengths = sorted(len(store.document(n)[0]) for n in range(9))
    assert lengths == sorted([7, 2, 30] * 3)
    for number in (-1, 9):
        with pytest.raises(IndexError):
            store.document(number)


def test_the_tokens_of_a_document_come_back_with_its_targets(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    for number in range(len(store)):
        token_ids, targets = store.document(number)
        again = store.get(token_ids)
        assert again is not None and (again.ids == targets.ids).all() and len(token_ids) == len(targets) + 1


def test_a_document_that_two_shards_hold_is_one_document(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    store.write_documents(records([7, 2]))
    assert (len(store), store.shard_count) == (3, 2) and len(open_store(tmp_path / "s")) == 3


def test_the_same_shard_written_again_changes_nothing(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    before = contents(tmp_path / "s")
    store.write_documents(records([7, 2, 30]))
    assert contents(tmp_path / "s") == before


def test_an_open_store_sees_the_shards_of_others_after_a_refresh(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    reader = open_store(tmp_path / "s")
    store.write_documents(records([5], seed=4))
    assert len(reader) == 3
    reader.refresh()
    assert len(reader) == 4 and reader.get(tokens(400, 5)) is not None


def test_the_vocabulary_comes_back(tmp_path: Path) -> None:
    assert small_store(tmp_path / "s").vocabulary == VOCABULARY


@pytest.mark.parametrize("indexed", [False, True])
def test_a_document_in_two_shards_counts_once(tmp_path: Path, *, indexed: bool) -> None:
    store = small_store(tmp_path / "s", shards=1)
    store.write_documents([*records([7, 2, 30]), *records([5], seed=9)])
    if indexed:
        store.save_index()
    reader = open_store(tmp_path / "s")
    assert (len(reader), reader.positions) == (4, 36 + 4)


def test_opening_reads_documents_and_no_entries(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    for name in ("entries-0", "positions", "ranks", "blocks"):
        shutil.rmtree(shard_folder(store) / name)
    reader = open_store(tmp_path / "s")
    assert document_key(tokens(0, 7)) in reader and (len(reader), reader.positions) == (3, 36)
    with pytest.raises(CorruptStoreError, match=r"(entries-0|ranks|positions|blocks)/"):
        reader.get(tokens(0, 7))


@pytest.mark.parametrize("file", ["entries-0/c/0/0", "positions/c/0/0"])
def test_a_file_lost_while_the_store_is_open_is_never_read_as_other_numbers(tmp_path: Path, file: str) -> None:
    store = small_store(tmp_path / "s", shards=1)
    before = [store.document(n)[1] for n in range(3)]
    (shard_folder(store) / file).unlink()
    for number, expected in enumerate(before):  # the open file is still there for who has it open
        found = store.document(number)[1]
        assert (found.ids == expected.ids).all() and (found.weights == expected.weights).all()
    with pytest.raises(CorruptStoreError, match=f"{file}: cannot be read"):
        open_store(tmp_path / "s").document(0)


def test_a_file_cut_while_the_store_is_open_is_never_read_as_numbers(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1, lengths=(2_100, 30))
    assert store.get(tokens(1, 30)) is not None
    (shard_folder(store) / "entries-0" / "c" / "0" / "0").write_bytes(b"")
    with pytest.raises(CorruptStoreError, match="entries-0: cannot be read"):
        store.get(tokens(0, 2_100))


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ("nothing", StoreNotFoundError, "there is no store at .*type `logitstore build"),
        ("file", StoreFormatError, "is a file, a store is a folder or a zip file of one .*; type the path"),
        ("empty folder", StoreFormatError, r"is not a store: it has no zarr\.json; type the path"),
        ("zarr group", StoreFormatError, "is a Zarr group, but not a logitstore; type the path"),
        ("zarr array", StoreFormatError, "is a Zarr group, but not a logitstore; type the path"),
    ],
)
def test_what_is_no_store_is_refused_with_one_line(
    tmp_path: Path, found: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "s"
    match found:
        case "file":
            path.touch()
        case "empty folder":
            path.mkdir()
        case "zarr group":
            zarr.create_group(path, attributes={"a": 1})
        case "zarr array":
            zarr.create_array(path, shape=(3,), dtype="u1")
    with pytest.raises(error, match=message) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)


def test_a_store_of_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    newer = manifest().to_json() | {"format_version": 2, "teachers": []}
    reseal(tmp_path / "s" / GROUP, logitstore=newer)
    with pytest.raises(StoreFormatError, match=r"s has format 2, this logitstore reads format 1; type `pip install"):
        open_store(tmp_path / "s")


@pytest.mark.parametrize(
    "changes",
    [
        {"logitstore": 3},
        {"logitstore": manifest().to_json() | {"teacher": None}},
        {"logitstore": manifest().to_json() | {"recipe": {"selection": "threshold:4"}}},
        {"logitstore": manifest().to_json() | {"recipe": manifest().to_json()["recipe"] | {"selection": "best:4"}}},
        {"logitstore": manifest().to_json() | {"recipe": manifest().to_json()["recipe"] | {"temperatures": ["x"]}}},
        {"files": 3},
        {"files": {"../x": {"bytes": 1, "digest": ""}}},
        {"special_ids": ["a"]},
        {"special_ids": 1},
    ],
)
def test_a_sealed_root_that_makes_no_sense_is_refused_with_one_line(tmp_path: Path, changes: dict[str, object]) -> None:
    small_store(tmp_path / "s")
    reseal(tmp_path / "s" / GROUP, **changes)
    with pytest.raises(StoreFormatError) as caught:
        open_store(tmp_path / "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"documents": "3"},
        {"documents": -3},
        {"documents": 4},
        {"positions": 10**18},
        {"files": None},
        {"files": {}},
        {"unheard": "of"},
    ],
)
def test_a_sealed_entry_that_makes_no_sense_is_corrupt(tmp_path: Path, changes: dict[str, object]) -> None:
    shard = shard_folder(small_store(tmp_path / "s", shards=1))
    reseal(shard / GROUP, **changes)
    with pytest.raises(CorruptStoreError) as caught:
        open_store(tmp_path / "s").get(tokens(0, 7))
    assert shard.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    small_store(tmp_path / "s", shards=1)
    other = ZarrStore.create(tmp_path / "other", manifest(seed=1), VOCABULARY)
    other.write_documents(records([5], seed=9, recipe=other.manifest.recipe))
    shard = shard_folder(other)
    shutil.copytree(shard, tmp_path / "s" / "shards" / shard.name)
    with pytest.raises(IncompatibleStoreError, match="move that folder out"):
        open_store(tmp_path / "s")


def test_a_store_without_its_root_is_damaged_and_not_another_thing(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    for content in (b"", None):
        (tmp_path / "s" / GROUP).unlink() if content is None else (tmp_path / "s" / GROUP).write_bytes(content)
        with pytest.raises(CorruptStoreError, match=r"s/zarr\.json is damaged"):
            open_store(tmp_path / "s")


CREATE = """
import sys
from pathlib import Path
from tests.stores import VOCABULARY, manifest
from logitstore.zarr_store import ZarrStore
print("ready", flush=True)
sys.stdin.readline()
ZarrStore.create(Path(sys.argv[1]), manifest(), VOCABULARY)
"""


def test_processes_that_create_a_store_at_once_all_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATE, str(tmp_path / "s")]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=Path(__file__).parent.parent, **options) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(open_store(tmp_path / "s")) == 0 and names(tmp_path) == ["s"]


def test_a_creation_that_was_killed_leaves_nothing_once_the_store_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".partial-s-1234" / "vocabulary").mkdir(parents=True)
    (tmp_path / ".partial-other-1234").mkdir()
    ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    assert names(tmp_path) == [".partial-other-1234", "s"]


def test_a_creation_waits_for_another_and_takes_its_store(tmp_path: Path) -> None:
    process = [sys.executable, "-c", CREATE, str(tmp_path / "s")]
    with alone_in(tmp_path) as alone:
        assert alone
        waiting = subprocess.Popen(process, cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1.5)
        assert names(tmp_path) == []
    assert waiting.wait(20) == 0 and names(tmp_path) == ["s"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreWriteError, match=r"s cannot be written: .*type the same command to go on"):
        ZarrStore.create(tmp_path / "file" / "s", manifest(), VOCABULARY)


def test_a_shard_that_cannot_be_flushed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = small_store(tmp_path / "s", shards=1)
    before = contents(tmp_path / "s")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreWriteError, match="No space left on device; nothing that was finished is lost"):
        store.write_documents(records([9], seed=5))
    assert contents(tmp_path / "s") == before and len(store) == 3


def test_what_a_killed_writer_left_is_replaced_by_its_next_shard(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    left = tmp_path / "s" / "shards" / ".partial-build"
    (left / "documents").mkdir(parents=True)
    (left / "documents" / "junk").touch()
    assert len(open_store(tmp_path / "s")) == 3
    store.write_documents(records([9], seed=5), "build")
    assert not left.exists() and len(open_store(tmp_path / "s")) == 4


def test_what_a_kill_left_of_a_measurement_goes_with_the_next_one(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    (tmp_path / "s" / "fidelity").mkdir()
    (tmp_path / "s" / "fidelity" / ".partial-1234").write_text("{")
    store.save_fidelity({"documents": 3})
    assert names(tmp_path / "s" / "fidelity") == [GROUP] and open_store(tmp_path / "s").fidelity == {"documents": 3}


def test_the_size_of_a_store_is_told_while_its_index_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path / "s", shards=1)
    there = store.files.names()
    monkeypatch.setattr(store.files, "names", lambda: [*there, "index/keys/c/0"])
    assert store.disk_bytes == sum(map(len, contents(tmp_path / "s").values()))
