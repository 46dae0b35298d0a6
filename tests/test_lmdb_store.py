"""What is LMDB's own: one file that grows, is looked at before it is trusted, and is shared by processes."""

import gc
import os
import subprocess
import sys
from collections import Counter
from errno import EMFILE, ENOTSUP
from pathlib import Path
from typing import Any

import pytest

from logitstore import lmdb_file, lmdb_records
from logitstore.errors import CorruptStoreError, StoreFormatError, StoreLostError, StoreNotFoundError, StoreWriteError
from logitstore.key import document_key
from logitstore.lmdb_file import LmdbFile
from logitstore.lmdb_pages import Nodes, PageError, Snapshot, read_metas
from logitstore.lmdb_records import NUMBER, PLACE, ROOT, Counts, Place, Record, encode
from logitstore.lmdb_store import LmdbStore
from logitstore.recipe import DocumentRecord
from logitstore.sealed import seal_group, unseal_group
from logitstore.store import create_store, open_store
from logitstore.streams import Ranks
from logitstore.verify import verify
from tests.stores import VOCABULARY, manifest, records, tokens

PROJECT = Path(__file__).parent.parent
LENGTHS = [7, 2, 30, 100, 600]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.lmdb"


@pytest.fixture
def store(path: Path) -> LmdbStore:
    store = LmdbStore.create(path, manifest(), VOCABULARY)
    add(store, records(LENGTHS))
    return store


def add(store: LmdbStore, documents: list[DocumentRecord]) -> None:
    with store.writer("build") as writer:
        writer.append(documents)


def answers_all(store: LmdbStore, documents: list[DocumentRecord]) -> bool:
    found = [store.get(document.token_ids) for document in documents]
    expected = [store.manifest.recipe.read(document.records) for document in documents]
    return all(f is not None and (f.weights == e.weights).all() for f, e in zip(found, expected, strict=True))


def test_the_suffix_begins_it_and_the_first_bytes_open_it(path: Path, tmp_path: Path) -> None:
    assert isinstance(create_store(path, manifest(), VOCABULARY), LmdbStore)
    path.rename(tmp_path / "other")
    assert isinstance(open_store(tmp_path / "other"), LmdbStore)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such names")
def test_a_name_that_is_no_utf_8_is_one_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.lmdb")
    add(LmdbStore.create(path, manifest(), VOCABULARY), documents := records(LENGTHS))
    gc.collect()
    assert answers_all(LmdbStore(path), documents)
    assert verify(path, quiet=True).problems == []


def test_it_is_one_file_beside_the_lock_of_lmdb(store: LmdbStore, tmp_path: Path) -> None:
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.lmdb", "s.lmdb-lock"]
    assert store.disk_bytes == store.path.stat().st_size


def test_it_is_begun_also_where_there_are_no_hard_links(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(ENOTSUP, "Operation not supported")  # exFAT

    monkeypatch.setattr("os.link", refused)
    add(LmdbStore.create(path, manifest(), VOCABULARY), documents := records(LENGTHS))
    assert answers_all(LmdbStore.create(path, manifest(), VOCABULARY), documents)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.lmdb", "s.lmdb-lock"]


def test_what_is_no_store_is_refused_with_one_line(path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="there is no store at"):
        open_store(path)
    for content in (b"", b"x" * 9000):
        path.write_bytes(content)
        with pytest.raises(CorruptStoreError, match=r"s\.lmdb cannot be read: .*; restore the file") as caught:
            open_store(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_now_is_not_told_to_be_damaged(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_many = lmdb_file.lmdb.Error("s.lmdb: Too many open files")
    too_many.code = EMFILE
    for fault in (too_many, lmdb_file.lmdb.ReadersFullError("mdb_txn_begin: MDB_READERS_FULL")):

        def refused(*_: object, error: Exception = fault, **__: object) -> None:
            raise error

        monkeypatch.setattr(lmdb_file.LmdbFile, "_begin", refused)
        with pytest.raises(StoreLostError, match=r"cannot be read now .* no damage") as caught:
            len(store)
        assert "\n" not in str(caught.value)


def test_a_fork_that_opens_what_was_open_before_is_told_that_and_not_of_damage(store: LmdbStore) -> None:
    child = os.fork()
    if not child:
        try:
            LmdbStore(store.path)
        except StoreLostError as error:
            os._exit(42 if "open it after the fork" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_store_of_a_newer_format_is_refused_by_name(store: LmdbStore) -> None:
    def newer(txn: Any, counts: Counts) -> Counts:
        root = unseal_group(txn.get(ROOT), "")
        txn.put(ROOT, seal_group(root | {"logitstore": root["logitstore"] | {"format_version": 9}}))
        return counts

    store.change(newer)
    with pytest.raises(StoreFormatError, match=r"s\.lmdb has format 9, this logitstore reads format 1"):
        open_store(store.path)


def test_a_creation_that_was_killed_leaves_nothing_once_the_store_is_begun_again(path: Path, tmp_path: Path) -> None:
    for name in (".partial-s.lmdb-12", ".partial-s.lmdb-12-lock", ".partial-other-12"):
        (tmp_path / name).touch()
    LmdbStore.create(path, manifest(), VOCABULARY)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-other-12", "s.lmdb", "s.lmdb-lock"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreWriteError, match=r"s\.lmdb cannot be written: .*type the same command to go on"):
        LmdbStore.create(tmp_path / "file" / "s.lmdb", manifest(), VOCABULARY)


def test_the_map_grows_while_a_reader_of_another_process_adopts_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_file, "_FIRST_MAP", 1 << 16)
    LmdbStore.create(path, manifest(), VOCABULARY)
    command = [sys.executable, "-c", READ, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "0\n"
        store = LmdbStore(path)
        for seed in range(10):
            add(store, records([600, 50], seed=seed))
        found, _ = reader.communicate("\n")
    assert found == "20 True\n" and store.disk_bytes > 1 << 17


READ = """
import sys
from logitstore import lmdb_file
lmdb_file._FIRST_MAP = 1 << 16
from logitstore.store import open_store
from tests.stores import records
store = open_store(sys.argv[1])
print(len(store), flush=True)
sys.stdin.readline()
expected = [d for seed in range(10) for d in records([600, 50], seed=seed)]
right = [(store.get(d.token_ids).ids == store.manifest.recipe.read(d.records).ids).all() for d in expected]
print(len(store), all(right))
"""


def test_a_batch_that_cannot_be_written_is_not_there_and_the_next_one_is(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise lmdb_file.lmdb.DiskError("mdb_txn_commit: No space left on device.")

    with store.writer("build") as writer:
        with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match="No space left on device; nothing"):
            patch.setattr("logitstore.lmdb_writer.put_bundle", fail)
            writer.append(records([9], seed=4))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("logitstore.lmdb_writer.put_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            writer.append(records([9], seed=5))
        assert len(store) == 5
        writer.append(records([9], seed=6))
    assert len(store) == 6 and verify(store.path, quiet=True).problems == []


def test_documents_of_one_batch_lie_together_in_pieces(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.lmdb_writer.BUNDLE_BYTES", 3000)
    add(store, more := records([200, 90, 400, 9, 8], seed=1))
    places = [Place.from_bytes(store.file.get(PLACE + NUMBER.pack(n)) or b"") for n in range(10)]
    assert [place.bundle for place in places[:5]] == [0] * 5
    assert places[5].start == 0 and 2 <= places[9].bundle < 6 and answers_all(store, records(LENGTHS) + more)


def test_tables_of_ranks_follow_the_stores_growth(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.counts().tables == 1
    monkeypatch.setattr("logitstore.lmdb_writer.LAST_FIT", 3000)
    with store.writer("build") as writer:
        for seed in range(1, 8):
            writer.append(records([900], seed=seed))
    assert [store.table(n)[1] for n in range(store.counts().tables)] == [734, 3596]
    add(store, records([15_000], seed=8))
    assert store.counts().tables == 2 and answers_all(open_store(store.path), records(LENGTHS) + records([900], seed=7))


def test_a_document_too_long_for_a_record_is_refused(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_records, "RECORD_BYTES", 3000)
    with pytest.raises(StoreWriteError, match=r"600 tokens cannot be kept in one record; type .*\.zarr, or a"):
        add(LmdbStore.create(store.path.with_name("other.lmdb"), manifest(), VOCABULARY), records(LENGTHS))
    with pytest.raises(CorruptStoreError, match="a record of 600 tokens"):
        store.get(records(LENGTHS)[4].token_ids)


def test_every_flipped_bit_of_a_record_is_noticed() -> None:
    recipe, document = manifest().recipe, records([12])[0]
    ranks = Ranks.fit(lmdb_records.used_ids(document, recipe))
    data = encode(document, recipe, 0, ranks.table())
    assert (Record(data, recipe, lambda _: ranks).document().records == document.records).all()
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        with pytest.raises(ValueError, match=r"."):
            Record(flipped, recipe, lambda _: ranks).document()
        with pytest.raises(ValueError, match=r"."):
            Record(data[:at], recipe, lambda _: ranks).document()


def test_a_record_that_lies_in_another_ones_place_is_never_read(store: LmdbStore) -> None:
    def swap(txn: Any, counts: Counts) -> Counts:
        keys = [PLACE + NUMBER.pack(n) for n in (3, 4)]
        places = [txn.get(key) for key in keys]
        for key, place in zip(keys, reversed(places), strict=True):
            txn.put(key, place)
        return counts

    store.change(swap)
    documents = records(LENGTHS)
    for document in documents[3:]:
        with pytest.raises(CorruptStoreError, match=r"it is not found by its key\); type `logitstore verify"):
            store.get(document.token_ids)
    assert answers_all(store, documents[:3])
    assert [p.fault.split("(")[0] for p in verify(store.path, quiet=True).problems] != []


def test_verify_names_each_document_that_is_damaged(store: LmdbStore) -> None:
    place = Place.from_bytes(store.file.get(PLACE + NUMBER.pack(2)) or b"")

    def flip(txn: Any, counts: Counts) -> Counts:
        key = lmdb_records.BUNDLE + NUMBER.pack(place.bundle)
        bundle = bytearray(txn.get(key))
        bundle[place.stop - 9] ^= 4
        txn.put(key, bytes(bundle))
        return counts

    store.change(flip)
    (problem,) = verify(store.path, quiet=True).problems
    assert problem.file == "s.lmdb" and "document 2 cannot be read (a checksum does not match)" in problem.fault


def test_a_file_that_is_cut_while_it_is_open_is_not_read(store: LmdbStore) -> None:
    assert store.get(records(LENGTHS)[4].token_ids) is not None
    os.truncate(store.path, 8192)
    with pytest.raises(CorruptStoreError, match=r"it was cut from [0-9,]+ bytes to 8,192"):
        store.get(records(LENGTHS)[4].token_ids)


def test_damage_by_chance_never_ends_the_process_nor_gives_a_wrong_number(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.lmdb_damage", str(tmp_path), "0", "300"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    ends = Counter(done.stdout.splitlines())
    assert ends.keys() == {"noticed", "right"} and ends.total() == 300, ends


def test_the_walk_passes_over_every_page_once(path: Path) -> None:
    """Branches, leaves, long data and free pages are all pages there are: nothing is passed over."""
    store = LmdbStore.create(path, manifest(), VOCABULARY)
    for seed in range(12):  # more than one page holds, also where pages have 16 kB
        add(store, records([3] * 40 + [700], seed=seed))
    with path.open("rb") as file:
        meta = max(read_metas(file.fileno()), key=lambda meta: meta.transaction)
        snapshot, keys = Snapshot(file.fileno(), meta), list[bytes]()

        def take(nodes: Nodes) -> None:
            keys.extend(row[:n].tobytes() for row, n in zip(nodes.rows, nodes.key_bytes.tolist(), strict=True))

        snapshot.check(take)
        assert meta.main.depth >= 2 and keys == sorted(keys) and len(keys) == meta.main.entries
        assert all(lmdb_records.KEY + document_key(tokens(i, 3)) in keys for i in range(40))
        assert snapshot.used_pages + snapshot.free_pages == meta.last_page + 1
        for wrong in (meta.main.root, meta.free.root):
            with pytest.raises(PageError), path.with_name("x").open("w+b") as copy:
                data = bytearray(path.read_bytes())
                data[wrong * meta.page_bytes + 10] ^= 3  # a branch passes for a leaf
                copy.write(data)
                copy.flush()
                Snapshot(copy.fileno(), meta).check(take)


@pytest.mark.filterwarnings("error")
def test_a_file_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LmdbFile(tmp_path / "nowhere" / "s.lmdb")
    gc.collect()
