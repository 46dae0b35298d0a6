"""Training from a service is training from the store: the same curve, however much is taught, lost or cut."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distill_cli import logitstore
from distill_trainer.distill_eval import EvalConfig, distill_eval
from logitstore.errors import LogitstoreError, MissingTargetsError
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.faulty_proxy import Fault, Proxy, proxied
from tests.runs import World, make_world
from tests.served import serving
from tests.tiny import CORPUS, save_tiny_model, tiny_tokenizer

TEXTS = (*CORPUS, *(f"{number}: {text}" for number, text in enumerate(CORPUS[:4])))
STEPS = 10
ROUNDING = 0.02
"""Of losses of 4: a teacher that reads other documents in a batch rounds a few entries to the other side."""

Line = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), TEXTS)


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """The metrics of a run from the store itself."""
    return world.train(tmp_path_factory.mktemp("local") / "o", store=(str(world.store),), iters=STEPS)[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 1.0)
    monkeypatch.setattr("logitstore.http_client.FIRST_WAIT_S", 0.05)
    monkeypatch.setattr("logitstore.served_store.PATIENCE_S", 2.0)
    monkeypatch.setattr("logitstore.served_store.PROBED_S", 1.0)


def losses(lines: list[Line]) -> list[float]:
    return [line["loss"] for line in lines]


def missed(world: World, share: float, path: Path) -> ZarrStore:
    """A store that lacks this share of the documents."""
    whole = open_store(world.store)
    store = ZarrStore.create(path, whole.manifest, whole.vocabulary)
    kept = len(whole) - round(share * len(whole))
    if kept:
        store.write_documents([whole.record(number) for number in range(kept)])
        store.save_index()
    return store


def teaching(world: World) -> Callable[[], Teacher]:
    return lambda: Teacher(str(world.teacher))


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_the_curve_is_that_of_local_training_whatever_is_missing(
    world: World, expected: list[Line], tmp_path: Path, share: float
) -> None:
    store = missed(world, share, tmp_path / "s.zarr")
    options: Line = {"iters": STEPS, "overlay": str(tmp_path / "o")}
    with serving(store.folder, teacher=teaching(world)) as url:
        options["store"] = (f"{url}/s",)
        first = world.train(tmp_path / "1", **options)[1]
        second = world.train(tmp_path / "2", **options)[1]
    gone = world.train(tmp_path / "3", **options)[1]
    assert losses(first) == (losses(expected) if not share else pytest.approx(losses(expected), abs=ROUNDING))
    assert losses(second) == losses(first) == losses(gone)
    assert bool(sum(line["misses"] for line in first)) == bool(share)
    assert all(line["misses"] == line["by_service"] for line in first)
    assert not any(line["misses"] for line in [*second, *gone])
    report, whole = verify(store.folder, quiet=True), open_store(store.folder)
    assert not report.problems and report.documents == len(whole) == len(TEXTS)


def learn(world: World, out: Path, url: str, overlay: Path) -> str:
    """A run in a process of its own."""
    return (
        "import distill_kernels, sys; from pathlib import Path; from tests.runs import World; "
        f"World(Path({str(world.folder)!r})).train(Path({str(out)!r}), store=({url!r},), iters={STEPS}, "
        f"overlay={str(overlay)!r})"
    )


@pytest.mark.parametrize("overlays", [("o", "p"), ("o", "o")])
def test_two_at_once_are_taught_once(
    world: World, expected: list[Line], tmp_path: Path, overlays: tuple[str, str]
) -> None:
    store = missed(world, 0.5, tmp_path / "s.zarr")
    with serving(store.folder, teacher=teaching(world)) as url:
        runs = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", learn(world, tmp_path / f"{n}", f"{url}/s", tmp_path / overlay)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for n, overlay in enumerate(overlays)
        ]
        for run in runs:
            assert run.communicate(timeout=100)[1] == "" and run.returncode == 0
    for number in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"{number}" / "metrics.jsonl").read_text().splitlines()]
        assert losses(lines) == pytest.approx(losses(expected), abs=ROUNDING)
    report = verify(store.folder, quiet=True)
    assert not report.problems and report.documents == len(TEXTS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_service(world: World, store: Path, port: int) -> "subprocess.Popen[bytes]":
    words = ["serve", store, "--teacher", world.teacher, "--port", port, "--quiet"]
    command = "import sys; from distill_cli.logitstore import main; main()"
    return subprocess.Popen([sys.executable, "-c", command, *map(str, words)], stdout=subprocess.DEVNULL)


def end(service: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> None:
    if service.poll() is None:
        service.send_signal(number)
        service.wait(30)


def test_a_service_that_is_killed_and_started_again_on_the_way(
    world: World, expected: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.served_store.PATIENCE_S", 60.0)
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 60.0)
    monkeypatch.setattr("logitstore.http_client.LAST_WAIT_S", 0.5)
    store, port, said = missed(world, 1, tmp_path / "s.zarr"), free_port(), list[str]()
    services = [start_service(world, store.folder, port)]
    try:
        with proxied(f"http://127.0.0.1:{port}") as (proxy, url):

            def kill(line: str) -> None:
                if "targets" in line and len(proxy.of("targets")) == 3 and len(services) == 1:
                    end(services[0], signal.SIGKILL)
                    services.append(start_service(world, store.folder, port))

            proxy.fault = kill
            options: Line = {"store": (f"{url}/s",), "iters": STEPS, "overlay": str(tmp_path / "o")}
            from distill_trainer.train import train

            train(world.config(tmp_path / "1", **options), said.append)
    finally:
        for service in services:
            end(service)
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    assert len(services) == 2 and losses(lines) == pytest.approx(losses(expected), abs=ROUNDING)
    assert not [line for line in said if "does not answer" in line]
    assert verify(store.folder, quiet=True).documents == len(TEXTS)


@pytest.fixture
def lost(world: World, tmp_path: Path) -> Iterator[tuple[Proxy, Line]]:
    """A service that is lost after a few documents were taught; and a run's options."""
    store = missed(world, 1, tmp_path / "s.zarr")
    with serving(store.folder, teacher=teaching(world)) as upstream, proxied(upstream) as (proxy, url):

        def fault(line: str) -> Fault | None:
            if "targets" in line and len(proxy.of("targets")) > 3:
                proxy.upstream = None
            return Fault("close") if proxy.upstream is None else None

        proxy.fault = fault
        yield proxy, {"store": (f"{url}/s",), "iters": STEPS, "overlay": str(tmp_path / "o")}


def test_a_service_that_stays_away_is_told_once_and_then_a_miss_is_a_miss(
    world: World, lost: tuple[Proxy, Line], tmp_path: Path
) -> None:
    from distill_trainer.train import train

    said: list[str] = []
    begin = time.monotonic()
    train(world.config(tmp_path / "1", on_miss="hard-only", **lost[1]), said.append)
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in said if "does not answer" in line]
    assert len(told) == 1 and "asking again in 5 minutes" in told[0] and time.monotonic() - begin < 60
    assert lines[0]["by_service"] and sum(line["misses"] - line["by_service"] for line in lines[3:])
    assert sum(line["hits"] for line in lines[5:])  # of the second epoch, what was taught in the first


def test_under_error_it_ends_the_run_which_is_saved_and_goes_on_later(
    world: World, lost: tuple[Proxy, Line], expected: list[Line], tmp_path: Path
) -> None:
    proxy, options = lost
    upstream = proxy.upstream
    with pytest.raises(MissingTargetsError, match=r"its service does not answer .* is saved in .*; --resume goes on"):
        world.train(tmp_path / "1", **options)
    proxy.upstream, proxy.fault = upstream, lambda _: None
    lines = world.train(tmp_path / "1", resume=True, **options)[1]
    assert losses(lines) == pytest.approx(losses(expected), abs=ROUNDING)


def test_it_is_used_again_when_it_is_back(
    world: World, lost: tuple[Proxy, Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill_trainer.train import train

    monkeypatch.setattr("logitstore.served_store.AWAY_S", 0.0)
    (proxy, options), said = lost, list[str]()
    upstream = proxy.upstream

    def say(line: str) -> None:
        said.append(line)
        if "going on with what was fetched" in line:
            proxy.upstream, proxy.fault = upstream, lambda _: None

    train(world.config(tmp_path / "1", on_miss="hard-only", **options), say)
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    assert said[-1].endswith("answers again") or any(line.endswith("answers again") for line in said)
    assert sum(line["misses"] - line["by_service"] for line in lines) <= sum(line["misses"] for line in lines[:4])
    assert not sum(line["misses"] - line["by_service"] for line in lines[5:])


def test_no_more_is_taught_than_the_run_needs(world: World, tmp_path: Path) -> None:
    store = missed(world, 1, tmp_path / "s.zarr")
    with serving(store.folder, teacher=teaching(world)) as url:
        world.train(tmp_path / "1", store=(f"{url}/s",), iters=2, overlay=str(tmp_path / "o"))
    assert len(open_store(store.folder)) == 4


def test_one_of_several_stores_may_be_behind_a_url(world: World, tmp_path: Path) -> None:
    half = missed(world, 0.5, tmp_path / "h.zarr")
    options: Line = {"iters": STEPS, "overlay": str(tmp_path / "o")}
    paths = [(str(half.folder), str(world.store)), (f"{half.folder}=0.5", f"{world.store}=0.5")]
    with serving(world.store) as url:
        for number, (first, second) in enumerate(paths):
            near = second.replace(str(world.store), f"{url}/store")
            local = world.train(tmp_path / f"{number}l", store=(first, second), iters=STEPS, on_miss="hard-only")[1]
            got = world.train(tmp_path / f"{number}u", store=(first, near), on_miss="hard-only", **options)[1]
            assert losses(got) == losses(local)
    local = world.train(tmp_path / "l", store=(str(half.folder), str(world.store)), combine="label")[1]
    got = world.train(
        tmp_path / "u", store=(str(half.folder), f"{url}/store"), combine="label", overlay=str(tmp_path / "o")
    )[1]
    assert losses(got) == losses(local)


def test_a_student_of_another_tokenizer_learns_from_what_is_cached(world: World, tmp_path: Path) -> None:
    student = save_tiny_model(tmp_path / "other", seed=5, vocab_size=350)
    tiny_tokenizer(330).save_pretrained(student)
    with serving(world.store) as url:
        options: Line = {"student": str(student), "cross_vocab": "mapped", "min_coverage": 0.0, "iters": 3}
        local = world.train(tmp_path / "l", store=(str(world.store),), **options)[1]
        got = world.train(tmp_path / "u", store=(f"{url}/store",), overlay=str(tmp_path / "o"), **options)[1]
    assert losses(got) == losses(local)


def test_a_student_is_held_against_a_store_behind_a_url(world: World, tmp_path: Path) -> None:
    config = EvalConfig(str(world.student), str(world.data), store=str(world.store), quiet=True)
    local = distill_eval(config)
    with serving(world.store) as url:
        got = distill_eval(EvalConfig(str(world.student), str(world.data), store=f"{url}/store", quiet=True))
    assert got.figures == local.figures and got.positions == local.positions and tmp_path.exists()


@pytest.mark.parametrize("command", ["info", "verify", "inspect", "stats", "query", "info --json", "verify --json"])
def test_commands_that_read_take_a_url(world: World, command: str) -> None:
    def run(store: str) -> str:
        words = [*command.split(), store, *(["--quiet"] if command in ("stats", "query") else [])]
        result = CliRunner().invoke(logitstore.main, words)
        assert result.exit_code == 0, result.output
        return result.output.replace(store, "STORE")

    with serving(world.store) as url:
        near, own = run(f"{url}/store"), run(str(world.store))
    same = [line for line in own.splitlines() if line in near.splitlines()]  # it has other files: no directories' ones
    assert len(same) >= 0.7 * len(own.splitlines()) and ("all good" in near) == (command == "verify")


def test_verify_of_a_url_names_what_is_damaged(world: World, tmp_path: Path) -> None:
    store = missed(world, 0, tmp_path / "s.zarr")
    file = next(store.folder.glob("shards/*/entries-0/c/0/0"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with serving(store.folder) as url:
        result = CliRunner().invoke(logitstore.main, ["verify", f"{url}/s", "--quiet"])
        assert result.exit_code == 1 and "entries-0/c/0/0: its bytes are not those" in result.output
        for words, said in ((["--repair"], "is no folder"), (["--live", "2"], "type --teacher T")):
            result = CliRunner().invoke(logitstore.main, ["verify", f"{url}/s", *words])
            assert result.exit_code == 2 and said in result.output


def test_what_stands_in_the_way_is_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(world.store) as url:
        for store, overlay in ((f"{url}/none", "o"), (f"{url}/store", "file"), ("http://127.0.0.1:1/s", "o")):
            with pytest.raises(LogitstoreError) as caught:
                world.train(tmp_path / "1", store=(store,), overlay=str(tmp_path / overlay))
            assert "\n" not in str(caught.value) and not (tmp_path / "1").exists()


def test_ctrl_c_is_not_kept_waiting_by_a_silent_service(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.prefetch.JOIN_S", 0.5)
    monkeypatch.setattr("logitstore.served_store.SILENT_S", 30.0)
    store = missed(world, 1, tmp_path / "s.zarr")
    with serving(store.folder, teacher=teaching(world)) as upstream, proxied(upstream) as (proxy, url):
        stalled = threading.Event()

        def fault(line: str) -> Fault | None:
            if "targets" not in line or len(proxy.of("targets")) < 5:
                return None
            if not stalled.is_set():
                stalled.set()
                threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            return Fault("stall")

        proxy.fault = fault
        report, _ = world.train(tmp_path / "1", store=(f"{url}/s",), iters=STEPS, overlay=str(tmp_path / "o"))
        begin = time.monotonic()
        assert report.interrupted and stalled.is_set() and (tmp_path / "1" / "checkpoints").exists()
        assert time.monotonic() - begin < 5
        proxy.fault = lambda _: None
