import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from distill_cli import distill_train, logitstore
from distill_trainer.config import TrainConfig
from logitstore.build import BuildConfig
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from tests.runs import World, make_world
from tests.stores import VOCABULARY, manifest, records

COMMANDS = {
    "logitstore": "distill_cli.logitstore",
    "distill-train": "distill_cli.distill_train",
    "distill-eval": "distill_cli.distill_eval",
    "distill-merge": "distill_cli.distill_merge",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def start(name: str, *args: object, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """A command in a process of its own, which a Ctrl-C reaches however the tests were started.

    Its processes would begin as they do on macOS, and on Linux since Python 3.14: locks that they share are tracked.
    """
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import multiprocessing; multiprocessing.set_start_method('spawn')\n"
        f"from {COMMANDS[name]} import main; main(prog_name={name!r})"
    )
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def interrupt_when(process: subprocess.Popen[str], begun: Callable[[], bool]) -> tuple[int, str, str]:
    """Ctrl-C as soon as `begun` says so."""
    while not begun() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    return finish(process)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys, atexit; from {COMMANDS[name]} import main\n"
        "heavy = {'numpy', 'zarr', 'mlx', 'transformers', 'tqdm', 'yaml', 'datasets'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stdout.endswith("HEAVY []\n")


def test_the_flags_and_their_defaults_are_the_fields_of_the_configs() -> None:
    for command, config, others in (
        (distill_train.main, TrainConfig, {"lora_parameters", "optimizer_config", "lr_schedule"}),
        (logitstore.main.commands["build"], BuildConfig, set()),
    ):
        known = {field.name: field for field in fields(config)}
        flags = {param.name: param for param in command.params if param.name not in ("config_file", "version", "help")}
        assert flags.keys() == known.keys() - others
        given = {name: flag.to_info_dict()["default"] for name, flag in flags.items()}
        assert all(known[name].default in (MISSING, value, value or ()) for name, value in given.items())


def test_help_says_defaults_as_they_are_typed_and_what_may_be_typed_more_than_once() -> None:
    def said(command: click.Command, *words: str) -> str:
        return " ".join(CliRunner().invoke(command, [*words, "--help"]).output.split())

    assert "entries for each. [default: 1]" in said(logitstore.main, "build")
    token = said(logitstore.main, "token", "new")
    assert "read, write or teach; may be repeated. [default: read]" in token
    assert "it is served as; may be repeated. [default: all]" in token
    assert "LoRA's rank, scale and dropout are the key lora_parameters of --config. [default: lora]" in said(
        distill_train.main
    )


def test_a_config_file_gives_values_and_a_flag_wins(world: World, tmp_path: Path) -> None:
    text = f"student: {world.student}\ndataset: {world.data}\nstore: {world.store}\n"
    text += "iters: 2\nlearning_rate: 1e-4\nquiet: true\n"
    (tmp_path / "run.yaml").write_text(text + "alpha: 0.5\nlora_parameters: {rank: 2, scale: 10.0, dropout: 0.0}\n")
    result = CliRunner().invoke(
        distill_train.main, ["--config", f"{tmp_path}/run.yaml", "--alpha", "0.25", "--out", f"{tmp_path}/o"]
    )
    assert result.exit_code == 0, result.output
    resolved = json.loads((tmp_path / "o" / "distill_train.json").read_text())
    assert (resolved["iters"], resolved["learning_rate"], resolved["alpha"]) == (2, 1e-4, 0.25)
    assert (resolved["lora_parameters"]["rank"], resolved["batch_size"]) == (2, 4)


def test_usage_errors_keep_clicks_own_form() -> None:
    for args, expected in ((["--learning-rate", "x"], "'x' is not a valid float"), ([], "Missing option '--student'")):
        result = CliRunner().invoke(distill_train.main, args)
        assert result.exit_code == 2
        assert result.stderr.startswith("Usage: ")
        assert expected in result.stderr


def test_a_run_from_build_to_student_says_what_it_did_and_nothing_on_stderr(world: World, tmp_path: Path) -> None:
    build = start(
        "logitstore", "build", "--quiet", "--teacher", world.teacher, "--dataset", world.data, "--out", tmp_path / "s"
    )
    code, out, err = finish(build)
    assert (code, err) == (0, "")
    assert "6 documents, 175 positions" in out
    common = ("--student", world.student, "--dataset", world.data, "--iters", 2, "--quiet")
    code, out, err = finish(start("distill-train", *common, "--store", tmp_path / "s", "--out", tmp_path / "o"))
    assert (code, err) == (0, "")
    assert "2 steps" in out
    assert "0 misses" in out
    assert "load it with mlx_lm.load(" in out


def test_inspect_writes_plain_lines_into_a_pipe_and_asks_no_pager(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGER", "false")
    code, out, err = finish(start("logitstore", "inspect", world.store, "--document", 1))
    assert (code, err) == (0, "")
    tokens, targets = open_store(world.store).document(1)
    assert out.startswith(f"document 1: {len(tokens)} tokens")
    assert len(out.splitlines()) == len(targets) + 2
    assert "\x1b" not in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["info", "query", "inspect", "stats", "verify"])
def test_an_answer_that_cannot_be_printed_is_told_in_one_line(world: World, command: str) -> None:
    with Path("/dev/full").open("w") as full:
        process = start("logitstore", command, world.store, stdout=full)
    code, _, err = finish(process)
    assert code == 2
    assert err.startswith("Error: No space left on device") and err.count("\n") == 1


def test_the_second_build_into_a_part_without_documents_says_so(world: World, tmp_path: Path) -> None:
    args = [
        "build",
        "--quiet",
        "--teacher",
        world.teacher,
        "--dataset",
        world.data,
        "--out",
        tmp_path / "s",
        "--limit",
        1,
    ]
    for part in ("1/2", "2/2"):
        result = CliRunner().invoke(logitstore.main, [str(a) for a in (*args, "--shard", part)])
        assert result.exit_code == 0, result.output
    assert len(open_store(tmp_path / "s")) == 1


def test_ctrl_c_in_a_build_says_how_to_go_on_and_the_same_command_finishes(tmp_path: Path) -> None:
    world = make_world(
        tmp_path / "world", [f"Document {n}: " + "all work and no play. " * 9 for n in range(80)], store=False
    )
    args = (
        "build",
        "--quiet",
        "--batch-tokens",
        64,
        "--teacher",
        world.teacher,
        "--dataset",
        world.data,
        "--out",
        world.store,
    )

    def begun() -> bool:
        return any(file.stat().st_size > 30_000 for file in world.store.glob(".journal-*"))

    code, _, err = interrupt_when(start("logitstore", *args), begun)
    assert (code, err.strip()) == (130, "Stopped. What is finished is kept; type the same command to go on.")
    assert not verify(world.store, quiet=True).problems
    code, out, _ = finish(start("logitstore", *args))
    assert code == 0
    assert "80 documents" in out
    assert "computed 80" not in out
    assert verify(world.store, quiet=True).documents == 80


def test_ctrl_c_in_training_saves_the_student_and_what_the_teacher_answered(world: World, tmp_path: Path) -> None:
    args = (
        "--student",
        world.student,
        "--dataset",
        world.data,
        "--store",
        tmp_path / "s",
        "--quiet",
        "--teacher",
        world.teacher,
    )
    metrics = tmp_path / "o" / "metrics.jsonl"

    def begun() -> bool:
        return metrics.exists() and metrics.stat().st_size > 2000

    run = start("distill-train", *args, "--write-back", "--iters", 100_000, "--out", tmp_path / "o")
    code, out, err = interrupt_when(run, begun)
    assert code == 130
    assert err.startswith("Stopped after ")
    assert err.endswith("To go on, type the same command with --resume.\n")
    assert "load it with" in out
    assert (tmp_path / "o" / "adapters.safetensors").exists()
    assert not verify(tmp_path / "s", quiet=True).problems
    assert len(open_store(tmp_path / "s")) == 6
    code, out, _ = finish(start("distill-train", *args, "--write-back", "--iters", 2, "--out", tmp_path / "again"))
    assert (code, "0 misses" in out) == (0, True)


def test_ctrl_c_before_the_first_step_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_trainer.target_source.Teacher", interrupted)
    args = f"--student {world.student} --teacher {world.teacher} --dataset {world.data} --quiet --out {tmp_path}/o"
    result = CliRunner().invoke(distill_train.main, args.split())
    assert result.exit_code == 130
    assert result.stderr.startswith("\nStopped. No student was saved; type the same command again")
    assert not (tmp_path / "o").exists()


def test_stats_are_text_json_and_one_page(world: World, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = finish(start("logitstore", "stats", world.store, "--html", page, "--quiet"))
    assert (code, err) == (0, "")
    assert "documents" in out and "fidelity: stored against" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    code, out, err = finish(start("logitstore", "stats", world.store, "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["documents"] == 6


def test_a_store_goes_from_kind_to_kind_and_out(world: World, tmp_path: Path) -> None:
    for line in (
        ("convert", world.store, tmp_path / "a.zip"),
        ("convert", tmp_path / "a.zip", tmp_path / "a.lmdb"),
        ("merge", world.store, tmp_path / "a.zip", tmp_path / "a.lmdb", tmp_path / "b.zarr"),
        ("gc", tmp_path / "b.zarr", "--dry-run"),
        ("export", tmp_path / "b.zarr", tmp_path / "a.parquet"),
        ("verify", tmp_path / "b.zarr", "--repair"),
        ("info", tmp_path / "a.zip"),
    ):
        result = CliRunner().invoke(logitstore.main, [str(word) for word in line])
        assert result.exit_code == 0, result.output
        assert "6 documents" in result.stdout or line[0] == "gc"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.lmdb", "a.lmdb-lock", "a.parquet", "a.zip", "b.zarr"]


def test_ctrl_c_in_a_conversion_says_how_to_go_on_and_the_same_command_finishes(tmp_path: Path) -> None:
    store = create_store(tmp_path / "a.zarr", manifest(), VOCABULARY)
    with store.writer("build") as writer:
        for seed in range(3):
            writer.append(records([250] * 100, seed=seed))
        writer.commit(list(writer.pending))
    line = ("convert", tmp_path / "a.zarr", tmp_path / "b.zip", "--quiet")
    code, _, err = interrupt_when(start("logitstore", *line), (tmp_path / ".unzipped-b.zip").exists)
    assert (code, err.strip()) == (130, "Stopped. What is finished is kept; type the same command to go on.")
    assert not (tmp_path / "b.zip").exists()
    code, out, _ = finish(start("logitstore", *line))
    assert code == 0 and "300 documents" in out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
