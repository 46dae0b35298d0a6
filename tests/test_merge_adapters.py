"""`distill-merge`: the merged adapter adds the weighted sum of what each adds, and mlx-lm loads and fuses it."""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm import fuse
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from distill_cli import distill_merge
from distill_trainer.merge_adapters import merge_adapters
from logitstore.errors import LogitstoreError, ModelError
from logitstore.model import load_model
from tests.runs import make_world
from tests.tiny import save_tiny_model

TOKENS = mx.array([[3, 141, 59, 26, 5, 35]])
Q, V = "self_attn.q_proj", "self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


def save_adapter(
    base: Path, path: Path, *, seed: int = 1, layers: int = 2, rank: int = 4, scale: float = 10.0, **settings: Any
) -> Path:
    """A LoRA adapter of random numbers, as mlx-lm saves one."""
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    parameters |= {"keys": settings.pop("keys")} if "keys" in settings else {}
    dtype = settings.pop("dtype", mx.float32)
    kind = settings.get("fine_tune_type", "lora")
    model, _ = mlx_lm.load(str(base))
    model.freeze()
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(seed)
    weights = tree_map(
        lambda w: mx.array(rng.normal(0, 0.1, w.shape).astype(np.float32)).astype(dtype), model.trainable_parameters()
    )
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(weights)))
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    return path


def update_of(adapter: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each layer's weight, [outputs, inputs], in float64 from the formula."""
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = {
        k: np.array(w.astype(mx.float32), np.float64) for k, w in mx.load(f"{adapter}/adapters.safetensors").items()
    }
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: scale * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T for name in names}


def summed(weighted: Sequence[tuple[Path, float]]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for adapter, weight in weighted:
        for name, update in update_of(adapter).items():
            total[name] = total.get(name, 0) + weight * update
    return total


def logits_with(base: Path, updates: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of the base whose float64 weights these updates were added to."""
    model = load_model(base, unpack=True).model
    weights = dict(tree_flatten(model.parameters()))
    changed = {f"{name}.weight": np.array(weights[f"{name}.weight"], np.float64) + w for name, w in updates.items()}
    model.load_weights([(name, mx.array(w.astype(np.float32))) for name, w in changed.items()], strict=False)
    return np.array(model(TOKENS))


def mlx_lm_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    return np.array(mlx_lm.load(str(base), adapter_path=None if adapter is None else str(adapter))[0](TOKENS))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({"rank": 2, "scale": 20.0}, {"rank": 5, "scale": 3.0}),
        ({"layers": 1}, {"layers": 3, "rank": 8}),
        ({"layers": 3, "keys": [Q]}, {"layers": 1, "keys": [V]}),
        ({"layers": 3, "keys": [Q]}, {"layers": 1}),
        ({"layers": 2, "keys": [Q]}, {"layers": -1, "keys": ["model.embed_tokens", V], "dtype": mx.bfloat16}),
        ({"scale": 0.0}, {"scale": -2.0}),
    ],
)
@pytest.mark.parametrize("weights", [None, (0.7, 0.6)])
def test_the_merged_adapter_adds_the_weighted_sum_of_what_each_adds(
    base: Path, tmp_path: Path, one: Any, other: Any, weights: tuple[float, float] | None
) -> None:
    a, b = save_adapter(base, tmp_path / "a", **one), save_adapter(base, tmp_path / "b", seed=2, **other)
    typed = [str(a), str(b)] if weights is None else [f"{a}={weights[0]}", f"{b}={weights[1]}"]
    merge_adapters(typed, tmp_path / "out")
    w = weights or (0.5, 0.5)
    expected = summed([(a, w[0]), (b, w[1])])
    found = update_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, update in found.items():
        if "embed" in name:  # an embedding's factors are the other way round
            expected[name], update = expected[name].T, update.T
            found[name] = update
        assert np.allclose(update, expected[name], rtol=0, atol=1e-6 * np.abs(expected[name]).max())
    truth = logits_with(base, expected)
    assert np.abs(truth - mlx_lm_logits(base)).max() > 0.05
    assert np.allclose(mlx_lm_logits(base, tmp_path / "out"), truth, atol=1e-4)
    assert np.allclose(load_model(base, adapter_path=tmp_path / "out").model(TOKENS), truth, atol=1e-4)


def test_it_is_not_the_mean_of_the_factors(base: Path, tmp_path: Path) -> None:
    a, b = save_adapter(base, tmp_path / "a"), save_adapter(base, tmp_path / "b", seed=2)
    merge_adapters([str(a), str(b)], tmp_path / "out")
    factors = [mx.load(str(path / "adapters.safetensors")) for path in (a, b)]
    shutil.copytree(a, tmp_path / "mean")
    mean = {name: (factors[0][name] + factors[1][name]) / 2 for name in factors[0]}
    mx.save_safetensors(str(tmp_path / "mean" / "adapters.safetensors"), mean)
    assert not np.allclose(mlx_lm_logits(base, tmp_path / "mean"), mlx_lm_logits(base, tmp_path / "out"), atol=0.05)


def test_halves_of_one_adapter_are_that_adapter(base: Path, tmp_path: Path) -> None:
    a = save_adapter(base, tmp_path / "a")
    merge_adapters([f"{a}=.5", f"{a}=.5"], tmp_path / "out")
    assert np.allclose(mlx_lm_logits(base, tmp_path / "out"), mlx_lm_logits(base, a), atol=1e-5)


def test_three_adapters_a_negative_weight_and_a_folder_with_an_equals_sign(base: Path, tmp_path: Path) -> None:
    adapters = [save_adapter(base, tmp_path / name, seed=i) for i, name in enumerate(("a", "b", "c=3"))]
    merge_adapters([str(one) for one in adapters], tmp_path / "out")
    assert np.allclose(
        mlx_lm_logits(base, tmp_path / "out"), logits_with(base, summed([(a, 1 / 3) for a in adapters])), atol=1e-4
    )
    a, b, c = adapters
    merge_adapters([f"{a}=1", f"{b}=-1", f"{c}=0.5"], tmp_path / "less")
    truth = logits_with(base, summed([(a, 1), (b, -1), (c, 0.5)]))
    assert np.allclose(mlx_lm_logits(base, tmp_path / "less"), truth, atol=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
def test_mlx_lm_fuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: bool) -> None:
    base = save_tiny_model(tmp_path / "base", quantize=quantize)
    a = save_adapter(base, tmp_path / "a", keys=[Q], layers=3)
    b = save_adapter(base, tmp_path / "b", keys=[V], layers=1)
    merge_adapters([str(a), str(b)], tmp_path / "out")
    arguments = ["--model", base, "--adapter-path", tmp_path / "out", "--save-path", tmp_path / "fused", "--dequantize"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.fuse", *map(str, arguments)])
    fuse.main()
    truth = logits_with(base, summed([(a, 0.5), (b, 0.5)]))
    assert np.allclose(mlx_lm_logits(tmp_path / "fused"), truth, atol=1e-4)
    assert np.allclose(mlx_lm_logits(base, tmp_path / "out"), truth, atol=1e-2 if quantize else 1e-4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = SwitchLinear(8, 6, 3, bias=False)


class Experts(nn.Module):
    """One layer of three experts, as mlx-lm's mixtures have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [Block()]


def test_the_ranks_of_experts_lie_side_by_side_too(tmp_path: Path) -> None:
    total = np.zeros((3, 6, 8))
    for name, rank, scale in (("a", 2, 4.0), ("b", 3, 1.5)):
        rng = np.random.default_rng(rank)
        a, b = rng.normal(size=(3, rank, 8)), rng.normal(size=(3, 6, rank))
        total += 0.5 * scale * b @ a
        (tmp_path / name).mkdir()
        factors = {"layers.0.experts.lora_a": a, "layers.0.experts.lora_b": b}
        mx.save_safetensors(
            str(tmp_path / name / "adapters.safetensors"),
            {k: mx.array(w.astype(np.float32)) for k, w in factors.items()},
        )
        parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"num_layers": 1, "lora_parameters": parameters})
        )
    merge_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    model = Experts()
    before = np.array(model.layers[0].experts.weight)
    load_adapters(model, str(tmp_path / "out"))
    model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    assert np.allclose(model.layers[0].experts.weight - before, total, atol=1e-5)


def test_what_it_says_of_itself_and_equal_bases_in_two_places(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    a = save_adapter(base, tmp_path / "a")
    b = save_adapter(tmp_path / "copy", tmp_path / "b", rank=2, scale=5.0)
    merge_adapters([f"{a}=1", f"{b}=2"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 6, "scale": 10.0, "dropout": 0.0},
        "model": str(base),
        "merged": [{"adapter": str(a), "weight": 1.0}, {"adapter": str(b), "weight": 2.0}],
    }


def test_students_of_two_runs_merge_and_training_goes_on_from_there(tmp_path: Path) -> None:
    world = make_world(tmp_path, store=False)
    for name, rank in (("a", 2), ("b", 3)):
        parameters = {"rank": rank, "scale": 20.0, "dropout": 0.0}
        world.train(tmp_path / name, alpha=0, keep_layers=2, lora_parameters=parameters)
    result = CliRunner().invoke(distill_merge.main, [f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/o"])
    assert result.exit_code == 0, result.output
    assert "2 adapters, weights 0.5, 0.5; 14 layers of rank 5" in result.stdout
    call = result.stdout.splitlines()[-1].removeprefix("load it with ")
    found = eval(call, {"mlx_lm": mlx_lm})[0](TOKENS)
    truth = logits_with(tmp_path / "a" / "base", summed([(tmp_path / "a", 0.5), (tmp_path / "b", 0.5)]))
    assert np.allclose(found, truth, atol=1e-4)
    go_on = {"lora_parameters": {"rank": 5, "scale": 20.0, "dropout": 0.0}, "keep_layers": 2, "iters": 1}
    world.train(tmp_path / "c", alpha=0, resume_adapter_file=f"{tmp_path}/o/adapters.safetensors", **go_on)


def broken(base: Path, folder: Path) -> None:
    """One of everything that cannot be merged, beside a sound adapter `a`."""
    save_adapter(base, folder / "a")
    save_adapter(base, folder / "dora", fine_tune_type="dora")
    shutil.copytree(folder / "a", folder / "full")
    change(folder / "full", fine_tune_type="full")
    wide = save_tiny_model(folder / "wide", hidden=64)
    save_adapter(wide, folder / "of-wide")
    save_adapter(wide, folder / "nameless")
    change(folder / "nameless", model=None)
    shutil.copytree(folder / "a", folder / "of-hub")
    change(folder / "of-hub", model="org/name")
    shutil.copytree(folder / "a", folder / "alpha")
    change(folder / "alpha", lora_parameters={"rank": 4, "alpha": 10.0})
    shutil.copytree(folder / "a", folder / "rank")
    change(folder / "rank", lora_parameters={"rank": 5, "scale": 10.0, "dropout": 0.0})
    shutil.copytree(folder / "a", folder / "huge")
    change(folder / "huge", lora_parameters={"rank": 4, "scale": 10**400, "dropout": 0.0})
    for name, settings in (("dropout", {"dropout": 1.5}), ("rankless", {"rank": 0})):
        shutil.copytree(folder / "a", folder / name)
        change(folder / name, lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.0} | settings)
    shutil.copytree(folder / "a", folder / "true")
    change(folder / "true", num_layers=True)
    shutil.copytree(folder / "a", folder / "of-nobody")
    change(folder / "of-nobody", model="~nobody-of-this-name/base")
    shutil.copytree(folder / "a", folder / "deep")
    (folder / "deep" / "adapter_config.json").write_text('{"a":' * 100_000)
    shutil.copytree(folder / "a", folder / "experts")
    experts = {"e.lora_a": mx.zeros((3, 4, 8)), "e.lora_b": mx.zeros((2, 6, 4))}
    mx.save_safetensors(str(folder / "experts" / "adapters.safetensors"), experts)
    shutil.copytree(folder / "a", folder / "list")
    (folder / "list" / "adapter_config.json").write_text("[]")
    (folder / "empty").mkdir()
    weights = mx.load(str(folder / "a" / "adapters.safetensors"))
    for name, kept in (
        ("half", {k: w for k, w in weights.items() if "lora_a" in k}),
        ("extra", weights | {"model.norm.weight": mx.zeros(32)}),
        ("none", {}),
        ("nan", {k: w * np.nan for k, w in weights.items()}),
    ):
        shutil.copytree(folder / "a", folder / name)
        mx.save_safetensors(str(folder / name / "adapters.safetensors"), kept)
    shutil.copytree(folder / "a", folder / "cut")
    file = folder / "cut" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (folder / "file").write_text("")


def change(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def breakage(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    broken(base, folder)
    return folder


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a", "1 adapters are given, expected at least 2; type distill-merge A B"),
        ("", "0 adapters are given"),
        ("a=x a=1", "the weight of .*a is 'x', expected a number; type .*a=0.5"),
        ("a=nan a=1", "is 'nan', expected a number"),
        ("a=inf a=1", "is 'inf', expected a number"),
        ("a= a=1", "is '', expected a number"),
        ("a=1 a", "a has no weight, and others have; type .*a=WEIGHT"),
        ("a=1e300 a=1", "the sum is not finite .*type smaller weights"),
        ("a dora", "dora was trained with --fine-tune-type dora, .*type adapters"),
        ("full a", "full was trained with --fine-tune-type full, .*type adapters"),
        ("a of-wide", "of-wide was trained on .*wide, .*a on .*model; expected adapters of one base"),
        ("a of-hub", "of-hub was trained on org/name"),
        ("a nameless", r"nameless adapts .* of \(\d+, \d+\) inputs and outputs, .*expected adapters of one base"),
        ("a alpha", "'alpha': 10.0.*expected rank, scale"),
        ("a huge", "'scale': 1000.*expected rank, scale"),
        ("a rank", "for model.layers.* expected a rank of 5"),
        ("a dropout", "'dropout': 1.5.*expected rank, scale"),
        ("a rankless", "'rank': 0.*expected rank, scale"),
        ("a true", "has num_layers True"),
        ("a of-nobody", "of-nobody was trained on ~nobody-of-this-name/base"),
        ("a deep", "adapter_config.json cannot be read: maximum recursion depth"),
        ("a experts", r"\(3, 4, 8\) and \(2, 6, 4\) for e, expected .* of experts as many in both"),
        ("a list", "adapter_config.json cannot be read: found a JSON list; expected a LoRA adapter"),
        ("a empty", "adapter_config.json cannot be read: .*No such file"),
        ("a nowhere", "adapter_config.json cannot be read: .*No such file"),
        ("a half", "one of lora_a and lora_b for .*expected both"),
        ("a extra", "holds model.norm.weight, expected lora_a and lora_b alone"),
        ("a none", "holds no tensors"),
        ("a nan", "the sum is not finite"),
        ("a cut", "extends past the end of the file"),
        ("a a --out a", "a holds something already; type --out with a new folder"),
        ("a a --out file", "file holds something already; type --out with a new folder"),
        ("a a --out file/o", "file/o cannot be (written|used): .*type another"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line_and_nothing_is_written(
    breakage: Path, typed: str, expected: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in breakage.rglob("*")}
    words = [word if word.startswith("--") else f"{breakage}/{word}" for word in typed.split()]
    out = [] if "--out" in words else ["--out", f"{breakage}/o"]
    result = CliRunner().invoke(distill_merge.main, [*words, *out])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert re.search(expected, line), line
    assert {path: path.stat().st_mtime_ns for path in breakage.rglob("*")} == before


def test_a_disk_that_fails_leaves_nothing_behind(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = save_adapter(base, tmp_path / "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill_trainer.merge_adapters.sync", full)
    with pytest.raises(LogitstoreError, match="cannot be written: No space left on device"):
        merge_adapters([str(a), str(a)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_adapter_without_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    a = save_adapter(base, tmp_path / "a")
    (a / "adapters.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapters\.safetensors cannot be read"):
        merge_adapters([str(a), str(a)], tmp_path / "out")
