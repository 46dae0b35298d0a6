import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import pytest

from distill_cli.distill_train import main
from distill_trainer.parallel import Processes
from distill_trainer.train import train
from logitstore.errors import ConfigError
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CORPUS, save_tiny_model, tiny_tokenizer

NUMBERS = ("loss", "kd_loss", "ce_loss", "grad_norm", "hits", "misses", "trained_tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Five documents: in batches of four, every other batch is one document, and one of two processes has none of it.

    The store lacks one; the documents weigh differently.
    """
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder, store=False)
    rows = [{"text": text, "counts": 0.5 + i} for i, text in enumerate(CORPUS[:5])]
    world.build(world.store, dataset=str(write_jsonl(folder / "most.jsonl", rows[:4])))
    write_jsonl(world.data, rows)
    return world


def start(stack: ExitStack, folder: Path, size: int = 2) -> "list[subprocess.Popen[str]]":
    """Processes that are a ring on this machine and make the runs of `child`; none outlives the stack."""
    taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in taken]))
    for each in taken:
        each.close()
    found = []
    for rank in range(size):
        command = [sys.executable, "-c", "from tests.test_parallel import child; child()", str(folder)]
        ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(command, env=os.environ | ring, **pipes))
        stack.callback(found[-1].kill)
    return found


def child() -> None:
    """One of the processes: a run to its end; one until a signal comes, gone on with; all of that; an endless one."""
    signal.alarm(100)  # also where a ring waits in vain
    folder = Path(sys.argv[1])

    def run(*args: object) -> None:
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in args])
        sys.stdout.write(f"ended with {ended.value.code}\n")
        sys.stdout.flush()

    run("--config", folder / "two.json")
    run("--config", folder / "across.json")
    run("--config", folder / "cut.json")
    iters = len(lines(folder / "cut")) + 4
    run("--config", folder / "cut.json", "--iters", iters, "--resume")
    run("--config", folder / "cut.json", "--iters", iters, "--out", folder / "whole")
    run("--config", folder / "cut.json", "--out", folder / "lost")


@pytest.fixture(scope="module")
def runs(world: World) -> tuple[Path, list[str]]:
    """The folder of all runs, and what each process said."""
    folder = world.folder / "runs"
    folder.mkdir()
    (folder / "two.json").write_text(json.dumps(world.config(folder / "two", **shared(world)).to_json()))
    (folder / "across.json").write_text(json.dumps(world.config(folder / "across", **across(world)).to_json()))
    dropout = {"rank": 4, "dropout": 0.3, "scale": 10.0}
    options = {"store": (str(world.store),), "on_miss": "hard-only", "batch_size": 4, "lora_parameters": dropout}
    endless = world.config(folder / "cut", iters=100_000, **options)
    (folder / "cut.json").write_text(json.dumps(endless.to_json()))
    with ExitStack() as stack:
        children = start(stack, folder)
        for out, number in (("cut", signal.SIGTERM), ("lost", signal.SIGKILL)):
            while not (folder / out / "metrics.jsonl").exists() or len(lines(folder / out)) < 3:
                assert all(each.poll() is None for each in children), [each.communicate() for each in children]
                time.sleep(0.01)
            children[1].send_signal(number)
        said = [each.communicate(timeout=100) for each in children]
    assert [each.returncode for each in children] == [0, -signal.SIGKILL], said
    return folder, [*(output for output, _ in said), said[0][1]]


def shared(world: World) -> dict[str, Any]:
    options = {"store": (str(world.store),), "on_miss": "skip", "outcome_column": "counts", "fine_tune_type": "full"}
    return options | {
        "pack": True,
        "iters": 6,
        "batch_size": 4,
        "max_grad_norm": 1.0,
        "optimizer": "sgd",
        "learning_rate": 0.01,
    }


def across(world: World) -> dict[str, Any]:
    """The same with a student of another tokenizer."""
    student = save_tiny_model(world.folder / "across", seed=5, vocab_size=330)
    tiny_tokenizer(330).save_pretrained(student)
    return shared(world) | {"student": str(student), "cross_vocab": "mapped", "min_coverage": 0.0}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, name: str) -> dict[str, mx.array]:
    found = mx.load(str(out / name))
    assert isinstance(found, dict)
    return found


def test_two_processes_learn_what_one_does_and_the_first_alone_writes(
    tmp_path: Path, world: World, runs: tuple[Path, list[str]]
) -> None:
    folder, (said, other_said, _) = runs
    train(world.config(tmp_path / "one", **shared(world)))
    assert "6 steps" in said
    assert other_said.splitlines() == [f"ended with {code}" for code in (0, 0, 130, 0, 0)]
    one, two = lines(tmp_path / "one"), lines(folder / "two")
    assert [step["step"] for step in two] == list(range(1, 7))
    assert len({step["hits"] for step in one}) > 1  # batches of four and of one
    for name in NUMBERS:
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-4, abs=1e-6), name
    alone, together = (weights(out, "model.safetensors") for out in (tmp_path / "one", folder / "two"))
    for name, value in weights(world.student, "model.safetensors").items():
        moved = mx.abs(alone[name] - value).max().item()
        assert mx.abs(alone[name] - together[name]).max().item() <= 1e-3 * moved + 1e-7, name
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (folder / "two").iterdir()}


def test_two_processes_count_what_a_teacher_of_another_tokenizer_teaches_as_one_does(
    tmp_path: Path, world: World, runs: tuple[Path, list[str]]
) -> None:
    folder, _ = runs
    train(world.config(tmp_path / "one", **across(world)))
    one, two = lines(tmp_path / "one"), lines(folder / "across")
    assert all(0 < step["taught"] < step["hits"] for step in one)
    for name in (*NUMBERS, "taught"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-4, abs=1e-6), name


def test_a_signal_to_any_process_ends_all_before_the_same_step_and_resuming_is_exact(
    runs: tuple[Path, list[str]],
) -> None:
    folder, (*said, _) = runs
    codes = [[line for line in text.splitlines() if line.startswith("ended with")] for text in said]
    assert codes[0][:5] == codes[1] and codes[0][2] == "ended with 130"
    cut, whole = ([[step[name] for name in NUMBERS] for step in lines(folder / run)] for run in ("cut", "whole"))
    assert len(cut) >= 7 and cut == whole
    name = "adapters.safetensors"
    once, resumed = weights(folder / "whole", name), weights(folder / "cut", name)
    assert all(mx.array_equal(value, resumed[name]).item() for name, value in once.items())


def test_a_process_that_is_killed_ends_the_others_with_a_line_and_what_was_learned_is_kept(
    runs: tuple[Path, list[str]],
) -> None:
    folder, (said, _, errors) = runs
    assert said.splitlines()[-1] == "ended with 2"
    assert "Error: another process of this run is gone" in errors and "--resume" in errors
    assert [int(path.name) for path in (folder / "lost" / "checkpoints").iterdir()] == [len(lines(folder / "lost"))]


def test_what_cannot_be_shared_is_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 5 .* 3 of them .* type --batch-size 6"):
        Processes(0, 3).require_shares(world.config(tmp_path, batch_size=5, alpha=0.0))
    kept = {"store": ("new.zarr",), "teacher": str(world.teacher), "write_back": True}
    with pytest.raises(ConfigError, match="--write-back has one writer, and 2 processes"):
        Processes(1, 2).require_shares(world.config(tmp_path, batch_size=4, **kept))
    Processes().require_shares(world.config(tmp_path, batch_size=5, **kept))


def test_shares_are_disjoint_and_together_the_batch_and_each_draws_its_own() -> None:
    batch, drawn = [5, 3, 8, 1, 0], []
    shares = [Processes(rank, 3).share(batch) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == sorted(batch)
    assert Processes().share(batch) == batch
    for rank, step in ((0, 7), (1, 7), (0, 8), (0, 7)):
        Processes(rank, 3).seed(1, step)
        drawn.append(mx.random.uniform().item())
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


def test_a_process_that_finds_none_of_the_others_does_not_train_alone(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(ConfigError, match=r"process 1 of a run, and MLX found no others; type mlx.launch"):
        train(world.config(tmp_path / "o", store=(str(world.store),)))
    assert not (tmp_path / "o").exists()
