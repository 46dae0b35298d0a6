import json
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from distill_trainer.config import TrainConfig
from distill_trainer.student import keep_layers, load_student, make_trainable, save_student, trainable
from distill_trainer.train import TrainReport, run_steps
from logitstore.errors import ConfigError
from logitstore.model import LoadedModel, load_model
from tests.runs import World, make_world
from tests.tiny import save_tiny_model

TOKENS = mx.array([[3, 141, 59, 26, 5, 35]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), store=False)


def trained(config: TrainConfig, world: World) -> tuple[LoadedModel, str]:
    """A student after a few steps of cross-entropy, and the line that loads what was saved of it."""
    student = load_student(config)
    Path(config.out).mkdir()
    make_trainable(student, config)
    run_steps(config, student.model, world.sequences(), None, Path(config.out), TrainReport())
    line = save_student(student, config)
    student.model.eval()
    return student, line


@pytest.mark.parametrize("keep", [None, 2])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_was_saved_loads_in_mlx_lm_and_is_what_was_trained(
    tmp_path: Path, world: World, kind: str, keep: int | None
) -> None:
    config = world.config(tmp_path / "out", fine_tune_type=kind, keep_layers=keep, alpha=0.0, num_layers=3)
    student, line = trained(config, world)
    model, tokenizer = eval(line, {"mlx_lm": mlx_lm})
    untrained = load_student(config).model(TOKENS)
    assert np.allclose(model(TOKENS), student.model(TOKENS), atol=1e-5)
    assert not np.allclose(model(TOKENS), untrained, atol=1e-3)
    assert tokenizer.encode("mean(values)") == student.tokenizer.encode("mean(values)")


@pytest.mark.parametrize(("keep", "base"), [(None, "student"), (2, "out/base")])
def test_an_adapter_names_its_base_which_is_written_where_it_is_nowhere_else(
    tmp_path: Path, world: World, keep: int | None, base: str
) -> None:
    trained(world.config(tmp_path / "out", keep_layers=keep, alpha=0.0), world)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["model"].endswith(base)
    assert (tmp_path / "out" / "base").exists() == (keep is not None)
    assert len(mlx_lm.load(settings["model"])[0].layers) == (keep or 4)


def test_keeping_10_of_30_layers_keeps_the_first_the_last_and_even_steps(tmp_path: Path) -> None:
    student = load_model(save_tiny_model(tmp_path / "s", layers=30))
    before = list(student.model.layers)
    keep_layers(student, 10)
    kept = [next(i for i, layer in enumerate(before) if layer is one) for one in student.model.layers]
    assert kept[0] == 0
    assert kept[-1] == 29
    assert set(np.diff(kept)) <= {3, 4}
    assert student.config["num_hidden_layers"] == len(kept) == 10


def test_a_cut_student_computes_with_the_kept_layers_alone(world: World) -> None:
    whole, cut = load_model(world.student), load_model(world.student)
    keep_layers(cut, 2)
    trunk = whole.model.model
    hidden = trunk.embed_tokens(TOKENS)
    for layer in (trunk.layers[0], trunk.layers[3]):
        hidden = layer(hidden, "causal", None)
    assert np.allclose(cut.model(TOKENS), trunk.embed_tokens.as_linear(trunk.norm(hidden)), atol=1e-5)


def test_more_layers_than_there_are_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="has 4 layers, --keep-layers asks for 5; type --keep-layers with at most 4"):
        keep_layers(load_model(world.student), 5)


def test_an_adapter_trains_only_its_own_parameters_and_full_training_all(world: World, tmp_path: Path) -> None:
    names = {}
    for kind in ("lora", "dora", "full"):
        config = world.config(tmp_path / kind, fine_tune_type=kind, num_layers=1, alpha=0.0)
        student = load_student(config)
        make_trainable(student, config)
        names[kind] = set(trainable(student.model))
    assert {name.rpartition(".")[2] for name in names["lora"]} == {"lora_a", "lora_b"}
    assert {name.rpartition(".")[2] for name in names["dora"]} == {"lora_a", "lora_b", "m"}
    assert all(name.startswith("model.layers.3.") for name in names["lora"])
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= names["full"]
