"""Every recipe runs from end to end on tiny models, and what it leaves loads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import pytest

from logitstore.model import load_model
from logitstore.store import open_store
from tests.runs import World, make_world
from tests.warm_commands import warm_commands

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "tools" / "recipes"
SETTINGS = {"DOCUMENTS": 4, "MAX_SEQ_LENGTH": 32, "STEPS": 1, "TOKENS": 4, "STUDENT_LAYERS": 2, "ASSISTANT_LAYERS": 3}
LEFT: dict[str, tuple[list[str], list[tuple[str, str]], list[str]]] = {
    "assistant": (["untrained", "assistant", "direct", "student"], [], ["teacher.zarr", "assistant.zarr"]),
    "self_distillation": ([], [("TEACHER", "first"), ("TEACHER", "second")], ["first.zarr"]),
    "draft_model": (["untrained", "draft"], [], ["teacher.zarr"]),
    "teacher_lora": (["untrained", "plain", "student"], [("TEACHER", "lora")], ["plain.zarr", "adapted.zarr"]),
    "merged_adapters": (
        ["untrained"],
        [("untrained", name) for name in ("odd", "even", "whole", "merged")],
        ["teacher.zarr"],
    ),
}
"""Of each recipe: its models, its adapters with their bases, its stores."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), store=False)


@pytest.fixture(scope="module")
def environment(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a recipe is run with: the commands of this very source, and the small world."""
    with warm_commands(tmp_path_factory.mktemp("bin")) as commands:
        (commands / "python").symlink_to(sys.executable)
        packages = (ROOT, *(ROOT / folder for folder in ("kernels", "trainer", "cli")))
        yield {
            **os.environ,
            "PYTHONPATH": ":".join(map(str, packages)),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "TEACHER": str(world.teacher),
            "TRAIN": str(world.data),
            "HELD_OUT": str(world.data),
        } | {name: str(value) for name, value in SETTINGS.items()}


def recipe(name: str, out: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RECIPES / name], env=environment | {"OUT": str(out)}, capture_output=True, text=True)


def test_every_recipe_is_tested() -> None:
    assert {path.name for path in RECIPES.iterdir() if path.stat().st_mode & 0o100 and path.is_file()} == LEFT.keys()


@pytest.mark.parametrize("name", LEFT)
def test_a_recipe_runs_from_end_to_end_and_what_it_leaves_loads(
    name: str, tmp_path: Path, world: World, environment: dict[str, str]
) -> None:
    done = recipe(name, tmp_path / "out", environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    models, adapters, stores = LEFT[name]
    for model in models:
        load_model(tmp_path / "out" / model)
    for base, adapter in adapters:
        load_model(
            world.teacher if base == "TEACHER" else tmp_path / "out" / base, adapter_path=tmp_path / "out" / adapter
        )
    for store in stores:
        assert len(open_store(tmp_path / "out" / store)) == 4
    assert f"{name} took" in done.stdout.splitlines()[-1]
    assert any(word in done.stdout.splitlines()[-2] for word in ("better than", "WORSE than", "as good as"))


def test_the_last_page_says_what_became_worse(tmp_path: Path) -> None:
    for name, kl in (("before", 1.0), ("after", 1.5)):
        figures = {"kl": {"value": kl}, "perplexity": {"value": None}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"positions": 9, "against": "t", "figures": figures}))
    command = [sys.executable, RECIPES / "compare.py", "kl", tmp_path, "before", "after"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "after is WORSE than before in KL: 1.500 against 1.000"


def test_a_recipe_without_its_data_says_what_to_type_and_makes_nothing(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = recipe("assistant", tmp_path / "out", environment | {"TRAIN": "nowhere.jsonl"})
    assert done.returncode == 2
    assert done.stderr.startswith("Error: no file nowhere.jsonl; type TRAIN=FILE.jsonl")
    assert not any(tmp_path.iterdir())


def test_a_recipe_touches_no_folder_that_is_there(tmp_path: Path, environment: dict[str, str]) -> None:
    done = recipe("assistant", tmp_path, environment)
    assert done.returncode == 2
    assert (
        done.stderr == f"Error: {tmp_path} is there already; type rm -r {tmp_path}, or OUT=FOLDER before the command\n"
    )
    assert not any(tmp_path.iterdir())
