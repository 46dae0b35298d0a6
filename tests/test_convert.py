"""A store in another kind is the same store, whatever happens on the way."""

import os
import zipfile
from pathlib import Path

import pytest

from logitstore import plan
from logitstore.errors import ConfigError, CorruptStoreError, IncompatibleStoreError, StoreFormatError, StoreWriteError
from logitstore.merge import convert
from logitstore.replaced import replaced
from logitstore.store import create_store, open_store
from logitstore.target_store import write_all
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.kills import drive
from tests.stores import VOCABULARY, contents, manifest, records, shard_folder, small_store

SUFFIXES = ("zarr", "zip", "lmdb")
LENGTHS = (7, 2, 60, 40)
FIDELITY = {"positions": 92, "documents": 12}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plan, "SHARD_POSITIONS", 100)
    store = small_store(tmp_path / "a.zarr", 3, LENGTHS)
    store.save_index()
    store.save_fidelity(FIDELITY)
    return tmp_path / "a.zarr"


def held(path: Path) -> dict[bytes, bytes]:
    """Every record of a store, by key."""
    store = open_store(path)
    documents = [store.record(number) for number in range(len(store))]
    return {document.key: document.token_ids.tobytes() + document.records.tobytes() for document in documents}


@pytest.mark.parametrize("first", SUFFIXES)
@pytest.mark.parametrize("second", SUFFIXES)
def test_each_kind_becomes_each_other_and_holds_the_same(source: Path, first: str, second: str) -> None:
    one, two = source.with_name(f"one.{first}"), source.with_name(f"two.{second}")
    assert convert(source, one, quiet=True).documents == 12
    report = convert(one, two, quiet=True)
    assert (report.documents, report.positions) == (12, open_store(source).positions)
    assert held(two) == held(source) and open_store(two).fidelity == FIDELITY
    assert open_store(two).manifest == open_store(source).manifest
    assert open_store(two).vocabulary == VOCABULARY
    assert verify(two, quiet=True).problems == []
    assert [path.name for path in source.parent.iterdir() if path.name.startswith(".")] == []


def test_typed_again_it_changes_nothing(source: Path) -> None:
    for suffix in SUFFIXES:
        out = source.with_name(f"b.{suffix}")
        convert(source, out, quiet=True)
        before = out.read_bytes() if out.is_file() else contents(out)
        convert(source, out, quiet=True)
        assert (out.read_bytes() if out.is_file() else contents(out)) == before


def test_shards_are_cut_anew_and_no_more_than_one_is_held(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(source.with_name("b.zarr"), manifest(), VOCABULARY)
    given: list[int] = []
    shards: list[int] = []
    write = ZarrStore.write_documents

    def counted(self: ZarrStore, documents: object, writer: str = "") -> None:
        shards.append(len(given))
        write(self, documents, writer)  # type: ignore[arg-type]

    monkeypatch.setattr(ZarrStore, "write_documents", counted)
    write_all((given.append(1) or d for d in records([41] * 7)), store, "convert")  # type: ignore[func-returns-value]
    assert shards == [3, 6, 7]
    assert [store.shard(name).entry.documents for name in store.shard_names] in ([3, 3, 1], [3, 1, 3], [1, 3, 3])


def test_a_zip_file_is_the_same_bytes_each_time_and_nothing_in_it_is_compressed(source: Path) -> None:
    one, two = source.with_name("one.zip"), source.with_name("two.zip")
    for out in (one, two):
        convert(source, out, quiet=True)
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert archive.testzip() is None
        assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == sorted(archive.namelist())
        archive.extractall(source.with_name("out.zarr"))
    assert verify(source.with_name("out.zarr"), quiet=True).problems == []


def test_a_folder_that_is_there_is_added_to(source: Path) -> None:
    out = source.with_name("b.zarr")
    other = create_store(out, manifest(), VOCABULARY)
    assert isinstance(other, ZarrStore)
    other.write_documents(records([9, 9], seed=50))
    assert convert(source, out, quiet=True).documents == 14
    assert open_store(out).fidelity is None  # it was measured of 12


def refused(source: Path, out: Path, kind: type[Exception], says: str) -> None:
    before = contents(source.parent)
    with pytest.raises(kind, match=says) as raised:
        convert(source, out, quiet=True)
    assert "\n" not in str(raised.value)
    assert {k: v for k, v in contents(source.parent).items() if not k.endswith("-lock")} == before


def test_what_cannot_be_written_is_refused_and_nothing_is_made(source: Path) -> None:
    other = source.with_name("other.zarr")
    create_store(other, manifest("top-k:4"), VOCABULARY)
    (source.parent / "bare.zarr").mkdir()
    (source.parent / "text.zip").write_text("no zip file")
    (source.parent / "text.lmdb").write_text("no lmdb file")
    few = source.with_name("few.zip")
    small_store(source.with_name("few.zarr"), 1)
    convert(source.with_name("few.zarr"), few, quiet=True)
    for name, kind, says in (
        ("other.zarr", IncompatibleStoreError, r"other.zarr was built with selection top-k:4.*: type another OUT$"),
        ("bare.zarr", StoreFormatError, "is not a store"),
        ("text.zip", StoreFormatError, "is a file, a store is"),
        ("text.lmdb", CorruptStoreError, "text.lmdb cannot be read"),
        ("few.zip", ConfigError, r"lacks 10 of the documents, and a zip file cannot be added to"),
        ("b.tar", ConfigError, r"type a path that ends in .zarr, .zip, .lmdb"),
        ("a.zarr", ConfigError, r"is to be read and to be written"),
        ("a.zarr/b.zarr", ConfigError, r"lies inside"),
    ):
        refused(source, source.parent / name, kind, says)


def test_a_path_that_leads_out_of_the_store_in_which_one_stands_is_outside(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source)
    convert(".", Path("../b.zarr"), quiet=True)
    assert held(source.with_name("b.zarr")) == held(source)
    with pytest.raises(ConfigError, match="lies inside"):
        convert(source.with_name("b.zarr"), Path("c.zarr"), quiet=True)


def test_a_damaged_source_ends_it_and_once_restored_it_goes_on(source: Path) -> None:
    store = open_store(source)
    assert isinstance(store, ZarrStore)
    (file,) = shard_folder(store, 2).glob("entries-0/c/0/0")
    data = file.read_bytes()
    for suffix in SUFFIXES:
        out = source.with_name(f"b.{suffix}")
        file.write_bytes(data[:-1])
        with pytest.raises(CorruptStoreError):
            convert(source, out, quiet=True)
        assert suffix != "zip" or not out.exists()
        file.write_bytes(data)
        convert(source, out, quiet=True)
        assert held(out) == held(source)


def test_two_that_write_one_file_are_told_apart(tmp_path: Path) -> None:
    with replaced(tmp_path / "b.zip") as file:
        file.write(b"whole")
        with pytest.raises(StoreWriteError, match="another process is writing"), replaced(tmp_path / "b.zip"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["b.zip"]
    with pytest.raises(KeyError), replaced(tmp_path / "b.zip") as file:
        file.write(b"half")
        raise KeyError
    assert contents(tmp_path) == {"b.zip": b"whole"}


@pytest.mark.parametrize("folder", [".", "/", "tests"])
def test_a_folder_is_no_file_to_write(folder: str) -> None:
    with pytest.raises(StoreWriteError, match="is a folder, expected a file"), replaced(Path(folder)):
        pass


def test_a_link_stays_one_and_a_device_is_no_file_to_write(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with replaced(tmp_path / "link") as file:
        file.write(b"whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"whole"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreWriteError, match="is no regular file"), replaced(tmp_path / "pipe"):
        pass


def test_a_zip_file_that_another_command_has_begun_is_begun_anew(source: Path) -> None:
    other = create_store(source.with_name(".unzipped-b.zip"), manifest(), VOCABULARY)
    assert isinstance(other, ZarrStore)
    other.write_documents(records([9], seed=50))
    assert convert(source, source.with_name("b.zip"), quiet=True).documents == 12


KILLS = """
from logitstore.merge import convert
from tests.stores import small_store

small_store(folder / "a.zarr", 3, (60, 40, 30)).save_index()

def act(trial):
    convert(folder / "a.zarr", trial / "b.KIND", quiet=True)

def done(trial):
    if "KIND" == "lmdb":  # pages tell in which transactions they were written: so by what it holds, in its order
        finish(forked(lambda: convert(trial / "b.lmdb", trial / "back.zarr", quiet=True)))
    return {name: data for name, data in contents(trial).items() if "b.lmdb" not in name}

run_killed(lambda trial: trial.mkdir(), act, done)
"""


@pytest.mark.parametrize("kind", SUFFIXES)
def test_killed_at_20_random_moments_and_typed_again_it_ends_with_the_same_bytes(kind: str) -> None:
    drive(KILLS.replace("KIND", kind))
