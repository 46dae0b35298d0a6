import json
from pathlib import Path
from typing import Any

import distill_kernels

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text

from distill_trainer.checkpoint import Checkpoints
from distill_trainer.config import TrainConfig
from distill_trainer.objective import Objective
from distill_trainer.optimizer import make_optimizer
from distill_trainer.report import TrainReport
from distill_trainer.steps import Parts, run_steps
from distill_trainer.student import keep_layers, load_student, make_trainable, save_student, trainable
from logitstore.errors import ConfigError, ModelError
from logitstore.model import LoadedModel, load_model
from tests.runs import World, make_world
from tests.tiny import save_tiny_model, tiny_tokenizer

TOKENS = mx.array([[3, 141, 59, 26, 5, 35]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), store=False)


def last_layers(kind: str, count: int) -> dict[str, int]:
    return {} if kind == "full" else {"num_layers": count}


def trained(config: TrainConfig, world: World) -> tuple[LoadedModel, str]:
    """A student after a few steps of cross-entropy, and the line that loads what was saved of it."""
    student = load_student(config)
    Path(config.out).mkdir()
    make_trainable(student, config)
    optimizer = make_optimizer("adam", {}, config.learning_rate, None)
    objective = Objective(config, None)
    checkpoints = Checkpoints(config, student, optimizer, objective, [], world.sequences())
    parts = Parts(config, distill_kernels.split_head(student.model), optimizer, objective, world.sequences())
    run_steps(parts, checkpoints, TrainReport(), lambda _: None)
    line = save_student(student, config)
    student.model.eval()
    return student, line


@pytest.mark.parametrize("keep", [None, 2])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_was_saved_loads_in_mlx_lm_and_is_what_was_trained(
    tmp_path: Path, world: World, kind: str, keep: int | None
) -> None:
    config = world.config(tmp_path / "out", fine_tune_type=kind, keep_layers=keep, alpha=0.0, **last_layers(kind, 3))
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
    cut = keep_layers(student, 10)
    weights = [[layer.mlp.up_proj.weight for layer in model.layers] for model in (student.model, cut.model)]
    kept = [next(i for i, w in enumerate(weights[0]) if mx.array_equal(w, one)) for one in weights[1]]
    assert kept[0] == 0
    assert kept[-1] == 29
    assert set(np.diff(kept)) <= {3, 4}
    assert cut.config["num_hidden_layers"] == len(kept) == 10


def test_a_cut_student_computes_with_the_kept_layers_alone(world: World) -> None:
    whole = load_model(world.student)
    cut = keep_layers(whole, 2)
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
        config = world.config(tmp_path / kind, fine_tune_type=kind, alpha=0.0, **last_layers(kind, 1))
        student = load_student(config)
        make_trainable(student, config)
        names[kind] = set(trainable(student.model))
    assert {name.rpartition(".")[2] for name in names["lora"]} == {"lora_a", "lora_b"}
    assert {name.rpartition(".")[2] for name in names["dora"]} == {"lora_a", "lora_b", "m"}
    assert all(name.startswith("model.layers.3.") for name in names["lora"])
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= names["full"]


def save_tiny_gemma(path: Path, layers: int) -> Path:
    """A random gemma3_text: of every 3 layers, 2 look back over 4 tokens only, and have a rotary base of their own."""
    tokenizer = tiny_tokenizer()
    config: dict[str, Any] = {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "sliding_window_pattern": 3,
        "vocab_size": len(tokenizer),
    }
    mx.random.seed(3)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    weights = {name: w for name, w in tree_flatten(model.parameters()) if not name.startswith("lm_head")}  # tied
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_cut_student_whose_layers_act_by_their_number_is_saved_as_it_was_trained(
    tmp_path: Path, world: World, kind: str
) -> None:
    source = save_tiny_gemma(tmp_path / "gemma", 12)
    config = world.config(tmp_path / "out", student=str(source), fine_tune_type=kind, keep_layers=7, alpha=0.0)
    student, line = trained(config, world)
    model, _ = eval(line, {"mlx_lm": mlx_lm})
    tokens = mx.array([list(range(3, 40))])
    assert len(model.layers) == 7
    assert np.allclose(model(tokens), student.model(tokens), atol=1e-4)
    with pytest.raises(
        ModelError, match=r"gemma does not run with 2 of its 12 layers .*; type --keep-layers with more"
    ):
        keep_layers(load_model(source), 2)


def save_packed(path: Path, dtype: mx.Dtype) -> Path:
    """A 4-bit student whose scales and norms are stored in a dtype of 16 bits."""
    save_tiny_model(path, quantize=True)
    weights = mx.load(str(path / "model.safetensors"))
    floating = {name: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for name, w in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), floating, metadata={"format": "mlx"})
    return path


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_packed_student_is_trained_in_full_in_float32_and_saved_in_the_dtype_of_its_source(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    monkeypatch.setattr("distill_kernels.on_cpu", lambda: on_cpu)
    source = save_packed(tmp_path / "packed", mx.bfloat16)
    student, line = trained(
        world.config(tmp_path / "out", student=str(source), fine_tune_type="full", alpha=0.0), world
    )
    assert {w.dtype for _, w in tree_flatten(student.model.parameters())} == {mx.float32}
    assert {w.dtype for w in mx.load(str(tmp_path / "out" / "model.safetensors")).values()} == {mx.bfloat16}
    model, _ = eval(line, {"mlx_lm": mlx_lm})
    assert np.allclose(model(TOKENS).astype(mx.float32), student.model(TOKENS), atol=0.3)


def test_on_a_gpu_a_packed_student_of_an_adapter_stays_packed_also_when_it_is_cut(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_kernels.on_cpu", lambda: False)
    source = save_tiny_model(tmp_path / "packed", quantize=True)
    config = world.config(tmp_path / "out", student=str(source), keep_layers=2, alpha=0.0)
    student, line = trained(config, world)
    assert isinstance(student.model.layers[0].mlp.gate_proj.linear, nn.QuantizedLinear)
    model, _ = eval(line, {"mlx_lm": mlx_lm})
    assert isinstance(model.layers[0].mlp.gate_proj.linear, nn.QuantizedLinear)
    assert np.allclose(model(TOKENS), student.model(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"keys": ["self_attn.query"]}, r"adapt no layer self_attn\.query of student student; write keys"),
        ({"keys": ["self_attn.q_proj", "attn.v_proj"]}, r"adapt no layer attn\.v_proj of student"),
        ({"keys": []}, r"adapt no layer of student student; write keys"),
        ({"keys": ["self_attn"]}, r"with --fine-tune-type dora: .*; type --fine-tune-type lora, or write other keys"),
        ({"alpha": 16}, "has the key 'alpha', which mlx-lm does not look at; write rank, scale, dropout, keys alone"),
    ],
)
def test_lora_parameters_that_do_nothing_are_refused(
    tmp_path: Path, world: World, changed: dict[str, Any], expected: str
) -> None:
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0} | changed
    with pytest.raises(ConfigError, match=expected):
        world.train(tmp_path / "o", alpha=0, fine_tune_type="dora", lora_parameters=parameters)


def test_an_adapter_goes_on_from_another_ones_weights_and_refuses_those_of_other_layers(tmp_path: Path) -> None:
    world = make_world(tmp_path, store=False)
    world.train(tmp_path / "a", alpha=0)
    file = tmp_path / "a" / "adapters.safetensors"
    world.train(tmp_path / "b", alpha=0, iters=0, resume_adapter_file=str(file))
    assert mx_equal(file, tmp_path / "b" / "adapters.safetensors")
    with pytest.raises(ConfigError, match="--num-layers"):
        world.train(tmp_path / "c", alpha=0, num_layers=1, resume_adapter_file=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        world.train(tmp_path / "d", alpha=0, resume_adapter_file=str(tmp_path / "none.safetensors"))


def mx_equal(one: Path, other: Path) -> bool:
    """Whether two files hold the same arrays."""
    a, b = mx.load(str(one)), mx.load(str(other))
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)
