import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm
import pytest

from distill_trainer.batch_loss import batch_loss
from distill_trainer.held_out import HeldOut
from distill_trainer.output import output_folder
from distill_trainer.pages import run_page
from distill_trainer.targets import TargetSource
from distill_trainer.train import train
from logitstore.errors import ConfigError, CorruptStoreError, ModelError
from tests.runs import World, make_world, write_jsonl
from tests.tiny import save_tiny_model

DROPOUT = {"rank": 4, "dropout": 0.3, "scale": 10.0}
EXACT = (
    "step",
    "loss",
    "kd_loss",
    "ce_loss",
    "hits",
    "misses",
    "trained_tokens",
    "alpha",
    "learning_rate",
    "grad_norm",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def lines(out: Path) -> list[tuple[Any, ...]]:
    """The metrics of a run, all but those that measure the machine."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(step[name] for name in EXACT) for step in steps]


def kept(out: Path) -> list[int]:
    """The steps of the checkpoints, after checking that nothing else lies beside them."""
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def start(out: Path, *args: object) -> "subprocess.Popen[str]":
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from distill_cli.distill_train import main; main()"
    )
    command = [sys.executable, "-c", code, "--config", out.with_suffix(".json"), "--out", out, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), text=True, **pipes)


def stopped(out: Path, steps: int, number: int, *args: object) -> int:
    """Run the command, send it a signal once it has made so many steps, and return its exit code."""
    process, metrics = start(out, *args), out / "metrics.jsonl"
    before = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    cut = before == 0  # else the lines of the run before are still there
    while process.poll() is None:
        now = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        cut = cut or now != before
        if cut and now >= steps:
            break
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


CASES = {
    "lora": {"lora_parameters": DROPOUT, "max_grad_norm": 1.0, "grad_checkpoint": True, "alpha": "0.9->0.3:cosine"},
    "full": {"fine_tune_type": "full", "grad_accumulation_steps": 2, "optimizer": "adamw"},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_step_and_resumed_a_run_has_the_losses_of_one_that_never_stopped(
    tmp_path: Path, world: World, case: str
) -> None:
    options = {"store": (str(world.store),), "iters": 60, "save_every": 4, **CASES[case]}
    train(world.config(tmp_path / "whole", **options))
    out, rng = tmp_path / "cut", random.Random(case)
    (tmp_path / "cut.json").write_text(json.dumps(world.config(out, **options).to_json()))
    kills = 0
    for number, steps in enumerate([2, *sorted(rng.sample(range(4, 30), 2))]):
        kills += stopped(out, steps, signal.SIGKILL, *(["--resume"] if number else [])) == -signal.SIGKILL
    train(world.config(out, **options, resume=True))
    assert kills == 3
    assert lines(out) == lines(tmp_path / "whole")
    name = "model.safetensors" if case == "full" else "adapters.safetensors"
    whole, cut = (mx.load(str(tmp_path / run / name)) for run in ("whole", "cut"))
    assert all(mx.array_equal(whole[name], cut[name]).item() for name in whole)


def test_a_signal_ends_a_run_after_a_whole_step_and_resuming_is_exact(tmp_path: Path, world: World) -> None:
    out, options = tmp_path / "cut", {"store": (str(world.store),), "lora_parameters": DROPOUT}
    (tmp_path / "cut.json").write_text(json.dumps(world.config(out, iters=100_000, **options).to_json()))
    assert stopped(out, 7, signal.SIGTERM) == 130
    (step,) = kept(out)
    assert step == len(lines(out)) >= 7
    assert (out / "adapters.safetensors").exists()
    shutil.copy(out / "distill_train.json", tmp_path / "cut.json")
    assert stopped(out, step + 4, signal.SIGINT, "--resume") == 130
    more = len(lines(out))
    assert more > step
    train(world.config(tmp_path / "whole", iters=more, **options))
    assert lines(out) == lines(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_that_ended_goes_on_with_more_iters_and_the_metrics_after_its_checkpoint_are_made_again(
    tmp_path: Path, world: World, kind: str
) -> None:
    out, options = tmp_path / "o", {"store": (str(world.store),), "lora_parameters": DROPOUT, "save_every": 4}
    options["fine_tune_type"] = kind
    world.train(tmp_path / "whole", iters=9, **options)
    world.train(out, iters=5, **options)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as of a run that was killed after its last checkpoint
    report, _ = world.train(out, iters=9, resume=True, **options)
    assert lines(out) == lines(tmp_path / "whole")
    assert (report.steps, report.count.hits) == (9, sum(line[4] for line in lines(out)))


def test_the_last_and_the_best_checkpoint_are_kept_and_load_in_mlx_lm(tmp_path: Path, world: World) -> None:
    data = write_jsonl(tmp_path / "two.jsonl", [{"text": "Ask once."}, {"text": "Learn it."}])
    options = {"dataset": str(data), "alpha": 0.0, "save_every": 2, "fine_tune_type": "full"}
    schedule = {"name": "step_decay", "arguments": [1e-3, 1e4, 6]}  # it learns for six steps, then breaks
    world.train(tmp_path / "o", iters=10, lr_schedule=schedule, **options)
    losses = [line[1] for line in lines(tmp_path / "o")]
    means = {step: sum(losses[step - 2 : step]) / 2 for step in (2, 4, 6, 8, 10)}
    best = min(means, key=lambda step: means[step])
    assert best == 6
    assert kept(tmp_path / "o") == [6, 10]
    mlx_lm.load(str(tmp_path / "o" / "checkpoints" / "0000006"))


def test_a_run_that_goes_on_and_is_killed_is_not_shown_as_the_run_that_ended_before(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise SystemExit

    out, options = tmp_path / "o", {"store": (str(world.store),), "save_every": 2}
    world.train(out, iters=2, **options)
    assert (out / "summary.json").exists()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("distill_trainer.train.run_steps", killed)
        world.train(out, iters=4, resume=True, **options)
    assert not (out / "summary.json").exists() and "not ended" in run_page(out)
    world.train(out, iters=4, resume=True, **options)
    assert json.loads((out / "summary.json").read_text())["steps"] == 4


def test_a_checkpoint_between_two_turns_is_the_best_by_as_many_steps_as_any_other(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, out = iter([1.0, 3.0, 3.0, 2.0, 9.0, 1.0]), tmp_path / "o"

    def known(step: Any, batches: Any) -> Any:
        (_, *means), gradients = step(batches[0])
        loss = next(losses)
        if loss == 2.0:
            signal.raise_signal(signal.SIGINT)
        return (mx.array(loss), *means), gradients

    monkeypatch.setattr("distill_trainer.parallel.mean_gradient", known)
    options = {"store": (str(world.store),), "iters": 6, "save_every": 3}
    world.train(out, **options)
    assert kept(out) == [3, 4]  # the mean of steps 1 to 3 is 7/3, that of 2 to 4 is 8/3
    world.train(out, resume=True, **options)
    assert kept(out) == [3, 6]
    state = json.loads((out / "checkpoints" / "0000006" / "training.json").read_text())
    assert state["mean_loss"] == pytest.approx(12 / 3)


def test_the_best_checkpoint_is_not_one_whose_held_out_loss_is_no_number(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([math.nan, 2.0, 3.0])
    monkeypatch.setattr(HeldOut, "measure", lambda *_: {"valid_loss": next(losses)})
    world.train(tmp_path / "o", alpha=0, iters=3, save_every=1, valid_dataset=str(world.data))
    assert kept(tmp_path / "o") == [2, 3]


def test_a_run_does_not_go_on_in_a_folder_that_another_is_still_writing_to(tmp_path: Path, world: World) -> None:
    out, options = tmp_path / "o", {"store": (str(world.store),), "iters": 2, "save_every": 1}
    world.train(out, **options)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with output_folder(out), pytest.raises(ConfigError, match=f"another run is still writing to {out}; wait until"):
        train(world.config(out, **options | {"iters": 3, "resume": True}))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert world.train(out, **options | {"iters": 3, "resume": True})[0].steps == 3


def test_without_save_every_a_run_leaves_no_checkpoint_and_cannot_go_on(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),)}
    world.train(tmp_path / "o", **options)
    assert not (tmp_path / "o" / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"has ended and left no checkpoint; type a new --out"):
        world.train(tmp_path / "o", iters=9, resume=True, **options)


def test_what_changed_since_the_checkpoint_is_named_and_nothing_is_touched(tmp_path: Path, world: World) -> None:
    out, store, student = tmp_path / "o", tmp_path / "s.zarr", tmp_path / "student"
    shutil.copytree(world.store, store)
    shutil.copytree(world.student, student)
    data = shutil.copy(world.data, tmp_path / "data.jsonl")
    options = {"store": (str(store),), "student": str(student), "save_every": 2, "dataset": str(data)}
    world.train(out, iters=4, **options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            world.train(out, **options | {"iters": 8, "resume": True} | changed)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    refused("seed 0, this run has 1; type the command as it was", seed=1)
    refused("optimizer adam, this run has sgd", optimizer="sgd")
    refused("is already after step 4, iters is 3; type --iters", iters=3)
    text = data.read_text()
    data.write_text("".join(reversed(text.splitlines(keepends=True))))
    refused("the content of the dataset")
    data.write_text(text)
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "One text more."}])
    world.build(store, dataset=str(more))
    refused("the content of the store 1")
    shutil.rmtree(store)
    shutil.copytree(world.store, store)
    save_tiny_model(student, seed=9)
    refused("the content of the student")


def test_the_state_of_a_loss_that_moves_is_restored_to_the_last_bit(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.build(tmp_path / "s.zarr", select="top-k:24", temperature=(1.0,), log_z=(1.0, 2.0, 4.0))
    options = {"store": (str(tmp_path / "s.zarr"),), "lora_parameters": DROPOUT, "iters": 12, "save_every": 3}
    options |= {"loss": ("taid",), "temperature": "4->1", "grad_accumulation_steps": 2, "alpha": 1.0}
    _, whole = world.train(tmp_path / "whole", **options)
    for resume, calls in ((False, iter(range(8))), (True, iter(range(4)))):  # as step 5 begins, and step 7

        def interrupted(*args: Any, calls: Iterator[int] = calls) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return batch_loss(*args)

        with monkeypatch.context() as patched:
            patched.setattr("distill_trainer.steps.batch_loss", interrupted)
            assert world.train(tmp_path / "cut", **options, resume=resume)[0].interrupted
    _, cut = world.train(tmp_path / "cut", **options, resume=True)
    moving = [[(step["taid_t"], step["temperature"], step["kd_loss"]) for step in run] for run in (whole, cut)]
    assert moving[0] == moving[1] and len({t for t, _, _ in moving[0]}) > 9
    assert {temperature for _, temperature, _ in moving[0]} == {4.0, 2.0, 1.0}
    ours, theirs = (mx.load(str(tmp_path / run / "adapters.safetensors")) for run in ("cut", "whole"))
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in theirs)
    states = [
        json.loads((tmp_path / run / "checkpoints" / "0000012" / "training.json").read_text())
        for run in ("cut", "whole")
    ]
    assert states[0]["objective"] == states[1]["objective"] != {}


def test_a_schedule_that_spans_the_run_does_not_let_it_grow(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),), "save_every": 2, "alpha": "0.9->0.1"}
    world.train(tmp_path / "o", iters=4, **options)
    with pytest.raises(ConfigError, match="iters 4, this run has 8"):
        world.train(tmp_path / "o", iters=8, resume=True, **options)


def test_a_loss_that_is_no_number_stops_the_run_names_the_documents_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def spoiled(*args: Any) -> Any:
        steps.append(1)
        total, *means = batch_loss(*args)
        return (total * (mx.nan if len(steps) == 6 else 1), *means)

    monkeypatch.setattr("distill_trainer.steps.batch_loss", spoiled)
    options = {"store": (str(world.store),), "iters": 9, "save_every": 2, "batch_size": 1}
    with pytest.raises(ModelError, match=r"the loss of step 6 is nan on data\.jsonl:\d, expected a number"):
        world.train(tmp_path / "o", **options)
    assert max(kept(tmp_path / "o")) == 4
    monkeypatch.undo()
    world.train(tmp_path / "o", **options, resume=True)
    world.train(tmp_path / "whole", **options)
    assert lines(tmp_path / "o") == lines(tmp_path / "whole")


def test_weights_that_are_no_numbers_are_not_kept_over_good_ones(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(step: Any, batches: Any) -> Any:
        means, gradients = step(batches[0])
        calls.append(1)
        gradients["model"]["norm"]["weight"] *= mx.inf if len(calls) == 4 else 1
        return means, gradients

    calls: list[int] = []
    monkeypatch.setattr("distill_trainer.parallel.mean_gradient", spoiled)
    options = {"store": (str(world.store),), "iters": 9, "save_every": 2, "fine_tune_type": "full"}
    with pytest.raises(ModelError, match="after step 4 some weights are no finite numbers; type --learning-rate"):
        world.train(tmp_path / "o", **options)
    assert kept(tmp_path / "o") == [2]


def test_a_store_that_fails_in_a_run_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, calls = TargetSource.answer, []

    options = {"store": (str(world.store),), "iters": 9, "lora_parameters": DROPOUT, "grad_accumulation_steps": 2}
    world.train(tmp_path / "whole", **options)

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise CorruptStoreError("a shard was damaged while it was read")
        return answer(*args)

    monkeypatch.setattr(TargetSource, "answer", failing)
    with pytest.raises(CorruptStoreError, match="what was learned in 3 steps is saved"):
        world.train(tmp_path / "o", **options)
    monkeypatch.undo()
    world.train(tmp_path / "o", **options, resume=True)
    assert lines(tmp_path / "o") == lines(tmp_path / "whole")


def test_what_a_killed_save_left_is_cleared_and_a_damaged_checkpoint_is_told_in_one_line(
    tmp_path: Path, world: World
) -> None:
    out, options = tmp_path / "o", {"store": (str(world.store),), "save_every": 2}
    world.train(out, iters=2, **options)
    (out / "checkpoints" / ".0000004").mkdir()
    world.train(out, iters=4, resume=True, **options)
    assert set(kept(out)) >= {4}
    file = out / "checkpoints" / "0000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        ModelError, match=r"0000004 cannot be read as a checkpoint: .*; remove it to go on from an"
    ) as e:
        world.train(out, iters=6, resume=True, **options)
    assert "\n" not in str(e.value)
    for damage in ("[]", "{}", '{"report": {"steps": 4}}', "{"):
        (file.parent / "training.json").write_text(damage)
        with pytest.raises(ModelError, match="0000004 cannot be read as a checkpoint"):
            world.train(out, iters=6, resume=True, **options)
    shutil.rmtree(file.parent)
    assert world.train(out, iters=6, resume=True, **options)[0].steps == 6


def test_a_cut_student_goes_on_over_the_base_that_was_written_for_it(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),), "keep_layers": 2, "save_every": 2}
    world.train(tmp_path / "o", iters=2, **options)
    world.train(tmp_path / "o", iters=4, resume=True, **options)
    world.train(tmp_path / "whole", iters=4, **options)
    assert lines(tmp_path / "o") == lines(tmp_path / "whole")
    checkpoint = tmp_path / "o" / "checkpoints" / "0000004"
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    mlx_lm.load(settings["model"], adapter_path=str(checkpoint))


def test_a_disk_that_has_no_room_for_a_checkpoint_loses_nothing_of_what_was_learned(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    options = {"store": (str(world.store),), "lora_parameters": DROPOUT}
    world.train(tmp_path / "o", iters=4, save_every=2, **options)
    monkeypatch.setattr("distill_trainer.checkpoint.publish", failing)
    with pytest.raises(ConfigError, match="o cannot be written: No space left on device; mend this"):
        world.train(tmp_path / "o", iters=6, save_every=9, resume=True, **options)
    monkeypatch.undo()
    assert kept(tmp_path / "o")[-1] == 4
    world.train(tmp_path / "whole", iters=6, **options)
    saved, whole = (mx.load(str(tmp_path / run / "adapters.safetensors")) for run in ("o", "whole"))
    assert all(mx.array_equal(saved[name], whole[name]).item() for name in whole)


def test_what_the_teacher_answered_before_a_kill_does_not_change_what_is_learned_after(
    tmp_path: Path, world: World
) -> None:
    """Hits and misses differ: what was kept is a hit the second time."""
    losses = []
    for name in ("whole", "cut"):
        options = {"store": (str(tmp_path / f"{name}.zarr"),), "teacher": str(world.teacher), "write_back": True}
        options |= {"save_every": 2, "lora_parameters": DROPOUT, "batch_size": 1}
        if name == "whole":
            world.train(tmp_path / name, iters=10, **options)
        else:
            (tmp_path / "cut.json").write_text(json.dumps(world.config(tmp_path / name, iters=10, **options).to_json()))
            stopped(tmp_path / name, 5, signal.SIGKILL)
            world.train(tmp_path / name, iters=10, resume=True, **options)
        losses.append([line[1:4] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1]
