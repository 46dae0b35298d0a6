"""The index changes how fast an answer is found, and never the answer."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from logitstore import catalog
from logitstore.contract import Store
from logitstore.durable import publish
from logitstore.entries import shard_name
from logitstore.errors import CorruptStoreError, StoreError
from logitstore.index import Table, block_ends, block_hashes, common_length, find, key_hash
from logitstore.key import document_key
from logitstore.recipe import DocumentRecord
from logitstore.sealed import GROUP, Problem, seal_group
from logitstore.store import open_store
from logitstore.stored_index import FOLDER, write_index
from logitstore.targets import SparseTargets
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, contents, guessed, manifest, records, tokens

ROOT = Path(__file__).parent.parent


def beginning_alike(seed: int, common: int, length: int) -> DocumentRecord:
    """A document that begins with the same tokens as every other one made here."""
    token_ids = np.concatenate([tokens(77, common), tokens(1_000 + seed, length - common)])
    return guessed(token_ids, manifest().recipe, np.random.default_rng(seed))


@cache
def stored() -> list[list[DocumentRecord]]:
    """Documents of four shards, of many lengths, some alike at first, some held twice."""
    return [
        records([7, 2, 300], seed=1),
        [*records([40, 33], seed=2), beginning_alike(0, 40, 60)],
        [*records([7, 2], seed=1), *records([600], seed=3)],
        [*records([40], seed=2), *records([130, 20], seed=4), beginning_alike(1, 130, 140)],
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of these, with an index of the first three shards."""
    store = ZarrStore.create(tmp_path_factory.mktemp("made") / "s", manifest(), VOCABULARY)
    for number, documents in enumerate(stored()):
        store.write_documents(documents)
        if number == 2:
            store.save_index()
    return store.folder


@pytest.fixture
def store(tmp_path: Path, made: Path) -> ZarrStore:
    shutil.copytree(made, tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert isinstance(store, ZarrStore)
    return store


@cache
def questions() -> list[npt.NDArray[np.int32]]:
    """What a run may ask for: documents as they are, cut shorter, going on longer, with another token, unknown ones."""
    found = [tokens(9, 5), tokens(9, 500)]
    for ids in (document.token_ids for shard in stored() for document in shard):
        cuts = {1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 299, 511, 513, len(ids) - 1, len(ids)}
        found += [ids[:cut] for cut in sorted(cuts) if 0 < cut <= len(ids)]
        found.append(np.append(ids, tokens(5, 50)))
        found += [np.where(np.arange(len(ids)) == at, (ids + 1) % 300, ids) for at in {0, len(ids) // 2, len(ids) - 1}]
    return found


def numbers(targets: SparseTargets) -> bytes:
    return targets.ids.tobytes() + targets.weights.tobytes() + targets.label_log_prob.tobytes()


def assert_right(store: Store, shards: list[list[DocumentRecord]] | None = None) -> None:
    """Hold every answer against the documents that were written: of those that agree longest, one answers."""
    documents = [document for shard in (stored() if shards is None else shards) for document in shard]
    for ids in questions():
        common = [common_length(ids, document.token_ids) for document in documents]
        whole = any(np.array_equal(ids, document.token_ids) for document in documents)
        most = max(common) - 1 if whole or max(common) >= 32 else 0
        best = [document for document, n in zip(documents, common, strict=True) if n - 1 == most]
        found = store.get(ids)
        assert store.answered(ids) == most == (0 if found is None else len(found))
        right = {numbers(store.manifest.recipe.read(document.records[:most])) for document in best}
        assert found is None or numbers(found) in right


def without_index(store: ZarrStore) -> ZarrStore:
    other = store.folder.with_name("without")
    shutil.copytree(store.folder, other)
    shutil.rmtree(other / FOLDER)
    found = open_store(other)
    assert isinstance(found, ZarrStore) and found.catalog.index is None
    return found


def test_answers_are_right_with_an_index_a_stale_one_and_none(store: ZarrStore) -> None:
    for found in (store, open_store(store.folder), without_index(store)):
        assert_right(found)
    store.save_index()
    for found in (store, open_store(store.folder)):
        assert_right(found)
    assert sum(store.get(ids) is not None for ids in questions()) > 60


def test_a_beginning_is_found_through_both_tables(store: ZarrStore) -> None:
    assert store.catalog.index is not None and len(store.catalog.index.shards) < store.shard_count
    indexed, fresh = tokens(102, 300), tokens(400, 130)
    assert store.answered(indexed[:290]) == 289 and store.answered(fresh[:129]) == 128
    longest = np.append(beginning_alike(1, 130, 140).token_ids, 3)  # the index knows one that agrees for 40, not 140
    assert store.answered(longest) == 139 and store.answered(longest[:60]) == 59


def test_documents_are_counted_and_numbered_once_with_an_index_and_without(store: ZarrStore) -> None:
    def distinct(found: ZarrStore) -> set[bytes]:
        assert len(found) == 10 and [len(found.document(n)[0]) > 1 for n in range(10)] == 10 * [True]
        with pytest.raises(IndexError):
            found.document(10)
        return {found.token_ids(n).tobytes() for n in range(len(found))}

    expected = {document.token_ids.tobytes() for shard in stored() for document in shard}
    assert len(expected) == 10 and store.catalog._view.counts[:, 0].sum() == 13
    for found in (store, open_store(store.folder), without_index(store)):
        assert distinct(found) == expected
    store.save_index()
    assert distinct(store) == expected == distinct(open_store(store.folder))


def test_opening_with_an_index_reads_nothing_of_the_shards(store: ZarrStore) -> None:
    store.save_index()
    held = document_key(tokens(102, 300))
    for shard in (store.folder / "shards").glob("*/"):
        for file in shard.rglob("*"):
            if file.is_file():
                file.unlink()
    reader = open_store(store.folder)
    assert (len(reader), reader.shard_count) == (10, 4)
    assert document_key(tokens(9, 50)) not in reader and reader.get(tokens(9, 50)) is None
    with pytest.raises(CorruptStoreError, match="No such file"):
        assert held in reader


def test_an_index_that_is_up_to_date_is_left_alone(store: ZarrStore) -> None:
    store.save_index()
    before = {p: p.stat().st_mtime_ns for p in (store.folder / FOLDER).rglob("*")}
    for found in (store, open_store(store.folder)):
        found.save_index()
    assert {p: p.stat().st_mtime_ns for p in (store.folder / FOLDER).rglob("*")} == before


def test_an_empty_store_needs_no_index(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    before = contents(tmp_path / "s")
    store.save_index()
    assert contents(tmp_path / "s") == before


def test_every_flipped_byte_of_the_index_is_noticed_or_harmless(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    store.write_documents(records([7, 40], seed=1))
    store.write_documents(records([33], seed=2))
    store.save_index()
    questions = [tokens(100, 7), tokens(101, 40), tokens(101, 40)[:36], tokens(200, 33), tokens(9, 40)]
    expected = [store.answered(ids) for ids in questions]
    noticed = 0
    for name, data in contents(tmp_path / "s" / FOLDER).items():
        for at in range(0, len(data), 40 if name.endswith(f"/{GROUP}") else 13 if name == GROUP else 1):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            (tmp_path / "s" / FOLDER / name).write_bytes(flipped)
            try:
                found = open_store(tmp_path / "s")
                assert [found.answered(ids) for ids in questions] == expected, (name, at)
            except StoreError as error:
                noticed += 1
                assert "\n" not in str(error)
        (tmp_path / "s" / FOLDER / name).write_bytes(data)
    assert noticed > 200


def reseal(folder: Path, **changes: object) -> None:
    attributes = json.loads((folder / GROUP).read_bytes())["attributes"]
    del attributes["digest"]
    (folder / GROUP).write_bytes(seal_group(attributes | changes))


@pytest.mark.parametrize(
    "changes",
    [{"shards": 2}, {"shards": -1}, {"shards": "3"}, {"shards": 10**15}, {"files": {}}, {"files": 3}]
    + [{"duplicates": value} for value in (3, [99], ["a"], [-1], [1.0], [1, 1], None)],
)
def test_a_sealed_index_that_makes_no_sense_is_refused_with_what_to_do(
    store: ZarrStore, changes: dict[str, object]
) -> None:
    reseal(store.folder / FOLDER, **changes)
    with pytest.raises(CorruptStoreError, match=r"delete the folder index, and `logitstore build` makes it") as caught:
        open_store(store.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shift", [1, 5, 1_000, 1 << 31])
def test_a_sealed_index_that_lies_gives_no_wrong_answer(store: ZarrStore, shift: int) -> None:
    index, folder = store.catalog.index, store.folder / FOLDER
    assert index is not None
    keys, blocks = (Table(t.hashes[:], t.documents + np.uint32(shift)) for t in (index.keys, index.blocks))
    shutil.rmtree(folder)
    folder.mkdir()
    write_index(folder, index.shards, index.counts, keys, blocks, [])
    recipe, documents = store.manifest.recipe, [document for shard in stored() for document in shard]
    noticed = 0
    for ids in questions():
        try:
            found = open_store(store.folder).get(ids)
        except CorruptStoreError as error:
            assert "names a document that no shard holds; delete the folder index" in str(error)
            noticed += 1
        else:
            alike = [d for d in documents if found is not None and common_length(ids, d.token_ids) > len(found)]
            assert found is None or numbers(found) in {numbers(recipe.read(d.records[: len(found)])) for d in alike}
    assert noticed or shift < 1_000


def test_where_a_shard_was_taken_away_the_others_are_read(store: ZarrStore) -> None:
    store.save_index()
    gone, left = shard_name(b"".join(d.key for d in stored()[2])), [stored()[0], stored()[1], stored()[3]]
    shutil.rmtree(store.folder / "shards" / gone)
    reader = open_store(store.folder)
    assert (reader.shard_count, len(reader)) == (3, 9)
    assert_right(reader, left)
    reader.save_index()
    again = open_store(store.folder)
    assert len(again) == 9 and again.catalog.index is not None and verify(store.folder, quiet=True).problems == []
    assert_right(again, left)


def test_a_shard_that_was_taken_away_is_named_by_verify(store: ZarrStore) -> None:
    gone = shard_name(b"".join(d.key for d in stored()[2]))
    shutil.rmtree(store.folder / "shards" / gone)
    assert verify(store.folder, quiet=True).problems == [Problem(f"shards/{gone}", "is gone; the index knows it")]


def test_an_open_reader_goes_on_while_the_index_is_replaced(store: ZarrStore) -> None:
    reader = open_store(store.folder)  # has read the index, and none of its beginnings yet
    store.save_index()
    more = records([400], seed=8)
    store.write_documents(more)
    store.save_index()
    assert_right(reader)
    assert reader.answered(more[0].token_ids) == 0
    reader.refresh()
    assert_right(reader, [*stored(), more])
    assert reader.answered(more[0].token_ids[:300]) == 299


def test_an_index_that_another_has_written_of_all_shards_stays(store: ZarrStore) -> None:
    store.save_index()
    both = [open_store(store.folder) for _ in range(2)]
    store.write_documents(records([400], seed=8))
    both[0].save_index()
    written = (store.folder / FOLDER).stat().st_ino
    both[1].save_index()  # who reads it meanwhile would find it gone, and then the same again
    assert (store.folder / FOLDER).stat().st_ino == written


def test_a_look_at_a_damaged_shard_fails_each_time_and_leaves_what_was_known(store: ZarrStore) -> None:
    reader, before = open_store(store.folder), store.shard_names
    for seed in range(10, 14):  # names before and after those that are there
        store.write_documents(records([9, 4], seed=seed))
    for name in set(store.shard_names) - set(before):
        (store.folder / "shards" / name / "documents" / "c" / "0" / "0").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CorruptStoreError):
            reader.refresh()
        assert_right(reader)


def test_what_is_known_is_found_while_another_thread_sees_new_shards(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, keys = list[bool](), [document.key for documents in stored() for document in documents]
    hash_keys = catalog._keys_of

    def meanwhile(*arguments: Any) -> Table:
        found.extend(key in store for key in keys)
        return hash_keys(*arguments)

    monkeypatch.setattr(catalog, "_keys_of", meanwhile)
    for seed in range(10, 14):
        store.write_documents(records([9, 4], seed=seed))
    assert len(found) == 4 * len(keys) and all(found)


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_moment_of_writing_the_index_leaves_a_store_that_is_read(
    store: ZarrStore, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    def between(_partial: Path, final: Path) -> None:
        assert not final.exists()
        killed()

    def after(partial: Path, final: Path) -> None:
        publish(partial, final)
        killed()

    target = ["write_index", "file_entries", "publish", "publish"][moment]
    module = {"file_entries": "logitstore.stored_index", "write_index": "logitstore.catalog"}.get(
        target, "logitstore.durable"
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"{module}.{target}", [killed, killed, between, after][moment])
        patch.setattr("shutil.rmtree", lambda *_arguments, **_options: None)  # a kill tidies nothing up
        store.save_index()
    left = list(store.folder.glob(".partial-*"))
    assert left and (store.folder / FOLDER).exists() == (moment != 2)
    assert_right(open_store(store.folder))
    open_store(store.folder).save_index()
    assert not list(store.folder.glob(".partial-*"))
    reader = open_store(store.folder)
    assert_right(reader)
    assert reader.catalog.index is not None and len(reader.catalog.index.shards) == 4


WRITE = """
import sys
from pathlib import Path
from logitstore.store import open_store
from tests.stores import records

store = open_store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(6):
    store.write_documents(records([5, 40], seed=int(sys.argv[2]) + i), sys.argv[2])
    store.save_index()
"""

READ = """
import sys
from pathlib import Path
from logitstore.store import open_store
from tests.stores import tokens

print("ready", flush=True)
sys.stdin.readline()
most, opened, begun = 0, 0, open_store(Path(sys.argv[1]))
while most < 24:
    store = open_store(Path(sys.argv[1]))
    begun.refresh()
    assert most <= len(store) <= len(begun)
    most = len(store)
    for reader in (store, begun):
        answered = [reader.answered(tokens(100 * (w + i) + 1, 40)[:35]) for w in (100, 200) for i in range(6)]
        assert set(answered) <= {0, 34} and answered.count(34) >= most // 2
    opened += 1
print(opened)
"""


def test_two_writers_at_once_and_a_reader_that_opens_the_store_meanwhile(tmp_path: Path) -> None:
    ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    options: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    commands = [[WRITE, str(tmp_path / "s"), "100"], [WRITE, str(tmp_path / "s"), "200"], [READ, str(tmp_path / "s")]]
    processes = [subprocess.Popen([sys.executable, "-c", *command], **options) for command in commands]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and int(outputs[2]) > 1
    store = open_store(tmp_path / "s")
    assert len(store) == 24 and not list((tmp_path / "s").rglob(".*"))
    store.save_index()
    assert open_store(tmp_path / "s").catalog.index.shards == sorted(store.shard_names)


LARGE = 10_000_000
OPEN = """
import sys, time
from pathlib import Path
from logitstore.index import block_hashes, key_hash
from logitstore.key import document_key
from logitstore.store import open_store
from tests.stores import tokens

def most_mb():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = most_mb()
begin = time.perf_counter()
store = open_store(Path(sys.argv[1]))
opened = time.perf_counter()
assert len(store) == 10_000_000 + 3
for _ in range(1_000):
    assert store.get(tokens(9, 20)) is None and document_key(tokens(1, 7)) not in store
asked = time.perf_counter()
assert store.get(tokens(100, 7)) is not None and store.answered(tokens(102, 300)[:290]) == 289
found = time.perf_counter()
print(opened - begin, (asked - opened) / 2_000, found - asked, before, most_mb())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the index of ten million documents, of which three are there."""
    store = ZarrStore.create(tmp_path_factory.mktemp("large") / "s", manifest(), VOCABULARY)
    store.write_documents(records([7, 2, 300], seed=1))
    shards, n = sorted([*store.shard_names, *(f"{i:016x}" for i in range(1, 101))]), LARGE // 100
    for name in shards:
        (store.folder / "shards" / name).mkdir(exist_ok=True)
    real = shards.index(store.shard_names[0])
    counts = np.array([(3, 306) if i == real else (n, 100 * n) for i in range(101)], np.int64)
    first = int(counts[:real, 0].sum())
    rng = np.random.default_rng(0)

    def table(size: int, mine: list[int], documents: np.ndarray) -> Table:
        hashes = np.cumsum(rng.integers(0, (1 << 65) // size - size, size, np.uint64), dtype=np.uint64)
        order = np.argsort(np.array(mine, np.uint64))
        at = np.searchsorted(hashes, np.array(mine, np.uint64)[order])
        hashes = np.insert(hashes, at, np.array(mine, np.uint64)[order])
        places = rng.integers(0, LARGE, len(hashes), np.uint32)
        places[at + np.arange(len(at))] = documents[order]
        return Table(hashes, places)

    held = [tokens(100, 7), tokens(101, 2), tokens(102, 300)]
    keys = table(LARGE, [key_hash(document_key(ids)) for ids in held], np.arange(first, first + 3))
    blocks = table(3 * LARGE, block_hashes(held[2]), np.full(3, first + 2))
    (store.folder / FOLDER).mkdir()
    write_index(store.folder / FOLDER, shards, counts, keys, blocks, [])
    return store.folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_index_of_ten_million_documents_takes_little_memory(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", OPEN, str(large)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    opened, miss, hit, before, rss = map(float, output.split())
    line = f"opened in {opened:.2f} s, a miss {1e6 * miss:.0f} us, first hits {hit:.2f} s, {before:.0f} + "
    with capsys.disabled():
        sys.stdout.write(f"\n10M documents: {line}{rss - before:.0f} MB\n")
    assert rss < 200


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_finds_every_document_of_a_hash_and_no_other() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 50, 300).astype(np.uint64) + np.uint64((1 << 64) - 51)
    table = Table.of(hashes, np.arange(300))
    for value in range((1 << 64) - 60, 1 << 64):
        assert table.find(value, 300) == np.flatnonzero(hashes == np.uint64(value)).tolist()
        assert table.find(value, 2) == table.find(value, 300)[:2]
    assert find([table, table], int(hashes[0])) == 2 * table.find(int(hashes[0]))


@pytest.mark.parametrize(
    ("length", "ends"),
    [(31, []), (32, [32]), (127, [32]), (128, [32, 128]), (255, [32, 128]), (256, [32, 128, 256]), (800, None)],
)
def test_a_document_is_found_by_its_first_32_128_256_512_tokens(length: int, ends: list[int] | None) -> None:
    expected = [32, 128, 256, 512, 768] if ends is None else ends
    ids = tokens(0, length)
    assert block_ends(length) == expected
    assert block_hashes(ids) == [int.from_bytes(document_key(ids[:end])[:8], "little") for end in expected]


def test_documents_agree_up_to_the_first_token_that_differs() -> None:
    for a, b, n in (([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([0, 2], [1, 2], 0), ([1, 2, 3], [1, 2, 4], 2)):
        assert common_length(np.array(a), np.array(b)) == common_length(np.array(b), np.array(a)) == n
