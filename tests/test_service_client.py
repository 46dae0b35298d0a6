"""What is asked again, what is told, and how much a service may send: real HTTP, through a proxy that breaks it."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from logitstore.errors import ConfigError, ServiceError, ServiceLostError, WireError
from logitstore.service.tokens import new_token, read_grants, revoke_token
from logitstore.service_client import ServiceClient
from logitstore.store import open_store
from logitstore.wire import MOST_WAITS, Answer, Kind
from logitstore.zarr_store import ZarrStore
from tests.faulty_proxy import Fault, Proxy, first, proxied, status
from tests.served import running, serving
from tests.stores import records, shard_folder, small_store

LENGTHS = (9, 70, 2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.http_client.SILENT_S", 0.5)
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 2)
    monkeypatch.setattr("logitstore.http_client.FIRST_WAIT_S", 0.02)
    monkeypatch.delenv("LOGITSTORE_TOKEN", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s.zarr", lengths=LENGTHS)
    made.save_index()
    return made


@pytest.fixture
def service(store: ZarrStore) -> Iterator[tuple[Proxy, ServiceClient]]:
    with serving(store.folder) as url, proxied(url) as (proxy, near), closing(ServiceClient(f"{near}/s")) as client:
        yield proxy, client


def shard_file(store: ZarrStore) -> tuple[str, bytes]:
    path = max(shard_folder(store).rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    return str(path.relative_to(store.folder)), path.read_bytes()


@pytest.mark.parametrize("fault", [Fault("close"), Fault("stall"), Fault("cut", 100), status(503), status(429)])
def test_what_fails_twice_is_asked_again(store: ZarrStore, service: tuple[Proxy, ServiceClient], fault: Fault) -> None:
    (proxy, client), (name, data) = service, shard_file(store)
    proxy.fault = first(2, fault)
    assert client.read(name) == data
    assert len(proxy.asked) == 3


def test_a_file_that_is_cut_again_and_again_goes_on_where_it_was(
    store: ZarrStore, service: tuple[Proxy, ServiceClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    (proxy, client), (name, data) = service, shard_file(store)
    proxy.fault = lambda _: Fault("cut", 40)
    client.patience_s = 0.2  # much less than all attempts take together
    monkeypatch.setattr("logitstore.http_client.FIRST_WAIT_S", 0.01)
    assert client.read(name) == data and client.read(name, 5, 100) == data[5:100]
    assert len(proxy.asked) > len(data) // 41


def test_retry_after_is_kept_and_nobody_waits_longer_than_is_worth_it(service: tuple[Proxy, ServiceClient]) -> None:
    proxy, client = service
    waited: list[float] = []
    client._sleep = waited.append
    proxy.fault = first(1, status(429, "1"))
    client.read("zarr.json")
    assert waited == [1.0]
    proxy.fault = lambda _: status(503, "86400")
    with pytest.raises(ServiceLostError, match=r"zarr.json of .*/s does not answer, asked 1 times .*503: not now"):
        client.read("zarr.json")


def test_a_service_that_is_silent_or_gone_is_lost_within_bounded_time(service: tuple[Proxy, ServiceClient]) -> None:
    proxy, client = service
    for proxy.fault in (lambda _: Fault("stall"), lambda _: Fault("close")):
        begin = time.monotonic()
        with pytest.raises(ServiceLostError, match="is the service up"):
            client.facts()
        assert time.monotonic() - begin < 6


def test_a_wait_is_told_once_however_many_wait(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.http_client.TOLD_AFTER_S", 0.01)
    said: list[str] = []
    with (
        serving(store.folder) as url,
        proxied(url) as (proxy, near),
        closing(ServiceClient(f"{near}/s", say=said.append)) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        proxy.fault = first(12, status(503))
        assert len({len(data) for data in pool.map(client.read, ["zarr.json"] * 4)}) == 1
    assert said == [f"waiting for {near}/s ({near}/s/zarr.json answers 503: not now)"]


@pytest.mark.parametrize(
    "url",
    ["http://", "http://h", "http://h/", "ftp://h/s", "http://[::1/s", "http://h:99999/s", "http://h:x/s", "http://h/s?a",
     "http://h/s#a", "h/s", "http://\x00/s"],
)  # fmt: skip
def test_what_is_no_url_of_a_store_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a store; type one such as https://HOST:8470/NAME"):
        ServiceClient(url)


@pytest.mark.parametrize(("tail", "prefix"), [("", ""), ("/", ""), ("", "/team/stores"), ("//", "/a")])
def test_a_url_may_end_in_a_slash_or_have_a_path_in_front(store: ZarrStore, tail: str, prefix: str) -> None:
    with serving(store.folder) as url, proxied(url) as (proxy, near), running(behind(prefix, near)) as outer:
        client = ServiceClient(f"{outer}{prefix}/s{tail}")
        assert (client.facts() or {})["name"] == "s" and client.shards() == store.shard_names
        assert len(open_store(f"{outer}{prefix}/s{tail}")) == len(store) and proxy.of("GET /s/zarr.json")


def behind(prefix: str, upstream: str) -> Any:
    """A reverse proxy that takes a path away."""
    import httpx2

    async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
        assert scope["path"].startswith(prefix)
        async with httpx2.AsyncClient(verify=False) as client:  # reading certificates takes longer than the answer
            found = await client.request(scope["method"], upstream + scope["path"].removeprefix(prefix))
        headers = [(b"content-length", found.headers["content-length"].encode())]
        await send({"type": "http.response.start", "status": found.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": found.content})

    return app


@pytest.mark.parametrize(("host", "listed"), [("127.0.0.1", []), ("0.0.0.0", ["0.0.0.0"])])
def test_no_proxy_is_asked_for_this_machine_nor_for_what_the_system_lists(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch, host: str, listed: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # which never answers
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        monkeypatch.setattr("httpx2._utils.getproxies", lambda: {"http": url})  # macOS: its settings'
        monkeypatch.setattr("logitstore.http_client.proxy_bypass", listed.__contains__)
        with serving(store.folder) as there:
            assert len(open_store(f"{there.replace('127.0.0.1', host)}/s")) == len(store)


def test_ipv6_and_odd_names(store: ZarrStore, tmp_path: Path) -> None:
    odd = small_store(tmp_path / "a.b_c-1.zarr")
    with serving(store.folder, odd.folder) as url:
        assert len(open_store(f"{url}/a.b_c-1")) == len(odd)
        with pytest.raises(ServiceError, match=r"/v1/stores/no%20such answers 404: .*no such.*it has a\.b_c-1, s"):
            open_store(f"{url}/no such")
    assert ServiceClient("http://[::1]:8470/s").api == "http://[::1]:8470/v1/stores/s"


def test_a_refusal_is_one_line_with_what_to_type(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens"
    other, own = (new_token(tokens, "n", ("read",), stores) for stores in (("other",), ("s",)))
    with serving(store.folder, tokens=tokens) as url:
        for token, expected in (("", "401: .*LOGITSTORE_TOKEN"), ("x", "401: .*LOGITSTORE_TOKEN"), (other, "403: ")):
            with (
                closing(ServiceClient(f"{url}/s", token)) as client,
                pytest.raises(ServiceError, match=expected) as caught,
            ):
                client.facts()
            assert "\n" not in str(caught.value) and not (token and token in str(caught.value))
        monkeypatch.setenv("LOGITSTORE_TOKEN", own)
        with closing(ServiceClient(f"{url}/s")) as client:
            assert client.facts() is not None
            revoke_token(tokens, read_grants(tokens)[1].id)
            with pytest.raises(ServiceError, match="401: "):
                client.read("zarr.json")
    monkeypatch.setenv("LOGITSTORE_TOKEN", "a\nb")
    with pytest.raises(ConfigError, match="LOGITSTORE_TOKEN is no token"):
        ServiceClient("http://h/s")


def test_what_a_service_says_moves_no_cursor_and_has_an_end(service: tuple[Proxy, ServiceClient]) -> None:
    proxy, client = service
    proxy.fault = lambda _: status(409, body=json.dumps({"error": "\x1b[2J\u202e" + "\nno" * 9000}))
    with pytest.raises(ServiceError, match=r"409: \[2J no no") as caught:
        client.facts()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


class Endless(BaseHTTPRequestHandler):
    """Answers everything with the same bytes, for ever."""

    piece = b" " * (1 << 16)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(self.piece)
        except OSError:
            pass

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endless() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/s"
        server.shutdown()
        thread.join()


def test_an_answer_that_does_not_end_is_not_taken(endless: str, store: ZarrStore) -> None:
    client, manifest = ServiceClient(endless), store.manifest
    with pytest.raises(WireError, match="an answer of more than"):
        client.json("GET", client.api)
    assert len(client.read("shards/x", 0, 100_000)) == 100_000
    document = store.token_ids(0)
    with pytest.raises(ServiceLostError, match="a frame of"):
        list(client.ask([document], manifest.recipe, manifest.fingerprint))


def test_signs_of_life_have_an_end_too(endless: str, store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = store.manifest.recipe
    monkeypatch.setattr(Endless, "piece", Answer(0, Kind.WAIT).to_bytes(recipe) * 100)
    with pytest.raises(ServiceLostError, match="an answer that does not end"):
        list(ServiceClient(endless).ask([store.token_ids(0)], recipe, store.manifest.fingerprint))
    assert MOST_WAITS < 10**5


@pytest.mark.parametrize("lie", ["another document", "beyond the vocabulary", "another place", "a flipped byte"])
def test_answers_that_lie_are_not_believed(
    endless: str, store: ZarrStore, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    recipe, other = store.manifest.recipe, records([9], seed=8)[0]
    record = store.record(0)
    if lie == "beyond the vocabulary":
        record.records[:, :4] = 255
    told = Answer(1 if lie == "another place" else 0, Kind.HIT, other if lie == "another document" else record)
    try:
        frame = bytearray(told.to_bytes(recipe))
    except (ValueError, IndexError):
        return  # our own writer refuses to write it
    frame[-1] ^= lie == "a flipped byte"
    monkeypatch.setattr(Endless, "piece", bytes(frame) + Answer(0, Kind.END).to_bytes(recipe))
    with pytest.raises(ServiceLostError, match=r"cannot be read|not what was sent|not end"):
        list(ServiceClient(endless).ask([store.token_ids(0)], recipe, store.manifest.fingerprint))


@pytest.mark.parametrize("names", [["../x"], ["a" * 10**5], [7], "x", [["0" * 16]], ["0" * 15 + "É"]])
def test_names_of_shards_that_are_none_are_refused(service: tuple[Proxy, ServiceClient], names: Any) -> None:
    proxy, client = service
    proxy.fault = lambda _: status(200, body=json.dumps({"shards": names}))
    with pytest.raises(WireError, match="says what no service says"):
        client.shards()


def test_documents_that_no_service_takes_are_not_asked_for(
    store: ZarrStore, service: tuple[Proxy, ServiceClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.service_client.MOST_TOKENS", 50)
    manifest, documents = store.manifest, [store.token_ids(number) for number in range(len(store))]
    found = {a.document: a for a in service[1].ask(documents, manifest.recipe, manifest.fingerprint)}
    assert found.keys() == set(range(len(store)))
    failed = [number for number, answer in found.items() if answer.kind == Kind.FAILED]
    assert [len(documents[number]) for number in failed] == [70, 70]


def test_a_busy_service_is_waited_for_longer_than_one_that_is_gone(
    store: ZarrStore, service: tuple[Proxy, ServiceClient]
) -> None:
    proxy, client = service
    client.patience_s = 0.3
    proxy.fault = first(8, status(429), "targets")
    manifest = store.manifest
    assert len(list(client.ask([store.token_ids(0)], manifest.recipe, manifest.fingerprint))) == 1
    proxy.fault = lambda _: status(503)
    with pytest.raises(ServiceLostError, match="503"):
        list(client.ask([store.token_ids(0)], manifest.recipe, manifest.fingerprint))


def test_https_with_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = [tmp_path / "key.pem", tmp_path / "cert.pem"]
    try:
        names = [
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout",
            str(files[0]),
            "-out",
            str(files[1]),
        ]
        subprocess.run(["openssl", *made, *names], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with HTTPServer(("127.0.0.1", 0), Served) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"https://127.0.0.1:{server.server_port}/s"
        with pytest.raises(ServiceLostError, match="type SSL_CERT_FILE"):
            ServiceClient(url).read("zarr.json")
        monkeypatch.setenv("SSL_CERT_FILE", str(files[1]))
        assert ServiceClient(url).read("zarr.json") == b"{}"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(ConfigError, match="type SSL_CERT_FILE"):
            ServiceClient(url)
        server.shutdown()
        thread.join()


class Served(BaseHTTPRequestHandler):
    """Answers everything with an empty object."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass
