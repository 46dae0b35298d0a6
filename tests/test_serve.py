"""`logitstore serve` as a process: what it refuses, TLS, and that stopping it loses nothing that was told."""

import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from logitstore.errors import ConfigError
from logitstore.http_client import is_loopback
from logitstore.service.serve import ServeConfig, reached_at
from logitstore.service.tokens import new_token
from logitstore.store import open_store
from logitstore.wire import Kind, read_answers
from tests.guessing import handles
from tests.runs import World, make_world
from tests.stores import small_store, tokens
from tests.test_cli import finish, start

ON_LOOPBACK = ("--port", 0, "--quiet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@contextmanager
def served(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, which listens, and its URL."""
    process = start("logitstore", "serve", *args)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("listening on "):
                break
        assert lines and lines[-1].startswith("listening on "), (lines, process.communicate()[1])
        yield process, lines[-1].split()[2].rstrip(";")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--host", "0.0.0.0"), "--tokens"),
        (("--host", "::"), "--tokens"),
        (("--host", ""), "--tokens"),
        (("--tls-cert", "x.pem"), "--tls-key"),
        (("--tls-cert", "x.pem", "--tls-key", "y.pem"), "no file x.pem"),
        (("--tokens", "none.json"), "token new"),
        (("--read-only", "--teacher", "x"), "--read-only"),
        (("--queue-tokens", "0"), "--queue-tokens"),
        (("--teacher", "none.gguf"), "nothing at none.gguf"),
        (("--teacher", ".", "--adapter-path", "none"), "no folder none"),
        (("--adapter-path", "x"), "--teacher T"),
        (("none.zarr",), "nothing at none.zarr"),
        (("--host", "no-such-host.invalid", "--insecure"), "--host"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path: Path, args: tuple[str, ...], word: str) -> None:
    small_store(tmp_path / "s.zarr")
    code, out, err = finish(start("logitstore", "serve", tmp_path / "s.zarr", "--port", 0, *args))
    assert code == 2 and not out
    assert err.startswith("Error: ") and err.count("\n") == 1 and word in err and "Traceback" not in err


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = finish(start("logitstore", "serve", tmp_path / "s.zarr", "--port", port))
    assert code == 2 and err.count("\n") == 1 and f"127.0.0.1:{port}" in err and "another --port" in err and not out


def test_a_package_that_is_missing_is_told_in_one_line(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['uvicorn'] = None\n"
        "from distill_cli.logitstore import main; main(prog_name='logitstore')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(tmp_path)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "uvicorn is not installed; type `pip install 'logitstore[serve]'`" in done.stderr


def test_help_and_tokens_import_no_server(tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'starlette', 'uvicorn', 'mlx', 'zarr', 'httpx2'} & set(sys.modules))))\n"
        "from distill_cli.logitstore import main; main(prog_name='logitstore')"
    )
    for args in (["serve", "--help"], ["token", "new", "--tokens", str(tmp_path / "t.json"), "--name", "x"]):
        done = subprocess.run([sys.executable, "-c", code, *args], text=True, capture_output=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_was_taught_is_in_shards_when_it_is_stopped(world: World, tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(world.store, path)
    store = open_store(path)
    asked = [tokens(7000 + n, 9) for n in range(3)]
    body = json.dumps({"documents": [document.tolist() for document in asked]}).encode()
    with served(path, "--teacher", world.teacher, *ON_LOOPBACK) as (process, url):
        answer = httpx2.post(f"{url}/v1/stores/s/targets", content=body, timeout=60)
        found = list(read_answers([answer.content], asked, store.manifest.recipe))
        assert [a.kind for a in found] == [Kind.TAUGHT] * 3
        process.send_signal(how)
        assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    assert not list(path.glob(".journal-*"))
    store = open_store(path)
    for a in found:
        kept = store.answer(asked[a.document])  # type: ignore[attr-defined]
        assert a.record is not None and kept.records.tobytes() == a.record.records.tobytes()


def test_a_killed_service_leaves_a_journal_that_the_next_one_takes_over(world: World, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(world.store, path)
    body = json.dumps({"documents": [tokens(7000, 9).tolist()]}).encode()
    with served(path, "--teacher", world.teacher, *ON_LOOPBACK) as (process, url):
        assert httpx2.post(f"{url}/v1/stores/s/targets", content=body, timeout=60).status_code == 200
        process.kill()
        process.wait()
    assert list(path.glob(".journal-*"))
    with served(path, *ON_LOOPBACK) as (process, url):  # without a teacher
        answer = httpx2.post(f"{url}/v1/stores/s/targets", content=body, timeout=60)
        (found,) = read_answers([answer.content], [tokens(7000, 9)], open_store(path).manifest.recipe)
        assert found.kind == Kind.HIT
    assert not list(path.glob(".journal-*"))


def test_it_stops_while_clients_wait_and_while_connections_idle(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / "large").write_bytes(bytes(64 << 20))
    with served(tmp_path / "s.zarr", *ON_LOOPBACK) as (process, url):
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(where), socket.create_connection(where) as stalled:
            stalled.sendall(b"GET /s/large HTTP/1.1\r\nHost: x\r\n\r\n")
            stalled.recv(10)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_it_stops_at_once_while_its_teacher_loads(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "config.json")  # reading it never ends
    with served(tmp_path / "s.zarr", "--teacher", model, *ON_LOOPBACK) as (process, url):
        assert httpx2.get(f"{url}/v1/stores/s").json()["teacher_state"] == "loading"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_teacher_that_does_not_load_leaves_the_stores_served(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    (tmp_path / "none").mkdir()
    with served(tmp_path / "s.zarr", "--teacher", tmp_path / "none", *ON_LOOPBACK) as (process, url):
        for _ in range(300):
            facts = httpx2.get(f"{url}/v1/stores/s").json()
            if facts["teacher_state"] == "lost":
                break
            time.sleep(0.05)
        assert facts["teacher_state"] == "lost" and facts["documents"] == 6 and not facts["teaches"]
        assert httpx2.get(f"{url}/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None and "the teacher does not load: " in process.stdout.read()  # though quiet


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    small_store(tmp_path / "s.zarr")
    token = new_token(tmp_path / "tokens.json", "x", ["read"])
    args = ("--tls-cert", cert, "--tls-key", key, "--tokens", tmp_path / "tokens.json", *ON_LOOPBACK)
    with served(tmp_path / "s.zarr", *args) as (_, url):
        assert url.startswith("https://")
        with httpx2.Client(verify=ssl.create_default_context(cafile=str(cert))) as client:
            assert client.get(f"{url}/v1/stores").status_code == 401
            listed = client.get(f"{url}/v1/stores", headers={"Authorization": f"Bearer {token}"}).json()
            assert [store["name"] for store in listed["stores"]] == ["s"]
        with pytest.raises(httpx2.ConnectError, match=r"(?i)certificate"):
            httpx2.get(f"{url}/health")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(url.replace("https", "http") + "/health")


def test_a_key_of_another_certificate_is_one_line(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    small_store(tmp_path / "s.zarr")
    cert, key = certificate
    key.write_text(cert.read_text())
    code, _, err = finish(
        start("logitstore", "serve", tmp_path / "s.zarr", "--tls-cert", cert, "--tls-key", key, *ON_LOOPBACK)
    )
    assert code == 2 and err.count("\n") == 1 and "--tls-key" in err and "--port" not in err


def test_the_log_has_a_line_for_each_request_unless_it_is_quiet(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    for quiet in (False, True):
        args = [tmp_path / "s.zarr", "--port", 0, *(["--quiet"] if quiet else [])]
        with served(*args) as (process, url):
            httpx2.get(f"{url}/health?secret=1")
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            assert process.stdout is not None
            out = process.stdout.read()
        assert out.count("GET /health 200") == (not quiet) and "secret" not in out


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org")],
)
def test_which_hosts_only_this_machine_reaches(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    if not own:
        with pytest.raises(ConfigError, match="--insecure"):
            ServeConfig((Path("x"),), host=host)
    assert ServeConfig((Path("x"),), host=host, insecure=True).host == host


def test_a_store_on_all_addresses_is_said_to_be_on_this_machine_by_its_name() -> None:
    assert reached_at("0.0.0.0") == reached_at("::") == socket.gethostname()
    assert (reached_at("big.local"), reached_at("::1")) == ("big.local", "[::1]")


def test_two_processes_on_one_store_end_with_every_document_once(world: World, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(world.store, path)
    before = len(open_store(path))
    asked = [tokens(8000 + n, 9) for n in range(30)]
    body = json.dumps({"documents": [document.tolist() for document in asked]}).encode()
    args = (path, "--teacher", world.teacher, *ON_LOOPBACK)
    statuses: list[Any] = []
    with served(*args) as (one, first), served(*args) as (two, second):
        asks = [
            threading.Thread(
                target=lambda url=url: statuses.append(
                    httpx2.post(f"{url}/v1/stores/s/targets", content=body, timeout=60).status_code
                )
            )
            for url in (first, second)
        ]
        for thread in asks:
            thread.start()
        for thread in asks:
            thread.join(60)
        for process in (one, two):
            process.send_signal(signal.SIGTERM)
        assert (one.wait(30), two.wait(30), statuses) == (0, 0, [200, 200])
    store = open_store(path)
    held = sum(len(store.shard(name).keys) for name in store.shard_names)  # type: ignore[attr-defined]
    assert held == len(store) == before + 30


def test_it_serves_more_connections_than_a_shell_gives_files(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(128, handles() + 32), hard))  # which the process begins with
    try:
        running = served(tmp_path / "s.zarr", *ON_LOOPBACK)
        _, url = running.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as stack:
        stack.push(running)
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
        assert httpx2.get(f"{url}/s/zarr.json", timeout=10).status_code == 200
