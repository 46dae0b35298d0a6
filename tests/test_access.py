"""Who may what, over HTTP: scopes, tokens for one store, revocation, and no file of tokens that opens by being gone."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from logitstore.service.tokens import new_token, revoke_token
from tests.served import serving
from tests.stores import small_store

ASKED = b'{"documents": [[1, 2, 3]]}'
READS = ("/v1/stores", "/v1/stores/a", "/v1/stores/a/shards", "/a/zarr.json")
OPEN = ("/health", "/ready", "/openapi.json", "/docs")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        small_store(tmp_path / "stores" / f"{name}.zarr", shards=1)
    new_token(tmp_path / "tokens.json", "somebody", ["read"])
    return tmp_path / "tokens.json"


@pytest.fixture
def url(file: Path) -> Iterator[str]:
    with serving(file.parent / "stores", tokens=file) as found:
        yield found


def get(url: str, place: str, token: str = "", kind: str = "Bearer") -> int:
    headers = {"Authorization": f"{kind} {token}"} if token else {}
    if place.endswith("/targets"):
        return httpx2.post(url + place, content=ASKED, headers=headers).status_code
    return httpx2.get(url + place, headers=headers).status_code


@pytest.mark.parametrize("place", [*READS, "/metrics", "/v1/stores/a/targets", "/none", "/none/none"])
def test_without_a_token_that_is_known_nothing_is_answered(url: str, file: Path, place: str) -> None:
    token = new_token(file, "t", ["read"])
    expected = 404 if place == "/none" else 401
    assert get(url, place) == get(url, place, token + "x") == get(url, place, "x") == expected
    assert get(url, place, token, "Basic") == get(url, place, token, "Token") == expected
    assert get(url, f"{place}?token={token}") == expected


def test_what_is_refused_for_want_of_a_token_says_which_scheme(url: str) -> None:
    answer = httpx2.get(f"{url}/v1/stores")
    assert answer.headers["www-authenticate"] == "Bearer" and "LOGITSTORE_TOKEN" in answer.json()["error"]


def test_health_and_what_the_routes_are_need_no_token_and_name_no_store(file: Path) -> None:
    path = file.parent / "kept-to-themselves.zarr"
    small_store(path)
    with serving(path, tokens=file) as url:
        for damaged in (False, True):
            if damaged:
                (path / "zarr.json").write_bytes(b"{}")
            for place in OPEN:
                answer = httpx2.get(url + place)
                assert answer.status_code == (503 if damaged and place == "/ready" else 200)
                assert "kept-to" not in answer.text


@pytest.mark.parametrize("scopes", [["write"], ["teach"], ["write", "teach"]])
def test_a_token_that_does_not_read_reads_nothing(url: str, file: Path, scopes: list[str]) -> None:
    token = new_token(file, "t", scopes)
    for place in (*READS, "/metrics", "/v1/stores/a/targets"):
        assert get(url, place, token) == 403


def test_a_token_for_one_store_sees_no_other_whether_or_not_it_exists(url: str, file: Path) -> None:
    auth = {"Authorization": f"Bearer {new_token(file, 't', ['read'], ['a'])}"}
    listed = httpx2.get(f"{url}/v1/stores", headers=auth).json()["stores"]
    assert [store["name"] for store in listed] == ["a"]
    assert httpx2.get(f"{url}/v1/stores/a", headers=auth).status_code == 200
    for place in ("/v1/stores/{}", "/v1/stores/{}/shards", "/{}/zarr.json", "/{}/none"):
        said = {
            (answer.status_code, answer.text.replace(name, "NAME"))
            for name in ("bbbb", "none")
            for answer in [httpx2.get(url + place.format(name), headers=auth)]
        }
        assert len(said) == 1 and said.pop()[0] == 403
        assert httpx2.get(url + place.format("b"), headers=auth).status_code == 403
    assert httpx2.get(f"{url}/metrics", headers=auth).status_code == 403  # whose labels are names of stores


def test_a_revoked_token_is_refused_at_once_and_a_new_one_served_at_once(url: str, file: Path) -> None:
    token = new_token(file, "t", ["read"])
    assert get(url, "/v1/stores", token) == 200
    revoke_token(file, token.split("_")[1])
    assert get(url, "/v1/stores", token) == 401


@pytest.mark.parametrize("damage", ["gone", "empty", "malformed", "a folder", "too long"])
def test_a_file_of_tokens_that_cannot_be_read_opens_nothing_until_it_can(url: str, file: Path, damage: str) -> None:
    token, whole = new_token(file, "t", ["read"]), file.read_bytes()
    assert get(url, "/v1/stores", token) == 200
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"empty": b"", "malformed": whole[:-9], "too long": b" " * (5 << 20)}[damage])
    for place in READS:
        answer = httpx2.get(url + place, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 503 and str(file) not in answer.text
        assert get(url, place) == 401 and get(url, place, token, "Basic") == 401
    assert get(url, "/health") == 200
    if file.is_dir():
        file.rmdir()
    file.write_bytes(whole)
    assert get(url, "/v1/stores", token) == 200


def test_a_token_with_odd_bytes_is_no_fault_of_ours(url: str) -> None:
    for value in (b"Bearer \xff\xfe", b"Bearer ls_\xc3\xa9_\xff", b"Bearer", b"bearer\tls_a_b", b"\xff"):
        assert httpx2.get(f"{url}/v1/stores", headers=[(b"Authorization", value)]).status_code == 401


def test_counts_grow_with_the_stores_and_not_with_what_clients_make_up(url: str, file: Path) -> None:
    auth = {"Authorization": f"Bearer {new_token(file, 't', ['read'])}"}

    def lines() -> list[str]:
        text = httpx2.get(f"{url}/metrics", headers=auth).text
        return [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]

    for name in ("a", "none-1"):
        httpx2.post(f"{url}/v1/stores/{name}/targets", content=ASKED, headers=auth)
        httpx2.get(f"{url}/{name}/none", headers=auth)
        httpx2.request("BREW-1", f"{url}/{name}", headers=auth)
        httpx2.get(f"{url}/v1/stores", headers=auth)
    lines()
    before = lines()
    for number in range(2, 40):
        httpx2.post(f"{url}/v1/stores/none-{number}/targets", content=ASKED, headers=auth)
        httpx2.get(f"{url}/none-{number}/none?{number}", headers=auth | {"User-Agent": str(number)})
        httpx2.request(f"BREW-{number}", f"{url}/none-{number}", headers=auth)
        httpx2.get(f"{url}/v1/stores/a{number}", headers=auth)
    assert lines() == before and not any("none-" in line for line in before)


def test_prometheus_reads_the_counts(url: str, file: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    auth = {"Authorization": f"Bearer {new_token(file, 't', ['read'])}"}
    httpx2.post(f"{url}/v1/stores/a/targets", content=ASKED, headers=auth)
    answer = httpx2.get(f"{url}/metrics", headers=auth)
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    counts = {s.labels["outcome"]: s.value for s in found["logitstore_documents"].samples if s.name.endswith("_total")}
    assert counts == {"hit": 0, "miss": 1} and answer.headers["content-type"].startswith("text/plain; version=")


def test_a_service_that_only_reads_lets_nobody_write_or_teach(file: Path) -> None:
    token = new_token(file, "t", ["read", "write", "teach"])
    with serving(file.parent / "stores", tokens=file, read_only=True) as url:
        facts = httpx2.get(f"{url}/v1/stores/a", headers={"Authorization": f"Bearer {token}"}).json()
    assert (facts["writable"], facts["teaches"], facts["teacher_state"]) == (False, False, "none")
    assert json.dumps(facts)
