"""A store behind a service goes on from what lies here when the service does not, and asks it again when it does."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.errors import CorruptStoreError, IncompatibleStoreError, LogitstoreError, ServiceError, StoreWriteError
from logitstore.manifest import Manifest
from logitstore.overlay import TAUGHT, folder_of, remove
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.served_store import ServedStore, open_served
from logitstore.service.tokens import new_token, read_grants, revoke_token
from logitstore.store import create_store, open_store
from logitstore.zarr_store import ZarrStore
from tests.faulty_proxy import Fault, Proxy, proxied, status
from tests.served import serving
from tests.stores import VOCABULARY, guessed, manifest, shard_folder, small_store, tokens

LENGTHS = (40, 70, 2)


class Guesser:
    """A teacher of the small stores: guesses, always the same for a document."""

    vocab_size = manifest().recipe.vocab_size

    def __init__(self) -> None:
        self.asked = 0

    def manifest(self, recipe: Recipe) -> Manifest:
        return replace(manifest(), recipe=recipe)

    def records(self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe) -> list[DocumentRecord]:
        self.asked += len(documents)
        return [guessed(ids, recipe, np.random.default_rng(ids.astype(np.int64))) for ids in documents]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 0.3)
    monkeypatch.setattr("logitstore.http_client.FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("logitstore.served_store.PATIENCE_S", 0.3)
    monkeypatch.setattr("logitstore.served_store.SILENT_S", 1)
    monkeypatch.setattr("logitstore.served_store.IMPATIENCE_S", 1)
    monkeypatch.setattr("logitstore.served_store.PROBED_S", 0.3)
    monkeypatch.delenv("LOGITSTORE_TOKEN", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s.zarr", 3, LENGTHS)
    made.save_index()
    return made


@pytest.fixture
def served(store: ZarrStore) -> Iterator[tuple[Proxy, str]]:
    with serving(store.folder) as url, proxied(url) as (proxy, near):
        yield proxy, f"{near}/s"


@contextmanager
def opened(url: str, overlay: Path, say: Callable[[str], object] = lambda _: None) -> Iterator[ServedStore]:
    store = open_served(url, overlay, 10**9, say)
    with closing(store):
        yield store


def down(proxy: Proxy) -> str:
    """The service stops to answer; the address at which it is again."""
    upstream, proxy.upstream = proxy.upstream, None
    assert upstream is not None
    return upstream


def answers(store: Any, of: ZarrStore, numbers: Sequence[int]) -> list[bool]:
    return [store.get(of.token_ids(number)) is not None for number in numbers]


def test_it_reads_as_the_store_itself(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with opened(served[1], tmp_path / "o") as near:
        assert (len(near), near.positions, near.shard_count) == (len(store), store.positions, store.shard_count)
        assert near.manifest == store.manifest and near.vocabulary == store.vocabulary and near.fidelity is None
        for number in range(len(store)):
            ids = store.token_ids(number)
            mine, own = near.get(ids), store.get(ids)
            assert mine is not None and own is not None and np.array_equal(mine.weights, own.weights)
            assert np.array_equal(near.token_ids(number), ids) and near.answered(ids) == len(ids) - 1
            assert near.codes([ids])[0] is not None and near.record(number).key in near
        assert near.get(tokens(999, 50)) is None and near.disk_bytes == sum(near.plane_bytes().values())
        for write in (lambda: near.writer("x"), lambda: near.save_fidelity({})):
            with pytest.raises(StoreWriteError, match="can only be read; type a path of your own"):
                write()


def test_away_from_the_start_it_is_what_was_fetched(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    said: list[str] = []
    with opened(served[1], tmp_path / "o") as near:
        near.record(0)
    down(served[0])
    begin = time.monotonic()
    with opened(served[1], tmp_path / "o", said.append) as near:
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 6 and len(near) == 3
    assert time.monotonic() - begin < 5 and len(said) == 1 and "going on with what was fetched into" in said[0]
    with pytest.raises(ServiceError, match=r"does not answer, asked .* is the service up"):
        open_served(served[1], tmp_path / "other", 10**9)


def test_lost_on_the_way_it_says_so_once_and_goes_on_and_is_used_again_later(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with opened(served[1], tmp_path / "o", said.append) as near:
        near.record(0)
        upstream = down(served[0])
        begin = time.monotonic()
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 6
        assert time.monotonic() - begin < 3
        asked = len(served[0].asked)
        assert len(said) == 1 and "asking again in 5 minutes" in said[0]
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 6
        assert len(served[0].asked) == asked and len(said) == 1
        monkeypatch.setattr("logitstore.served_store.AWAY_S", 0.0)
        near._away_until = 0.0  # the minutes are over
        assert answers(near, store, [8]) == [False] and len(said) == 1
        served[0].upstream = upstream
        assert answers(near, store, range(9)) == [True] * 9
        assert said[1:] == [f"{served[1]} answers again"]


def test_nothing_is_waited_for_where_everything_lies_here(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    with opened(served[1], tmp_path / "o") as near:
        assert all(answers(near, store, range(9)))
        served[0].fault = lambda _: Fault("stall")
        begin = time.monotonic()
        assert all(answers(near, store, range(9)))
        assert time.monotonic() - begin < 0.5


def test_a_silent_service_is_waited_for_once(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with opened(served[1], tmp_path / "o") as near:
        near.record(0)
        served[0].fault = lambda _: Fault("stall")
        begin = time.monotonic()
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 6
        assert time.monotonic() - begin < 4


def test_connections_that_are_cut_after_a_time_disturb_nobody(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.served_store.PATIENCE_S", 5)
    served[0].most_s = 0.3
    with opened(served[1], tmp_path / "o") as near:
        for number in range(6):
            assert near.get(store.token_ids(number)) is not None
            time.sleep(0.31)


def test_few_round_trips_before_the_first_document(served: tuple[Proxy, str], tmp_path: Path) -> None:
    for most in (26, 4):
        served[0].asked.clear()
        with opened(served[1], tmp_path / "o") as near:
            assert len(served[0].asked) <= most, served[0].asked
            near.record(0)
    assert len(served[0].asked) == 4


def test_what_is_damaged_here_is_said_and_fetched_again(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    said: list[str] = []
    with opened(served[1], tmp_path / "o") as near:
        assert all(answers(near, store, range(9)))
        folder = near.mirror.folder
    file = folder / "store" / "shards" / store.shard_names[1] / "entries-0" / "c" / "0" / "0"
    for index in (False, True):
        damaged = folder / "index" / "keys" / "c" / "0" if index else file
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
        with opened(served[1], tmp_path / "o", said.append) as near:
            assert all(answers(near, store, range(9)))
        assert len(said) == 1 and "to be fetched again: " + ("index" if index else store.shard_names[1]) in said.pop()
    file.write_bytes(b"x")
    down(served[0])
    with opened(served[1], tmp_path / "o", said.append) as near:  # then it is a miss like others
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 3 + [True] * 3


def test_what_is_damaged_here_while_the_service_is_away_is_a_miss(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    said: list[str] = []
    for name in ("documents", "entries-0"):
        with opened(served[1], tmp_path / "o") as near:
            assert all(answers(near, store, range(9)))
        with opened(served[1], tmp_path / "o", said.append) as near:
            damaged = near.mirror.folder / "store" / "shards" / store.shard_names[1] / name / "c" / "0" / "0"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
            served[0].upstream, upstream = None, served[0].upstream
            assert answers(near, store, range(9)) == [True] * 3 + [False] * 3 + [True] * 3
            served[0].upstream = upstream
        assert any("going on with what was fetched" in line for line in said) and store.shard_names[1] in said[-1]
        said.clear()


def test_what_the_service_has_damaged_is_one_line(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    file = shard_folder(store) / "entries-0" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with opened(served[1], tmp_path / "o") as near:
        with pytest.raises(CorruptStoreError, match=rf"^{served[1]}/shards/.*its bytes are not those") as caught:
            near.record(0)
        assert "\n" not in str(caught.value) and near.record(5) is not None


def test_what_the_service_has_damaged_its_teacher_computes_again(store: ZarrStore, tmp_path: Path) -> None:
    documents = [store.token_ids(number) for number in range(9)]
    file = shard_folder(store) / "entries-0" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with taught(store) as (_, url, guesser), opened(url, tmp_path / "o") as near:
        for document in documents:
            found = near.get(document)
            if found is None:  # of the shard that was put aside when the first was asked for
                (record,) = near.taught([document])
                assert record is not None
        assert guesser.asked == 3 and all(near.answered(document) == len(document) - 1 for document in documents)
    assert len(list((store.folder / "shards").glob(".quarantine-*"))) == 1


def test_a_store_that_was_replaced_is_told(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with opened(served[1], tmp_path / "o") as near:
        near.record(0)
        shutil.rmtree(store.folder)
        ZarrStore.create(store.folder, manifest(seed=5), VOCABULARY)
        with pytest.raises(LogitstoreError, match=r"another store|cannot be read"):
            near.record(5)
    with pytest.raises(IncompatibleStoreError, match="is another store than the one that was fetched"):
        open_served(served[1], tmp_path / "o", 10**9)


def test_a_store_that_is_deleted_leaves_what_was_fetched(store: ZarrStore, tmp_path: Path) -> None:
    documents, said = [store.token_ids(number) for number in range(9)], list[str]()
    with serving(store.folder.parent) as url:
        with opened(f"{url}/s", tmp_path / "o", said.append) as near:
            near.record(0)
            shutil.rmtree(store.folder)
            assert [near.get(ids) is not None for ids in documents] == [True] * 3 + [False] * 6
        assert said == [f"there is no store at {url}/s; going on with what was fetched, and asking again in 5 minutes"]
        with pytest.raises(ServiceError, match="404: there is no store 's' here"):
            open_served(f"{url}/s", tmp_path / "o", 10**9)


def test_a_budget_that_is_too_small_is_said_once(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wait in ("PATIENCE_S", "SILENT_S", "IMPATIENCE_S"):  # a slow machine is no service that is gone
        monkeypatch.setattr(f"logitstore.served_store.{wait}", 20)
    said: list[str] = []
    with closing(open_served(served[1], tmp_path / "o", 9000, said.append)) as near:
        for _ in range(2):
            assert all(answers(near, store, range(9)))
    assert len(said) == 1 and "is over its budget" in said[0] and said[0].endswith("type --overlay-gb with more")


# ---- a teacher ------------------------------------------------------------------------------------------------------


@contextmanager
def taught(store: ZarrStore, **options: Any) -> Iterator[tuple[Proxy, str, Guesser]]:
    guesser = Guesser()
    with serving(store.folder, teacher=lambda: guesser, **options) as url, proxied(url) as (proxy, near):
        yield proxy, f"{near}/s", guesser


def test_what_is_taught_once_is_never_asked_for_again(store: ZarrStore, tmp_path: Path) -> None:
    documents = [tokens(900 + n, 20 + n) for n in range(20)]
    with taught(store) as (proxy, url, guesser):
        with opened(url, tmp_path / "o") as near:
            found = near.taught(documents)
            assert [r.key for r in found if r] == [guesser.records([d], near.manifest.recipe)[0].key for d in documents]
            asked = len(proxy.of("targets"))
        with opened(url, tmp_path / "o") as near:
            assert all(near.answered(document) == len(document) - 1 for document in documents)
            assert all(near.get(document) is not None for document in documents)
            assert all(codes is not None for codes in near.codes(documents))
        assert asked == len(proxy.of("targets")) == 1
        with opened(url, tmp_path / "p") as near:
            near.taught(documents)
        assert guesser.asked == 2 * len(documents)  # ours, and once for both
    with opened(url, tmp_path / "o") as near:  # and with nobody there
        assert all(near.get(document) is not None for document in documents)


def test_many_threads_and_processes_share_an_overlay(store: ZarrStore, tmp_path: Path) -> None:
    documents, failures = [tokens(700 + n, 30) for n in range(12)], list[Exception]()
    with taught(store) as (_, url, guesser):

        def run(first: int) -> None:
            try:
                with opened(url, tmp_path / "o") as near:
                    for document in documents[first:] + documents[:first]:
                        assert near.get(document) is not None or near.taught([document])[0] is not None
                    assert all(answers(near, store, range(9)))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(first,)) for first in (0, 3, 6, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and guesser.asked == len(documents)
    with opened(url, tmp_path / "o") as near:
        assert all(near.get(document) is not None for document in documents)
        assert not list(near.mirror.folder.glob(f".{TAUGHT}-*"))


@pytest.mark.parametrize(("fault", "stays"), [(status(503), True), (status(507), True), (status(422), True),
                                              (status(502, body="no"), False), (status(401), False)])  # fmt: skip
def test_where_only_its_teacher_gives_nothing_the_store_is_read_on(
    store: ZarrStore, tmp_path: Path, fault: Fault, stays: bool
) -> None:
    said: list[str] = []
    with taught(store) as (proxy, url, _), opened(url, tmp_path / "o", said.append) as near:
        proxy.fault = lambda line: fault if "targets" in line else None
        assert near.taught([tokens(900, 20)]) == [None]
        assert near.taught([tokens(901, 20)]) == [None] and len(said) == 1
        assert answers(near, store, range(9)) == [stays] * 9
        assert ("its teacher is asked again in 5 minutes" in said[0]) == stays


def test_a_lost_service_costs_one_wait_whoever_asks(store: ZarrStore, tmp_path: Path) -> None:
    said: list[str] = []
    with taught(store) as (proxy, url, _), opened(url, tmp_path / "o", said.append) as near:
        near.record(0)
        down(proxy)
        begin = time.monotonic()
        assert near.taught([tokens(900, 20)]) == [None] and answers(near, store, [0, 8]) == [True, False]
        assert time.monotonic() - begin < 2 and len(said) == 1


def test_a_token_that_is_revoked_on_the_way_is_one_line(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("LOGITSTORE_TOKEN", new_token(tmp_path / "tokens", "n", ("read", "teach")))
    with taught(store, tokens=tmp_path / "tokens") as (_, url, _), opened(url, tmp_path / "o", said.append) as near:
        assert near.taught([tokens(900, 20)])[0] is not None and near.record(0) is not None
        revoke_token(tmp_path / "tokens", read_grants(tmp_path / "tokens")[0].id)
        assert answers(near, store, range(9)) == [True] * 3 + [False] * 6 and near.get(tokens(900, 20)) is not None
        assert near.taught([tokens(901, 20)]) == [None]
        assert len(said) == 1 and "401" in said[0] and "LOGITSTORE_TOKEN" in said[0] and "\n" not in said[0]


def test_a_token_that_may_not_teach_is_told_why(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("LOGITSTORE_TOKEN", new_token(tmp_path / "tokens", "n", ("read",)))
    with taught(store, tokens=tmp_path / "tokens") as (_, url, _), opened(url, tmp_path / "o", said.append) as near:
        assert not near.teaches and near.taught([tokens(900, 20)]) == [None]
        assert len(said) == 1 and said[0].endswith("does not allow that; ask for one with --scope teach")


def test_a_full_disk_for_what_is_taught_is_one_line(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taught(store) as (_, url, _), opened(url, tmp_path / "o") as near:
        near.taught([tokens(900, 20)])

        def full(*_: object) -> None:
            raise StoreWriteError("taught.lmdb cannot be written: No space left on device; mend this")

        monkeypatch.setattr("logitstore.lmdb_store.LmdbStore.change", full)
        with pytest.raises(StoreWriteError, match="No space left on device"):
            near.taught([tokens(901, 20)])
        assert near.get(tokens(900, 20)) is not None


def test_a_trimmed_overlay_is_filled_again(store: ZarrStore, tmp_path: Path) -> None:
    with taught(store) as (_, url, _), opened(url, tmp_path / "o") as near:
        near.taught([tokens(900, 20)])
        shutil.rmtree(folder_of(tmp_path / "o", url) / "store" / "shards")
        assert remove(folder_of(tmp_path / "o", url) / TAUGHT)
        assert near.get(tokens(900, 20)) is not None  # its file is open
        assert all(answers(near, store, range(9)))
        assert near.taught([tokens(901, 20)])[0] is not None


def test_what_is_taught_goes_into_the_file_that_is_there(store: ZarrStore, tmp_path: Path) -> None:
    with taught(store) as (_, url, _), opened(url, tmp_path / "o") as near:
        near.taught([tokens(900, 20)])
        path = folder_of(tmp_path / "o", url) / TAUGHT
        assert remove(path)  # by another process, and a third is taught something
        create_store(path, near.manifest, near.vocabulary)
        near.taught([tokens(901, 20)])
        assert open_store(path).get(tokens(901, 20)) is not None


def test_for_one_beginning_that_many_shards_share_few_are_fetched(tmp_path: Path) -> None:
    made, recipe, rng = (
        create_store(tmp_path / "s.zarr", manifest(), VOCABULARY),
        manifest().recipe,
        np.random.default_rng(5),
    )
    assert isinstance(made, ZarrStore)
    system = tokens(70, 40)
    for first in range(0, 100, 5):
        made.write_documents(
            [guessed(np.concatenate([system, tokens(200 + first + i, 45)]), recipe, rng) for i in range(5)]
        )
    made.save_index()
    with serving(made.folder) as url, opened(f"{url}/s", tmp_path / "overlay") as store:
        assert store.answered(np.concatenate([system, tokens(999, 9)])) >= 39
        fetched = list((store.mirror.folder / "store" / "shards").glob("[!.]*/"))
        assert 1 <= len(fetched) <= 13  # of 20
