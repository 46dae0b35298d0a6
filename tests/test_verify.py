"""Damage of any kind is named by `verify`, and never read as numbers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitstore import verify as verifying
from logitstore.chunks import pack, sharded, unpack
from logitstore.entries import Root
from logitstore.errors import StoreError, StoreFormatError, StoreNotFoundError
from logitstore.files import Files, LocalFiles
from logitstore.gc import remove_index
from logitstore.manifest import Manifest
from logitstore.saved_maps import save_vocabulary_map, saved_vocabulary_map
from logitstore.sealed import GROUP, file_entries, seal_group
from logitstore.store import open_store
from logitstore.verify import to_json, verify
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import map_vocabularies
from logitstore.zarr_store import MAP_PREFIX, ZarrStore
from tests.stores import VOCABULARY, contents, manifest, records, shard_folder, small_store, tokens
from tests.test_zarr_store import reseal

LENGTHS = (7, 2, 40)
STUDENT = Vocabulary((*VOCABULARY.tokens[:9], b"<", b"1", b">"), frozenset(), None, None)
MAP = map_vocabularies(VOCABULARY, STUDENT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = small_store(tmp_path_factory.mktemp("made") / "s", shards=2, lengths=LENGTHS)
    store.save_index()
    store.save_fidelity({"positions": 92})
    save_vocabulary_map(store, MAP)
    return store.folder


@pytest.fixture
def store(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made, tmp_path / "s")
    return tmp_path / "s"


def bad_files(path: Path) -> set[str]:
    return {problem.file for problem in verify(path, quiet=True).problems}


def read_by_number(path: Path) -> None:
    store = open_store(path)
    for number in range(len(store)):
        store.document(number)


def read_by_key(path: Path) -> None:
    store = open_store(path)
    for seed in range(2):
        for i, length in enumerate(LENGTHS):
            assert store.get(tokens(100 * seed + i, length)) is not None


READS = (read_by_number, read_by_key)


def answers(path: Path) -> list[bytes]:
    """Every number that a reader is given, by number and by key."""
    store = open_store(path)
    found = [t for n in range(len(store)) for t in (store.document(n)[1], store.get(store.token_ids(n)))]
    return [getattr(targets, name).tobytes() for targets in found for name in ("ids", "weights", "label_log_prob")]


def assert_noticed(path: Path, name: str) -> None:
    assert name in bad_files(path)
    for read in READS:
        with pytest.raises(StoreError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_store_as_it_was_written_is_good(store: Path) -> None:
    report = verify(store, quiet=True)
    assert (report.files, report.documents, report.positions, report.problems) == (len(contents(store)), 6, 92, [])
    assert to_json(report) == {"ok": True, "files": report.files, "documents": 6, "positions": 92, "problems": []}
    read_by_number(store)
    read_by_key(store)
    assert open_store(store).vocabulary


def test_one_flipped_byte_anywhere_is_named_and_never_read(store: Path) -> None:
    rng = np.random.default_rng(0)
    expected = answers(store)
    for name, data in contents(store).items():
        for at in {0, len(data) - 1, *rng.integers(0, len(data), 2).tolist()}:
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(rng.integers(8))
            (store / name).write_bytes(flipped)
            assert named(bad_files(store)) == named({name}), (name, at)
            assert_never_read(store, name, expected)
        (store / name).write_bytes(data)
    assert verify(store, quiet=True).problems == []


def named(files: set[str]) -> set[str]:
    """A damaged index is named as a whole where it is too damaged to say which of its files are."""
    return {"index" if name.startswith("index/") else name for name in files}


def assert_never_read(store: Path, name: str, expected: list[bytes]) -> None:
    """Damage of a shard or the root stops a reader; what no answer comes from may be passed over, never believed."""
    if name.startswith(("index/", "fidelity/", MAP_PREFIX)):
        try:
            assert answers(store) == expected
            if name.startswith(MAP_PREFIX):
                assert saved_vocabulary_map(open_store(store), STUDENT.fingerprint()) is None  # its group is gone
                return
            assert name.startswith("index") or open_store(store).fidelity is None
        except StoreError as error:
            assert "\n" not in str(error)
        return
    for read in READS:
        with pytest.raises(StoreError):
            read(store)


@pytest.mark.parametrize("damage", ["emptied", "deleted", "one byte shorter", "one byte longer"])
def test_a_file_that_was_cut_grown_or_lost_is_named_and_never_read(store: Path, damage: str) -> None:
    expected = answers(store)
    for name, data in contents(store).items():
        if damage == "deleted":
            (store / name).unlink()
        else:
            (store / name).write_bytes(
                {"e": b"", "s": data[:-1], "l": data + b"\0"}[damage.removeprefix("one byte ")[0]]
            )
        gone = damage == "deleted" and name in (f"fidelity/{GROUP}", f"index/{GROUP}")  # then there is none
        assert named({name}) <= named(bad_files(store)) or gone, name
        assert_never_read(store, name, expected)
        (store / name).write_bytes(data)


@pytest.mark.parametrize("array", ["documents", "blocks", "ranks", "entries-0", "positions"])
def test_two_shards_with_an_array_swapped_are_both_named(store: Path, array: str) -> None:
    first, second = sorted((store / "shards").glob("*/"))
    (first / array).rename(store / "kept")
    (second / array).rename(first / array)
    (store / "kept").rename(second / array)
    named = {Path(name).parts[1] for name in bad_files(store)}
    assert named == {first.name, second.name}
    for read in READS:
        with pytest.raises(StoreError):
            read(store)


def test_what_is_not_part_of_the_store_is_named_and_what_is_being_written_is_not(store: Path) -> None:
    shard = next((store / "shards").glob("*/"))
    strays = {
        "x",
        "shards/x",
        f"shards/{shard.name}/x",
        f"shards/{shard.name}/positions/c/1/0",
        "vocabulary/x",
        "index/x",
    }
    hidden = {".journal-build", "shards/.partial-build/ranks/zarr.json", ".partial-index-1/x", ".DS_Store"}
    for name in strays | hidden:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    assert bad_files(store) == strays


def test_every_bad_file_is_named_not_only_the_first(store: Path) -> None:
    names = [name for name in contents(store) if name.startswith("shards/") and name != f"shards/{GROUP}"]
    for name in names:
        (store / name).write_bytes(b"x")
    assert bad_files(store) >= {name for name in names if name.count("/") == 2} and len(names) > 16
    for folder in (store / "shards").glob("*/"):
        reseal_whole(folder, documents=3, positions=36)
    for name in names:
        if name.count("/") > 2:
            (store / name).write_bytes(b"y")
    assert bad_files(store) == {name for name in names if name.count("/") > 2}


def reseal_whole(shard: Path, **counts: int) -> None:
    """Seal a shard anew as one who knows how to, whatever its files hold."""
    fingerprint = manifest().fingerprint
    (shard / GROUP).write_bytes(seal_group(counts | {"fingerprint": fingerprint, "files": file_entries(shard)}))


def documents_with(change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    """Change the table of documents [3, 24] of a shard."""

    def rewrite(shard: Path) -> None:
        file = shard / "documents" / "c" / "0" / "0"
        table = unpack(file.read_bytes(), 3 * 24).reshape(3, 24).copy()
        change(table)
        file.write_bytes(pack([table.reshape(-1)]))

    return rewrite


def cell(row: int, column: int, value: int) -> Callable[[Path], None]:
    return documents_with(lambda table: table.__setitem__((row, column), value))


def array_with(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda shard: (shard / name).write_bytes(data) and None


ONES = pack([np.ones(2 * 8192, np.uint8)])
MISTAKES = {
    "key": (cell(0, 0, 7), "the key of document 0 is not the hash of its tokens"),
    "name": (cell(0, 0, 7), "the shard's name is not the hash of its keys"),
    "first token": (cell(1, 20, 5), "the key of document 1 is not the hash of its tokens"),
    "token beyond": (cell(1, 22, 5), "document 1 has a token beyond the vocabulary"),
    "length": (cell(0, 16, 8), "does not fit its arrays: .*the documents' lengths are not those of the positions"),
    "huge length": (cell(2, 19, 128), "does not fit its arrays: .*the documents' lengths are not those of"),
    "block": (array_with("blocks/c/0", pack([np.ones(8, np.uint8)])), "document 1 does not begin as they say"),
    "ranks": (array_with("ranks/c/0/0", pack([np.zeros(8, np.uint8)])), "does not fit its arrays: .*a table of ranks"),
    "entries": (array_with("entries-0/c/0/0", sharded([ONES])), "document 0 does not decode"),
    "no entries": (array_with("entries-0/c/0/0", b""), "document 0 does not decode"),
    "positions": (array_with("positions/c/0/0", sharded([ONES])), "document 0 does not decode"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_builders_own_mistake_is_found_where_every_digest_is_right(tmp_path: Path, mistake: str) -> None:
    change, fault = MISTAKES[mistake]
    shard = shard_folder(small_store(tmp_path / "s", shards=1, lengths=(7, 40, 2)))
    change(shard)
    reseal_whole(shard, documents=3, positions=46)
    problems = verify(tmp_path / "s", quiet=True).problems
    assert any(re.match(fault, problem.fault) for problem in problems), problems
    assert all("\n" not in problem.fault for problem in problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"documents": None},
        {"documents": True},
        {"documents": 10**30},
        {"positions": 1.5},
        {"fingerprint": 3},
        {"fingerprint": "e" * 32},
        {"files": [1]},
        {"files": {}},
        {"files": {"documents/\0": {"bytes": 1, "digest": ""}}},
        {"files": {"x" * 5_000: {"bytes": 1, "digest": ""}}},
        {"extra": 1},
    ],
)
def test_a_sealed_entry_of_nonsense_is_named_and_verify_goes_on(store: Path, changes: dict[str, object]) -> None:
    bad = min((store / "shards").glob("*/"))
    reseal(bad / GROUP, **changes)
    report = verify(store, quiet=True)
    assert report.problems and all(p.file.startswith(f"shards/{bad.name}/") for p in report.problems)
    assert report.documents >= 3
    with pytest.raises(StoreError):
        read_by_number(store)


@pytest.mark.parametrize("zarr_json", [b"", b"{}", b'{"zarr_format": 3, "node_type": "array"}', b"\xff\xfe", b"3"])
def test_an_array_of_nonsense_under_a_right_digest_is_named(store: Path, zarr_json: bytes) -> None:
    shard = next((store / "shards").glob("*/"))
    (shard / "positions" / GROUP).write_bytes(zarr_json)
    reseal(shard / GROUP, files=file_entries(shard))
    assert bad_files(store) == {f"shards/{shard.name}/positions/{GROUP}"}


def test_a_lost_folder_of_shards_and_an_empty_shard_are_named(store: Path) -> None:
    (store / "shards" / "empty").mkdir()
    assert_noticed(store, f"shards/empty/{GROUP}")
    shutil.rmtree(store / "shards")
    assert bad_files(store) >= {f"shards/{GROUP}"}
    with pytest.raises(StoreError, match=r"shards/zarr\.json"):
        open_store(store)


def test_the_shards_are_looked_at_even_where_the_root_is_damaged(store: Path) -> None:
    shard = next((store / "shards").glob("*/"))
    (store / GROUP).write_bytes(b"")
    (shard / "ranks" / "c" / "0" / "0").write_bytes(b"")
    assert bad_files(store) == {GROUP, f"shards/{shard.name}/ranks/c/0/0"}


def test_weights_of_any_selection_are_those_of_a_distribution(tmp_path: Path) -> None:
    for select in ("threshold:1", "threshold:300", "top-k:1", "top-k:300", "top-p:0.5:9", "random:9", "random:9:0.8"):
        made: Manifest = manifest(select)
        store = ZarrStore.create(tmp_path / select, made, VOCABULARY)
        store.write_documents(records([20, 3], recipe=made.recipe))
        assert verify(store.path, quiet=True).problems == []


@pytest.mark.parametrize("change", ["a shard", "an index", "no index", "a shard less"])
def test_what_a_writer_or_gc_changes_meanwhile_is_no_damage(
    store: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    reading = verifying.read_root

    def meanwhile(files: Files, path: Path) -> Root:  # after the first look at what is there
        writer = ZarrStore(LocalFiles(store), store)
        if change in ("a shard", "an index"):
            writer.write_documents(records([9, 300], seed=7))
        if change in ("no index", "a shard less"):
            remove_index(store)
        if change == "an index":
            writer.save_index()
        if change == "a shard less":
            shutil.rmtree(shard_folder(writer))
        return reading(files, path)

    monkeypatch.setattr(verifying, "read_root", meanwhile)
    assert verify(store, quiet=True).problems == []


def test_there_must_be_a_store_to_verify(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path / "none")
    with pytest.raises(StoreFormatError):
        verify(tmp_path)
    (tmp_path / GROUP).write_bytes(seal_group({"logitstore": "nonsense"}))
    with pytest.raises(StoreFormatError):
        verify(tmp_path)


def test_the_report_as_json_names_the_file_and_the_fault(store: Path) -> None:
    (store / "vocabulary" / "lengths" / GROUP).unlink()
    (problem,) = json.loads(json.dumps(to_json(verify(store, quiet=True))))["problems"]
    assert problem["file"] == "vocabulary/lengths/zarr.json" and "No such file" in problem["fault"]
