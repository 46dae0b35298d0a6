"""A store's documents over HTTP: as `query` and `stats` have them, and each as the store gives it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest

from logitstore.key import document_key
from logitstore.measures import UNKNOWN_LABEL
from logitstore.query import query
from logitstore.service import document_json, scan
from logitstore.service.document_json import document_json as as_json
from logitstore.service.scan import Scan
from logitstore.service.shelf import Served
from logitstore.service.tokens import new_token
from logitstore.stats_report import to_json
from logitstore.store_stats import of_store
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore
from tests.page_world import LENGTHS, page_manifest, page_store, page_tokens, page_vocabulary, record
from tests.served import serving
from tests.stores import VOCAB, VOCABULARY, guessed, manifest, records, shard_folder, small_store, tokens

SELECTIONS = ("threshold:8", "top-k:6", "random:9", "top-p:0.9:12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stores")
    for i, select in enumerate(SELECTIONS):
        page_store(made / f"s{i}.zarr", select, seed=i, temperatures=(1.0, 2.0) if i == 0 else (1.0,))
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx2.Client]:
    with serving(folder) as base, httpx2.Client(base_url=f"{base}/v1/stores") as found:
        yield found


def get(client: httpx2.Client, path: str, **params: Any) -> Any:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=pytest.fail)  # no NaN, no Infinity


def test_documents_are_those_of_query_in_its_order(folder: Path, client: httpx2.Client) -> None:
    store = ZarrStore(Served("s0", folder / "s0.zarr").files, folder / "s0.zarr")
    asked: list[tuple[dict[str, Any], list[str]]] = [({}, []), ({"sort": "length"}, []), ({"sort": "tail_mass"}, [])]
    asked += [({"sort": "entropy", "descending": True}, ["length>20"]), ({"sort": "nll"}, ["nll>2", "length<100"])]
    for how, where in asked:
        params = how | {"descending": str(how.get("descending", False)).lower(), "where": where}
        answer = get(client, "/s0/documents", **params)
        expected = [found.to_json() for found in query(store, where, how.get("sort"), quiet=True,
                                                        descending=how.get("descending", False))]  # fmt: skip
        assert answer["documents"] == expected and answer["matching"] == len(expected)
        assert get(client, "/s0/documents", **params, offset=1, limit=2)["documents"] == expected[1:3]
    assert get(client, "/s0/documents", descending="true")["documents"][0]["document"] == len(LENGTHS) - 1


def test_the_whole_text_is_searched_whatever_its_case(client: httpx2.Client) -> None:
    whole = page_vocabulary().joined(page_tokens(300).tolist()).decode(errors="replace")
    only_there = whole[-30:]
    found = get(client, "/s1/documents", text=only_there.upper())
    assert [each["length"] for each in found["documents"]] == [300] and found["searched"] == len(LENGTHS)
    assert get(client, "/s1/documents", text="<SCRIPT>")["matching"] == len(LENGTHS)
    assert get(client, "/s1/documents", text="<script>", where="length<30")["matching"] == 2
    assert get(client, "/s1/documents", text="nowhere to be found")["matching"] == 0


@pytest.mark.parametrize("number", range(len(SELECTIONS)))
def test_histograms_are_those_of_stats(folder: Path, client: httpx2.Client, number: int) -> None:
    path = folder / f"s{number}.zarr"
    answer = get(client, f"/s{number}/stats")
    assert (answer.pop("scanned"), answer.pop("of"), answer.pop("finished")) == (5, 5, True)
    expected = to_json(of_store(ZarrStore(Served("x", path).files, path), quiet=True)) | {"store": f"s{number}"}
    assert answer == json.loads(json.dumps(expected))


@pytest.mark.parametrize("number", range(len(SELECTIONS)))
def test_a_document_is_as_the_store_gives_it(folder: Path, client: httpx2.Client, number: int) -> None:
    served = Served("x", folder / f"s{number}.zarr")
    for document in range(len(LENGTHS)):
        token_ids, targets = served.store.document(document)
        answer = get(client, f"/s{number}/documents/{document}")
        assert get(client, f"/s{number}/documents/{document_key(token_ids).hex()}") == answer
        assert answer["token_ids"] == token_ids.tolist() and answer["selection"] == SELECTIONS[number]
        np.testing.assert_allclose(answer["surprise"], -targets.label_log_prob, rtol=1e-3)
        np.testing.assert_allclose(answer["entropy"], targets.entropy, rtol=1e-3)
        np.testing.assert_allclose(answer["tail_mass"], np.exp(targets.log_tail_mass), rtol=1e-3)
        for t in range(len(targets)):
            kept = targets.weights[t] > 0
            stored = targets.ids[t][kept].tolist()
            head = dict(zip(stored, targets.in_head[t][kept].tolist(), strict=True))
            weights = dict(zip(stored, targets.weights[t][kept].tolist(), strict=True))
            ids, shown, first = answer["ids"][t], answer["weights"][t], answer["head"][t]
            assert dict(zip(ids, shown, strict=True)) == pytest.approx(weights, rel=1e-3)
            assert [head[i] for i in ids] == [True] * first + [False] * (len(ids) - first)
            assert all(part == sorted(part, reverse=True) for part in (shown[:first], shown[first:]))
            assert answer["kept"][t] == len(weights)


def test_another_temperature_has_other_weights(client: httpx2.Client) -> None:
    one, two = (get(client, "/s0/documents/2", temperature=t) for t in (1, 2))
    assert (one["temperature"], two["temperature"], two["temperatures"]) == (1, 2, [1, 2])
    assert one["surprise"] == two["surprise"] and one["weights"] != two["weights"]


def test_pieces_are_the_text_and_a_cut_character_stands_where_it_ends(client: httpx2.Client) -> None:
    answer = get(client, "/s0/documents/2")
    vocabulary = page_vocabulary()
    assert "".join(answer["pieces"]) == b"".join(vocabulary.tokens[i] for i in answer["token_ids"]).decode()
    assert answer["pieces"][4:6] == ["", "😀"] and answer["texts"]["6"] == "\\xf0\\x9f"


def test_a_long_document_is_given_in_parts(client: httpx2.Client) -> None:
    whole = get(client, "/s1/documents/2")
    part = get(client, "/s1/documents/2", start=5, positions=10)
    assert part["start"] == 5 and part["pieces"] == whole["pieces"][5:16] and part["length"] == whole["length"]
    assert all(part[name] == whole[name][5:15] for name in ("surprise", "ids", "weights", "head", "kept"))
    assert part["token_ids"] == whole["token_ids"][5:16]
    last = whole["length"] - 2
    assert len(get(client, "/s1/documents/2", start=last)["surprise"]) == 1


def test_more_entries_than_are_shown_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = manifest("threshold:9")
    found = guessed(tokens(1, 30), made.recipe, np.random.default_rng(0))
    targets = made.recipe.read(found.records)
    whole = as_json(found.token_ids, targets, VOCABULARY, made)
    monkeypatch.setattr(document_json, "MOST_ENTRIES", 3)
    cut = as_json(found.token_ids, targets, VOCABULARY, made)
    assert cut["ids"] == [row[:3] for row in whole["ids"]] and cut["kept"] == whole["kept"] and max(cut["kept"]) == 9


def test_what_a_store_does_not_know_is_null(tmp_path: Path) -> None:
    made = replace(page_manifest("top-k:2"), imported="dwq", unknown=("entropy", UNKNOWN_LABEL))
    store = ZarrStore.create(tmp_path / "s.zarr", made, page_vocabulary())
    store.write_documents([record(page_tokens(40), made)])
    with serving(tmp_path / "s.zarr") as base, httpx2.Client(base_url=f"{base}/v1/stores") as client:
        answer = get(client, "/s/documents/0")
        labels = answer["token_ids"][1:]
        known = [label in row for label, row in zip(labels, answer["ids"], strict=True)]
        assert [value is not None for value in answer["surprise"]] == known and not all(known)
        assert set(answer["entropy"]) == {None}
        listed = get(client, "/s/documents")
        assert listed["documents"][0]["entropy"] is None and set(listed["unknown"]) == {"entropy", "nll"}
        refused = client.get("/s/documents", params={"sort": "entropy"})
        assert refused.status_code == 400 and "does not know entropy: dwq keeps no entropy" in refused.text


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("documents?sort=nl", 400, "did you mean nll"),
        ("documents?where=nll", 400, "is no condition"),
        ("documents?where=nl%3E3", 400, "did you mean nll"),
        ("documents?descending=yes", 400, "descending is 'yes', expected true or false"),
        ("documents?limit=0", 400, "limit is '0', expected a whole number from 1 to 200"),
        ("documents?limit=201", 400, "from 1 to 200"),
        ("documents?offset=-1", 400, "offset is '-1'"),
        ("documents?offset=1e3", 400, "offset is '1e3'"),
        ("documents?ofset=1", 400, "'ofset' is no parameter here; did you mean offset?"),
        ("documents?text=" + 1001 * "x", 400, "more than 1,000 characters"),
        ("stats?sort=nll", 400, "'sort' is no parameter here"),
        ("documents/5", 404, "document '5' is not in s1, which holds 5"),
        ("documents/" + 32 * "0", 404, "is not in s1"),
        ("documents/nothing", 404, "is not in s1"),
        ("documents/-1", 404, "is not in s1"),
        ("documents/0?temperature=3", 400, "temperature"),
        ("documents/0?temperature=nan", 400, "temperature is 'nan', expected a number"),
        ("documents/0?start=39", 400, "start is '39'"),
        ("documents/0?positions=5000", 400, "positions is '5000', expected a whole number from 1 to 4,096"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(
    client: httpx2.Client, path: str, status: int, expected: str
) -> None:
    answer = client.get(f"/s1/{path}")
    assert answer.status_code == status and expected in answer.json()["error"], answer.text
    assert answer.json().keys() == {"error"} and "\n" not in answer.json()["error"]


def test_a_token_for_one_store_opens_no_other(folder: Path, tmp_path: Path) -> None:
    secret = new_token(tmp_path / "tokens.json", "reader", ["read"], ["s0"])
    with serving(folder, tokens=tmp_path / "tokens.json") as base:
        for path in ("stats", "documents", "documents/0"):
            url, headers = f"{base}/v1/stores/s0/{path}", {"Authorization": f"Bearer {secret}"}
            assert [httpx2.get(url).status_code, httpx2.get(url, headers=headers).status_code] == [401, 200]
            assert httpx2.get(url.replace("s0", "s1"), headers=headers).status_code == 403


def test_a_scan_goes_on_where_it_was_and_says_how_far_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "time", SimpleNamespace(monotonic=count().__next__))  # a document takes a second
    small_store(tmp_path / "s", lengths=(7, 2, 30, 9))
    reading = Scan(Served("s", tmp_path / "s"))
    assert reading.progress() == scan.Progress(0, 8, False)
    for known in range(1, 8):
        assert reading.read_on(1.5) == scan.Progress(known, 8, False)
        assert len(reading.rows(sort="length").numbers) == reading.stats().documents == known
    assert reading.read_on(1.5) == scan.Progress(8, 8, True)


def test_new_shards_are_read_and_one_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    served = Served("s", tmp_path / "s")
    reading = Scan(served)
    assert reading.read_on(10) == scan.Progress(6, 6, True)
    store.write_documents(records([50, 60], seed=9))
    served.store.refresh()
    assert reading.progress() == scan.Progress(6, 8, False) and reading.read_on(10).scanned == 8
    longest = reading.rows(sort="length", descending=True).numbers[:2]
    assert [len(served.store.token_ids(int(n))) for n in longest] == [60, 50]
    gone = shard_folder(store)
    gone.rename(tmp_path / "elsewhere")
    served.store.refresh()
    left = reading.read_on(10)
    assert left.scanned == left.of == len(served.store) == reading.stats().documents < 8


def test_a_document_that_two_shards_hold_is_counted_once(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    store.write_documents([*records([7], seed=0), *records([11], seed=5)])
    served = Served("s", tmp_path / "s")
    reading = Scan(served)
    assert reading.read_on(10) == scan.Progress(7, 7, True) and reading.stats().documents == 7
    numbers = reading.rows().numbers.tolist()
    assert numbers == list(range(7))
    for number in numbers:
        token_ids = served.store.token_ids(number)
        assert served.store.number_of(document_key(token_ids)) == number
    by_shard = served.store.catalog.numbers()
    assert sorted(n for shard in by_shard.values() for n in shard.tolist()) == [-1, *range(7)]


def test_what_is_kept_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MOST_DOCUMENTS", 4)
    monkeypatch.setattr(scan, "MOST_TEXT_BYTES", 1)
    small_store(tmp_path / "s")
    reading = Scan(Served("s", tmp_path / "s"))
    assert reading.read_on(10) == scan.Progress(4, 6, True)
    found = reading.rows(text="<")
    assert len(found.numbers) == found.searched == 1 and len(reading.rows().numbers) == 4


def test_while_one_request_reads_the_store_others_are_answered(tmp_path: Path) -> None:
    page_store(tmp_path / "s.zarr", "top-k:4", lengths=(20, 30, 40))
    served = Served("s", tmp_path / "s.zarr")
    reading = Scan(served)
    with reading._reading:  # as if another request read
        assert reading.read_on(0.01) == scan.Progress(0, 3, False)
        assert served.lock.acquire(blocking=False)
        served.lock.release()
    assert reading.read_on(10).finished


def test_an_empty_store_has_an_empty_page(tmp_path: Path) -> None:
    ZarrStore.create(tmp_path / "s.zarr", manifest(), VOCABULARY)
    with serving(tmp_path / "s.zarr") as base, httpx2.Client(base_url=f"{base}/v1/stores") as client:
        for params in ({}, {"sort": "nll"}, {"text": "a"}):
            answer = get(client, "/s/documents", **params)
            assert answer["documents"] == [] and answer["finished"] and answer["of"] == 0
        assert get(client, "/s/stats")["histograms"]["entropy"]["mean"] is None
        assert client.get("/s/documents/0").status_code == 404


def test_ids_that_no_token_has_are_named() -> None:
    made = manifest("top-k:3")
    found = guessed(tokens(1, 9), made.recipe, np.random.default_rng(0))
    few = Vocabulary((b"a",) * 8, frozenset(), None, None)
    answer = as_json(found.token_ids, made.recipe.read(found.records), few, made)
    beyond = next(i for i in answer["token_ids"] if i >= 8)
    assert answer["texts"][str(beyond)] == f"<no token {beyond}>" and VOCAB > 8
