"""What every store does, held against each kind of store: one set of tests, run once for each."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

from logitstore.contract import Store
from logitstore.errors import ConfigError, StoreWriteError
from logitstore.key import document_key
from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.store import create_store, open_store
from logitstore.targets import SparseTargets
from logitstore.verify import verify
from tests.distributions import Case, cases
from tests.stores import VOCAB, VOCABULARY, guessed, manifest, records, tokens

ROOT = Path(__file__).parent.parent
LENGTHS = [7, 2, 30, 100, 600]


def manifest_of(recipe: Recipe) -> Manifest:
    teacher = TeacherIdentity("tiny", "a" * 32, "c" * 32, None, None, "float32")
    return Manifest(teacher, TokenizerIdentity(VOCABULARY.fingerprint(), VOCAB, None), recipe)


def add(store: Store, documents: Sequence[DocumentRecord], name: str = "build") -> None:
    with store.writer(name) as writer:
        writer.append(documents)
        writer.commit(list({document.key: None for document in documents}))


def are_equal(found: SparseTargets | None, expected: SparseTargets, count: int | None = None) -> bool:
    """Whether the first `count` positions of both are equal, and there are no more of them found."""
    return found is not None and all(
        (a is None and b is None) or (len(a) == len(b[:count]) and (a == b[:count]).all())
        for a, b in ((getattr(found, name), getattr(expected, name)) for name in expected.__dataclass_fields__)
    )


def lengthened(document: DocumentRecord, more: int) -> npt.NDArray[np.int32]:
    return np.concatenate([document.token_ids, tokens(77, more)])


class StoreContract:
    """The tests; a subclass says by its suffix which kind of store they are about."""

    suffix: str

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / f"s{self.suffix}"

    @pytest.fixture
    def store(self, path: Path) -> Store:
        store = create_store(path, manifest(), VOCABULARY)
        add(store, records(LENGTHS))
        return store

    def test_a_document_that_was_written_is_a_hit_and_any_other_a_miss(self, store: Store) -> None:
        for document in records(LENGTHS):
            expected = store.manifest.recipe.read(document.records)
            assert are_equal(store.get(document.token_ids), expected)
            assert document.key in store and store.answered(document.token_ids) == len(document.records)
        for length in (7, 2, 600):
            assert store.get(tokens(99, length)) is None and store.answered(tokens(99, length)) == 0
        assert document_key(tokens(99, 7)) not in store and "a" not in store

    @pytest.mark.parametrize("form", ["<i4", ">i8", "<u2", "list"])
    def test_a_document_is_found_whatever_its_ids_are_kept_in(self, store: Store, form: str) -> None:
        ids = records(LENGTHS)[0].token_ids
        assert store.get(ids.tolist() if form == "list" else ids.astype(form)) is not None

    @pytest.mark.parametrize("length", [32, 33, 100, 128, 255, 256, 599])
    def test_a_document_cut_shorter_is_a_whole_hit(self, store: Store, length: int) -> None:
        document = records(LENGTHS)[4]
        expected = store.manifest.recipe.read(document.records)
        assert are_equal(store.get(document.token_ids[:length]), expected, length - 1)
        assert store.answered(document.token_ids[:length]) == length - 1

    def test_a_document_that_goes_on_is_a_hit_as_far_as_they_agree(self, store: Store) -> None:
        for document in records(LENGTHS)[3:]:
            longer = lengthened(document, 50)
            expected = store.manifest.recipe.read(document.records)
            assert are_equal(store.get(longer), expected) and store.answered(longer) == len(expected)
        other = np.concatenate([document.token_ids[:290], tokens(78, 20)])
        assert are_equal(store.get(other), expected, store.answered(other)) and store.answered(other) >= 289

    @pytest.mark.parametrize("selection", ["threshold:16", "top-k:8", "random:20"])
    def test_documents_read_in_any_order_and_across_chunks_are_the_same(
        self, path: Path, selection: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("logitstore.streams.CHUNK_POSITIONS", 8)
        recipe = Recipe(Selection.parse(selection), (1.0, 2.0), 0, VOCAB, log_z=(2.0,))
        store, rng = create_store(path, manifest_of(recipe), VOCABULARY), np.random.default_rng(3)
        documents = []
        for number, length in enumerate([5, 20, 3, 9, 40, 2, 8, 17]):
            token_ids, logits = tokens(number, length), rng.normal(0, 3, (length - 1, VOCAB)).astype(np.float32)
            logits[np.arange(length - 1), token_ids[1:]] += rng.choice([0, 5, 9], length - 1)  # labels in head and tail
            documents.append(DocumentRecord(token_ids, recipe.record(token_ids, logits)))
        add(store, documents)
        by_key = {document.key: document for document in documents}
        for number in [*range(8), *rng.integers(0, 8, 60).tolist()]:
            token_ids, targets = store.document(number)
            document, other = by_key[document_key(token_ids)], documents[number]
            assert are_equal(targets, recipe.read(document.records))
            assert (store.record(number).records == document.records).all()
            assert are_equal(store.get(other.token_ids), recipe.read(other.records))
            assert document_key(store.token_ids(number)) == document.key

    def test_threads_that_read_at_once_each_get_their_own_rows(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("logitstore.streams.CHUNK_POSITIONS", 8)  # so that each reads other chunks
        store = create_store(path, manifest(), VOCABULARY)
        documents = records([9] * 40)
        add(store, documents)
        expected = [store.manifest.recipe.read(document.records) for document in documents]

        def read(seed: int) -> bool:
            numbers = np.random.default_rng(seed).integers(0, len(documents), 40).tolist()
            return all(are_equal(store.get(documents[n].token_ids), expected[n]) for n in numbers)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(read, range(8)))
        finally:
            sys.setswitchinterval(interval)

    def test_fewer_than_32_tokens_in_common_are_a_miss(self, store: Store) -> None:
        short, long = records(LENGTHS)[2], records(LENGTHS)[4]
        assert store.get(short.token_ids[:29]) is None and store.get(lengthened(short, 9)) is None
        assert store.get(long.token_ids[:31]) is None and store.get(lengthened(records(LENGTHS)[0], 99)) is None

    def test_of_two_that_begin_alike_the_longer_answer_is_given(self, store: Store) -> None:
        first = records(LENGTHS)[4]
        fork = np.concatenate([first.token_ids[:140], tokens(5, 60)])
        logits = np.random.default_rng(5).normal(0, 3, (199, VOCAB)).astype(np.float32)
        second = DocumentRecord(fork, store.manifest.recipe.record(fork, logits))
        add(store, [second])
        assert store.answered(lengthened(second, 5)) == 199 and store.answered(first.token_ids[:170]) == 169
        assert are_equal(store.get(fork[:150]), store.manifest.recipe.read(second.records), 149)

    def test_of_many_that_begin_alike_the_one_that_goes_on_alike_answers(self, path: Path) -> None:
        store, recipe, rng = create_store(path, manifest(), VOCABULARY), manifest().recipe, np.random.default_rng(4)
        system, documents = tokens(70, 40), list[DocumentRecord]()
        for number in range(100):
            documents.append(guessed(np.concatenate([system, tokens(200 + number, 45)]), recipe, rng))
            if number in (79, 99):  # put in order, and others in between
                add(store, documents[-80:], f"build-{number}")
                store.refresh()
                for document in documents:
                    for length in (50, 84):
                        assert store.answered(document.token_ids[:length]) == length - 1
        other = np.concatenate([documents[90].token_ids[:60], tokens(300, 10)])
        assert store.answered(other) == 59 and store.answered(np.concatenate([system, tokens(301, 9)])) >= 39

    def test_codes_of_several_documents_are_those_that_get_decodes(self, store: Store) -> None:
        documents = [d.token_ids for d in records(LENGTHS)]
        asked = [documents[4], tokens(99, 40), documents[0], documents[4][:77], documents[3]]
        for codes, token_ids in zip(store.codes(asked), asked, strict=True):
            targets = store.get(token_ids)
            if targets is None:
                assert codes is None
            else:
                assert codes is not None and (codes.ids == targets.ids).all()
                assert (codes.head_count == targets.head_count).all()

    def test_documents_are_numbered_and_counted(self, store: Store) -> None:
        assert (len(store), store.positions) == (5, sum(LENGTHS) - 5)
        found = {document_key(store.token_ids(n)): n for n in range(5)}
        assert found.keys() == {d.key for d in records(LENGTHS)}
        for document in records(LENGTHS):
            number = found[document.key]
            token_ids, targets = store.document(number)
            record = store.record(number)
            assert (token_ids == document.token_ids).all() and (record.token_ids == token_ids).all()
            assert (record.records == document.records).all()
            assert are_equal(targets, store.manifest.recipe.read(document.records))
        for number in (-1, 5):
            for read in (store.document, store.record, store.token_ids):
                with pytest.raises(IndexError):
                    read(number)

    def test_a_document_written_again_is_there_once_as_it_was_first(self, store: Store) -> None:
        first = records(LENGTHS)
        logits = np.zeros((6, VOCAB), np.float32)
        other = DocumentRecord(first[0].token_ids, store.manifest.recipe.record(first[0].token_ids, logits))
        add(store, [other, *first])
        assert (len(store), store.positions) == (5, sum(LENGTHS) - 5)
        assert are_equal(store.get(first[0].token_ids), store.manifest.recipe.read(first[0].records))

    def test_every_temperature_and_replica_has_its_own_entries(self, path: Path) -> None:
        recipe = Recipe(Selection.parse("threshold:4"), (1.0, 2.0), 0, VOCAB, replicas=2)
        store = create_store(path, manifest_of(recipe), VOCABULARY)
        documents = records([40, 50], recipe=recipe)
        add(store, documents)
        seen = set()
        for temperature in (1.0, 2.0):
            for replica in (0, 1, 2):
                expected = recipe.read(documents[1].records, temperature, replica)
                assert are_equal(store.get(documents[1].token_ids, temperature, replica), expected)
                assert are_equal(store.get(documents[1].token_ids[:35], temperature, replica), expected, 34)
                seen.add(expected.ids.tobytes())
        assert len(seen) == 4
        for refused in (store.get, lambda ids, t: store.codes([ids], t), lambda _ids, t: store.document(0, t)):
            with pytest.raises(ConfigError, match=r"this run asks for 3; leave --temperature out"):
                refused(documents[1].token_ids, 3.0)

    def test_vocabulary_and_manifest_come_back(self, store: Store, path: Path) -> None:
        for opened in (store, open_store(path)):
            assert opened.vocabulary == VOCABULARY and opened.manifest == manifest() and opened.path == path

    def test_what_was_measured_comes_back(self, store: Store, path: Path) -> None:
        assert store.fidelity is None
        for value in (0.5, 0.25):
            store.save_fidelity({"kl": value})
            assert open_store(path).fidelity == store.fidelity == {"kl": value}

    def test_sizes_of_its_parts_are_that_of_the_whole(self, store: Store, path: Path) -> None:
        planes = store.plane_bytes()
        assert sum(planes.values()) == store.disk_bytes and min(planes.values()) >= 0
        files = [p for p in [path, *path.rglob("*")] if p.is_file()]
        assert store.disk_bytes == sum(p.stat().st_size for p in files if not p.name.startswith("."))

    def test_copies_have_one_digest_and_what_differs_another(self, store: Store, path: Path, tmp_path: Path) -> None:
        copy = tmp_path / f"copy{self.suffix}"
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        before = store.digest()
        assert open_store(copy).digest() == before and store.shard_count == 1
        add(store, records([9], seed=4))
        add(other := open_store(copy), records([9], seed=5))
        assert len({before, store.digest(), other.digest()}) == 3

    def test_an_open_store_sees_what_others_have_finished_after_a_refresh(self, store: Store, path: Path) -> None:
        reader = open_store(path)
        more = records([5, 50], seed=4)
        add(store, more)
        reader.refresh()
        assert len(reader) == 7 and all(reader.get(d.token_ids) is not None for d in more)

    def test_a_writer_knows_what_is_there_and_what_it_has_appended(self, store: Store) -> None:
        fresh = records([9], seed=4)[0]
        with store.writer("build") as writer:
            assert records(LENGTHS)[0].key in writer and fresh.key not in writer
            writer.append([fresh])
            assert fresh.key in writer and set(writer.pending) <= {fresh.key}
            writer.commit([fresh.key])
            assert fresh.key in store and not writer.pending

    def test_a_second_writer_of_a_name_is_refused(self, store: Store) -> None:
        with store.writer("build"):
            with pytest.raises(StoreWriteError, match=r"another process is writing build into .*; wait for it, or end"):
                store.writer("build")
            add(store, records([9], seed=4), "another")
        add(store, records([9], seed=5))
        assert len(store) == 7

    def test_an_empty_store_answers_nothing(self, path: Path) -> None:
        store = create_store(path, manifest(), VOCABULARY)
        assert (len(store), store.positions, store.get(tokens(0, 99))) == (0, 0, None)
        assert verify(path, quiet=True).problems == []

    def test_a_good_store_verifies(self, store: Store, path: Path) -> None:
        report = verify(path, quiet=True)
        assert (report.documents, report.positions, report.problems) == (5, store.positions, [])

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def test_what_is_encoded_stored_and_read_is_what_was_encoded(
        self, tmp_path_factory: pytest.TempPathFactory, case: Case
    ) -> None:
        path = tmp_path_factory.mktemp("case") / f"s{self.suffix}"
        store = create_store(path, manifest_of(case.recipe), VOCABULARY)
        document = DocumentRecord(case.token_ids, case.records)
        add(store, [document])
        assert (store.record(0).records == document.records).all()
        for temperature in case.recipe.served_temperatures:
            for replica in range(case.recipe.replicas):
                expected = case.recipe.read(document.records, temperature, replica)
                assert are_equal(store.get(case.token_ids, temperature, replica), expected)

    @pytest.mark.parametrize("size", [20, 20_000])  # of the wide ones a chunk holds 11 positions
    def test_hidden_states_are_kept_and_answered_as_far_as_the_entries_are(self, path: Path, size: int) -> None:
        made = manifest(hidden_layers=(4, 1), hidden_size=size)
        store = create_store(path, made, VOCABULARY)
        documents = records([7, 60], recipe=made.recipe)
        add(store, documents[:1])
        add(store, documents[1:])
        for document in documents:
            expected = made.recipe.read(document.records)
            assert expected.hidden is not None and expected.hidden.shape == (len(expected), 2, size)
            assert are_equal(store.get(document.token_ids), expected)
            for cut in (35, 50):
                if len(document.token_ids) > cut:
                    assert are_equal(store.get(document.token_ids[:cut]), expected, cut - 1)
        assert {r.key: r.records.tobytes() for r in map(store.record, range(2))} == {
            d.key: d.records.tobytes() for d in documents
        }
        (codes,) = store.codes([documents[1].token_ids])
        assert codes is not None and (codes.ids == made.recipe.read(documents[1].records).ids).all()
        assert verify(path, quiet=True).problems == []

    def test_processes_that_create_a_store_at_once_all_succeed(self, path: Path, tmp_path: Path) -> None:
        with run(CREATE, path, stdin=subprocess.PIPE) as one, run(CREATE, path, stdin=subprocess.PIPE) as other:
            for process in (one, other):
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            for process in (one, other):
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            assert (one.wait(), other.wait()) == (0, 0)
        assert len(open_store(path)) == 0
        assert {p.name for p in tmp_path.iterdir()} <= {path.name, f"{path.name}-lock"}

    def test_a_reader_reads_right_while_another_process_writes(self, store: Store, path: Path) -> None:
        with run(WRITE, path) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                store.refresh()
                for document in (*records([40, 5], seed=int(line)), records(LENGTHS)[4]):
                    assert are_equal(store.get(document.token_ids), store.manifest.recipe.read(document.records))
        assert writer.returncode == 0 and len(store) == 45

    def test_kills_of_a_writer_lose_nothing_that_was_acknowledged(self, path: Path) -> None:
        create_store(path, manifest(), VOCABULARY)
        with run(KILLS, path) as killing:
            assert killing.stdout is not None
            acknowledged = [int(line) for line in killing.stdout]
        assert killing.returncode == 0 and len(acknowledged) >= 10
        store = open_store(path)
        with store.writer("build") as writer:
            for seed in acknowledged:
                assert all(document.key in writer for document in records([40, 5], seed=seed))
            writer.commit(list(writer.pending))
        recipe = store.manifest.recipe
        for seed in acknowledged:
            for document in records([40, 5], seed=seed):
                assert are_equal(store.get(document.token_ids), recipe.read(document.records))
        assert verify(path, quiet=True).problems == []


class TestZarr(StoreContract):
    suffix = ".zarr"


class TestLmdb(StoreContract):
    suffix = ".lmdb"


def run(program: str, *args: object, stdin: int | None = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True)


CREATE = """
import sys
from pathlib import Path
from logitstore.store import create_store
from tests.stores import VOCABULARY, manifest
print("ready", flush=True)
sys.stdin.readline()
create_store(Path(sys.argv[1]), manifest(), VOCABULARY)
"""

WRITE = """
import sys
from logitstore.store import open_store
from tests.stores import records
with open_store(sys.argv[1]).writer("build") as writer:
    for seed in range(10, 30):
        batch = records([40, 5], seed=seed)
        writer.append(batch)
        writer.commit([document.key for document in batch])
        print(seed, flush=True)
"""

KILLS = """
import os, random, signal, sys, time
import logitstore.lmdb_writer
from logitstore.store import open_store
from tests.stores import records

batches = {seed: records([40, 5], seed=seed) for seed in range(10, 400)}
random.seed(0)
done = 10
for _ in range(20):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with open_store(sys.argv[1]).writer("build") as writer:
            for seed in range(done, 400):
                writer.append(batches[seed])
                os.write(write, b"%d\\n" % seed)
                if seed % 3 == 0:
                    writer.commit(list(writer.pending))
        os._exit(0)
    os.close(write)
    acknowledged = os.read(read, 1000)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as rest:
        acknowledged += rest.read()
    print(acknowledged.decode(), end="", flush=True)
    done = int(acknowledged.split()[-1]) + 1
"""
