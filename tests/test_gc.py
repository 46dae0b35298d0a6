"""What no reader needs goes; what a running writer holds, what is in no shard yet, and what nobody knows stays."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from logitstore.catalog import Catalog
from logitstore.entries import shard_name
from logitstore.files import Files
from logitstore.gc import GcReport, gc, remove_index, without_index
from logitstore.gc import _remove as gc_remove
from logitstore.journal import ShardWriter
from logitstore.merge import convert
from logitstore.recipe import DocumentRecord
from logitstore.repair import repair
from logitstore.replaced import replaced
from logitstore.sealed import Problem
from logitstore.shard import Shard
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, contents, manifest, records, small_store
from tests.test_convert import held


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s.zarr", 2)
    made.save_index()
    made.save_fidelity({"documents": 6})
    return made


def left(path: Path, data: bytes = b"half") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def journal_of(store: ZarrStore, name: str, seed: int, *, committed: bool) -> None:
    """What a writer leaves that was killed after it had appended, or after it had written the shard."""
    journal = store.folder / f".journal-{name}"
    with pytest.raises(KeyboardInterrupt), ShardWriter(store, name) as writer:
        writer.append(records([12, 5], seed=seed))
        data = journal.read_bytes()
        if committed:
            writer.commit(list(writer.pending))
        journal.write_bytes(data)
        raise KeyboardInterrupt


def test_a_store_that_nobody_was_killed_in_stays_as_it_is(store: ZarrStore, tmp_path: Path) -> None:
    before = contents(tmp_path)
    report = gc(store.folder)
    assert (report.removed, report.kept, report.freed_bytes) == ([], [], 0)
    assert contents(tmp_path) == before


def test_what_killed_writers_left_is_listed_first_and_then_removed(store: ZarrStore, tmp_path: Path) -> None:
    journal_of(store, "build", 5, committed=True)
    before, found = contents(tmp_path), held(store.folder)
    old = left(store.folder / "fidelity" / ".partial-1")
    os.utime(old, (0, 0))
    leftovers = [
        left(store.folder / "shards" / ".partial-build" / "documents" / "c"),
        left(store.folder / "shards" / ".partial-other" / "documents" / "c"),
        left(store.folder / ".partial-index-12" / "keys"),
        left(tmp_path / ".partial-s.zarr-12" / "zarr.json"),
        old,
    ]
    with_leftovers = contents(tmp_path)
    names = {
        ".partial-build",
        ".partial-other",
        ".journal-build",
        ".partial-index-12",
        ".partial-s.zarr-12",
        ".partial-1",
    }
    listed = gc(store.folder, dry_run=True)
    assert {leftover.path.name for leftover in listed.removed} == names
    assert contents(tmp_path) == with_leftovers
    report = gc(store.folder)
    assert report == listed and report.freed_bytes > 4 * len(leftovers)
    assert contents(tmp_path) == {k: v for k, v in before.items() if ".journal" not in k}
    assert held(store.folder) == found and verify(store.folder, quiet=True).problems == []
    assert gc(store.folder).removed == []


def test_documents_that_are_in_no_shard_yet_stay(store: ZarrStore) -> None:
    journal_of(store, "build", 5, committed=False)
    report = gc(store.folder)
    assert report.removed == []
    assert [kept.why for kept in report.kept] == [
        "holds 2 documents that are in no shard yet; type its command again to go on"
    ]
    with ShardWriter(store, "build") as writer:
        assert len(writer.pending) == 2
        writer.commit(list(writer.pending))


def test_what_a_running_writer_holds_stays(store: ZarrStore) -> None:
    partial = left(store.folder / "shards" / ".partial-build" / "c")
    young = left(store.folder / "fidelity" / ".partial-1")
    with ShardWriter(store, "build"):
        report = gc(store.folder)
        assert report.removed == [] and {kept.why for kept in report.kept} == {"a running writer holds it"}
    assert partial.exists() and young.exists()
    assert [leftover.path.name for leftover in gc(store.folder).removed] == [".partial-build"]


def name_of(documents: Sequence[DocumentRecord]) -> str:
    return shard_name(b"".join(document.key for document in documents))


def test_shards_that_repeat_others_go_and_the_index_is_written_again(store: ZarrStore, tmp_path: Path) -> None:
    later = (
        p for n in (1, 2, 3) for p in permutations(map(store.record, range(3)), n) if name_of(p) > store.shard_names[0]
    )
    again = next(later)  # documents of the first shard, under a name that comes after it
    shutil.copytree(store.folder, tmp_path / "t.zarr")
    found, shards = held(store.folder), len(store.shard_names)
    store.write_documents(again)
    store.save_index()
    report = gc(store.folder)
    assert len(report.removed) == 1 and "in other shards" in report.removed[0].why
    assert open_store(store.folder).shard_count == shards and held(store.folder) == found
    assert verify(store.folder, quiet=True).problems == []
    assert set(contents(store.folder)) == set(contents(tmp_path / "t.zarr"))


def repeated(store: ZarrStore, shard: int) -> str:
    """Write the documents of an indexed shard again, as one whose name comes before it; which shard is now first."""
    name = store.shard_names[shard]
    documents = [store.shard(name).document(number) for number in range(3)]
    store.write_documents(next(p for p in permutations(documents) if (name_of(p) < name)))
    return name


def test_a_shard_that_repeats_a_damaged_one_stays(store: ZarrStore) -> None:
    damaged = store.folder / "shards" / repeated(store, 1) / "entries-0" / "c" / "0" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    report = gc(store.folder)
    assert report.removed == [] and "verify --repair" in report.kept[0].why
    repair(store.folder, quiet=True)
    assert len(open_store(store.folder)) == 6 and verify(store.folder, quiet=True).problems == []


@pytest.mark.parametrize("ask", ["get", "codes", "answer", "answered", "__contains__"])
def test_a_reader_that_knew_the_shard_that_goes_as_the_first_finds_its_documents_in_the_other(
    store: ZarrStore, ask: str
) -> None:
    name = repeated(store, 1)
    document = store.shard(name).document(2)
    reader = open_store(store.folder)
    store.save_index()
    assert [leftover.path.name for leftover in gc(store.folder).removed] == [name]
    asked: Any = {"codes": [document.token_ids], "__contains__": document.key}.get(ask, document.token_ids)
    assert getattr(reader, ask)(asked) not in (None, [None], 0, False)


def test_a_shard_that_goes_while_a_store_is_opened_is_passed_over(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = repeated(store, 1)
    remove_index(store.folder)

    def reading(files: Files, name: str, *rest: Any, **more: Any) -> Shard:
        if name == again:
            shutil.rmtree(store.folder / "shards" / name, ignore_errors=True)
        return Shard(files, name, *rest, **more)

    monkeypatch.setattr("logitstore.catalog.Shard", reading)
    assert len(open_store(store.folder)) == 6


def test_two_at_a_time_leave_one_of_two_shards_that_say_the_same(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated(store, 1)
    found, without = held(store.folder), without_index
    other = Thread(target=gc, args=(store.folder,))

    @contextmanager
    def meanwhile(folder: Path) -> Iterator[None]:
        with without(folder):
            if other.ident is None:
                other.start()
                other.join(1)  # without an index it numbers the shards in another order
            yield

    monkeypatch.setattr("logitstore.gc.without_index", meanwhile)
    gc(store.folder)
    other.join()
    assert held(store.folder) == found and verify(store.folder, quiet=True).problems == []


def test_two_at_a_time_do_not_remove_the_same_shard(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(store, 1)
    remove, other, reports = shutil.rmtree, Thread(target=lambda: reports.append(gc(store.folder))), list[GcReport]()

    def meanwhile(path: Path, **options: Any) -> None:
        if path.name.startswith(".partial-removed-") and path.parent.name == "shards" and other.ident is None:
            other.start()
            other.join(1)
        remove(path, **options)

    monkeypatch.setattr("logitstore.gc.shutil.rmtree", meanwhile)
    reports.append(gc(store.folder))
    other.join()
    assert sorted(len(report.removed) for report in reports) == [0, 1]


def test_no_index_is_written_that_names_a_shard_that_gc_takes_away(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated(store, 1)
    writer, problems = Thread(target=open_store(store.folder).save_index), list[Problem]()

    def meanwhile(path: Path) -> None:
        writer.start()
        writer.join(1)
        gc_remove(path)
        problems.extend(verify(store.folder, quiet=True).problems)

    monkeypatch.setattr("logitstore.gc._remove", meanwhile)
    assert len(gc(store.folder).removed) == 1
    writer.join()
    assert problems == [] == verify(store.folder, quiet=True).problems


def test_a_reader_counts_positions_also_where_a_repeated_shard_has_gone(store: ZarrStore) -> None:
    repeated(store, 1)
    store.save_index()
    reader, positions = open_store(store.folder), store.positions
    assert len(gc(store.folder).removed) == 1
    assert reader.positions == positions


def test_a_reader_finds_a_document_whose_shard_came_and_went_within_one_look(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_index(store.folder)
    reader, other, locate, there = open_store(store.folder), open_store(store.folder), Catalog.locate, set[str]()
    asked = store.record(3).token_ids

    def meanwhile(catalog: Catalog, token_ids: Any) -> Any:
        if catalog is reader.catalog and not there:
            there.update(store.shard_names)
            repeated(other, 1)
            reader.refresh()  # as another thread does
            (again,) = set(other.shard_names) - there
            shutil.rmtree(store.folder / "shards" / again)
        return locate(catalog, token_ids)

    monkeypatch.setattr(Catalog, "locate", meanwhile)
    assert reader.get(asked) is not None and there


def test_a_reader_finds_a_document_while_one_shard_after_another_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, documents = ZarrStore.create(tmp_path / "a.zarr", manifest(), VOCABULARY), records([40, 50, 60, 70])
    for count in (1, 2, 3, 4):
        made.write_documents(documents[:count])  # the first document lies in each
    locate, there = Catalog.locate, sorted(made.shard_names)

    def meanwhile(catalog: Catalog, token_ids: Any) -> Any:
        if len(there) > 1:
            shutil.rmtree(made.folder / "shards" / there.pop(0))
        return locate(catalog, token_ids)

    reader = open_store(made.folder)
    monkeypatch.setattr(Catalog, "locate", meanwhile)
    assert reader.get(documents[0].token_ids) is not None and len(there) == 1


def test_what_its_writer_removes_meanwhile_is_passed_over(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.gc.journals", lambda folder: [folder / ".journal-finished"])
    assert gc(store.folder).removed == [] and not (store.folder / ".journal-finished").exists()


def test_strays_and_quarantined_shards_are_not_its_business(store: ZarrStore) -> None:
    stray = left(store.folder / "notes.txt")
    aside = left(store.folder / "shards" / ".quarantine-0011223344556677" / "zarr.json")
    report = gc(store.folder)
    assert report.removed == [] and "quarantined" in report.kept[0].why
    assert stray.exists() and aside.exists()


def test_what_else_lies_beside_an_lmdb_file_under_a_name_like_a_locks_stays(store: ZarrStore, tmp_path: Path) -> None:
    convert(store.folder, tmp_path / "s.lmdb", quiet=True)
    (tmp_path / ".s.lmdb-notes").write_text("mine")
    (tmp_path / ".s.lmdb-copies").mkdir()
    lock = left(tmp_path / ".s.lmdb-build", b"")
    assert [each.path for each in gc(tmp_path / "s.lmdb").removed] == [lock]
    assert (tmp_path / ".s.lmdb-notes").read_text() == "mine" and (tmp_path / ".s.lmdb-copies").is_dir()


def test_what_is_being_written_under_a_name_that_begins_alike_stays(tmp_path: Path) -> None:
    with replaced(tmp_path / "s-2.zip") as file:
        create_store(tmp_path / "s", manifest(), VOCABULARY)
        assert gc(tmp_path / "s").removed == []
        file.write(b"whole")
    assert (tmp_path / "s-2.zip").read_bytes() == b"whole"


def test_locks_beside_an_lmdb_file_and_what_was_to_become_a_zip_file_go(store: ZarrStore, tmp_path: Path) -> None:
    for suffix in ("lmdb", "zip"):
        convert(store.folder, tmp_path / f"b.{suffix}", quiet=True)
    left(tmp_path / ".b.lmdb-build", b"")
    left(tmp_path / ".unzipped-b.zip" / "zarr.json")
    with open_store(tmp_path / "b.lmdb").writer("other"):
        assert [leftover.path.name for leftover in gc(tmp_path / "b.lmdb").removed] == [".b.lmdb-build"]
    assert [leftover.path.name for leftover in gc(tmp_path / "b.zip").removed] == [".unzipped-b.zip"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
