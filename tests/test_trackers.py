"""Trackers: TensorBoard by its own reader where tensorboardX is installed, the services as modules of their shape.

W&B, Trackio and SwanLab themselves are not run here: a stub takes the calls that each one's documentation has.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill_trainer import trackers
from distill_trainer.config import TrainConfig
from distill_trainer.trackers import named, require_installed, tracked
from logitstore.errors import ConfigError
from tests.runs import World, make_world

STEP = {"step": 3, "loss": 2.5, "kd_loss": None, "hits": 7, "valid_loss/a b": 1.5, "name": "x", "flag": True}
NUMBERS = {"loss": 2.5, "hits": 7.0, "valid_loss/a b": 1.5}


class Stub(ModuleType):
    """A module with `init`, `log` and `finish`, which notes what it was called with."""

    def __init__(self, name: str, fails: str = "") -> None:
        super().__init__(name)
        self.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []
        for verb in ("init", "log", "finish"):
            setattr(self, verb, self._noting(verb, verb == fails))

    def _noting(self, verb: str, fails: bool) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if fails:
                raise OSError("no route to host")
            self.calls.append((verb, (*args, options)))

        return call


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stub]:
    def put(name: str, fails: str = "") -> Stub:
        module = Stub(name, fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("name", "steps", "begun"),
    [
        ("wandb", 0, {"name": "run", "group": "run", "dir": "run"}),
        ("trackio", 0, {"name": "run", "resume": "never"}),
        ("trackio", 2, {"name": "run", "resume": "allow"}),
        ("swanlab", 0, {"experiment_name": "run", "logdir": "run/swanlog"}),
    ],
)
def test_a_service_is_begun_told_numbers_and_ended(
    stub: Callable[..., Stub], name: str, steps: int, begun: dict[str, str]
) -> None:
    module = stub(name)
    with tracked([name], "p", Path("run"), {"alpha": 0.5}, steps, print) as track:
        track(STEP)
    assert module.calls == [
        ("init", ({"project": "p", "config": {"alpha": 0.5}, **begun},)),
        ("log", (NUMBERS, {"step": 3})),
        ("finish", ({},)),
    ]


@pytest.mark.parametrize(("fails", "said"), [("log", "wandb is told no more after step 3: no route"), ("finish", "")])
def test_a_service_that_fails_costs_one_line_and_no_step(
    stub: Callable[..., Stub], tmp_path: Path, fails: str, said: str
) -> None:
    stub("wandb", fails)
    other, lines = stub("trackio"), list[str]()
    with tracked(["wandb", "trackio"], "p", tmp_path, {}, 0, lines.append) as track:
        track(STEP)
        track(STEP | {"step": 4})
    assert [verb for verb, _ in other.calls] == ["init", "log", "log", "finish"]
    assert len(lines) == 1 and lines[0].startswith(said or "wandb did not take its last metrics: no route")


def test_one_that_cannot_begin_ends_the_run_before_its_first_step_and_leaves_nothing(
    stub: Callable[..., Stub], world: World, tmp_path: Path
) -> None:
    other = stub("trackio")
    stub("wandb", "init")
    with pytest.raises(ConfigError, match="--report-to wandb cannot begin: no route to host; mend this"):
        world.train(tmp_path / "o", store=(str(world.store),), report_to=("trackio", "wandb"))
    assert other.calls[-1][0] == "finish"
    assert not (tmp_path / "o").exists()


def test_every_step_of_a_run_is_told(stub: Callable[..., Stub], world: World, tmp_path: Path) -> None:
    module = stub("swanlab")
    options = {"store": (str(world.store),), "report_to": ("swanlab",), "project_name": "mine"}
    _, lines = world.train(tmp_path / "o", **options)
    told = [args for verb, args in module.calls if verb == "log"]
    assert [(numbers["loss"], options["step"]) for numbers, options in told] == [(x["loss"], x["step"]) for x in lines]
    assert module.calls[0][1][0]["project"] == "mine" and module.calls[0][1][0]["config"]["iters"] == 3


def test_what_is_not_installed_names_its_extra_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    needed = {"student": "s", "dataset": "d", "out": "o", "teacher": "t"}
    with pytest.raises(ConfigError, match=r"needs tensorboardX.*pip install 'logitstore\[tensorboard\]'"):
        TrainConfig(**needed, report_to=("tensorboard",))
    with pytest.raises(ConfigError, match="--report-to wandbb is not known, did you mean wandb"):
        TrainConfig(**needed, report_to=("wandbb",))


def test_several_may_stand_in_one_text_as_mlx_lm_has_them() -> None:
    assert named(["wandb, swanlab", "wandb"]) == ["wandb", "swanlab"]
    require_installed([""])


def test_tensorboard_reads_the_curves_and_forgets_steps_that_were_undone(tmp_path: Path) -> None:
    """Read back by tensorboardX's own reader; without the package there is nothing to be written."""
    pytest.importorskip("tensorboardX", reason="tensorboardX, the extra `tensorboard`, is not installed")
    from tensorboardX.proto.event_pb2 import Event

    for steps in (0, 3):
        with tracked(["tensorboard"], "p", tmp_path, {"alpha": 0.5}, steps, print) as track:
            track(STEP | {"step": steps + 1})
    found: list[Any] = []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")  # length, its checksum, the event, its checksum
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value if v.HasField("simple_value")]
    assert [(step, value) for step, tag, value in values if tag == "loss"] == [(1, 2.5), (4, 2.5)]
    assert [e.step for e in found if e.session_log.status] == [4]
    with tracked(["tensorboard"], "p", tmp_path / "none", {}, 0, print):
        pass
    assert not (tmp_path / "none" / "tensorboard").exists()
