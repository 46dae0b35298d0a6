"""A model loads as mlx-lm loads it, is named by its content, and every foreseeable failure is one clear line."""

import hashlib
import json
import shutil
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import load_file

from logitstore.digest import adapter_digest, weights_digest
from logitstore.errors import ModelError
from logitstore.model import _load_directory, load_model, save_model_dir
from tests.gguf_files import tiny_gguf
from tests.tiny import save_tiny_model, tiny_tokenizer

IDS = mx.array([tiny_tokenizer().encode("The teacher runs once, and every student reads")])
LORA = {"rank": 4, "scale": 10.0, "dropout": 0.5}


def save_tiny_adapter(model_path: Path, path: Path, *, layers: int = 2) -> Path:
    model, _ = mlx_lm.load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, layers, LORA)
    path.mkdir()
    weights = tree_map(
        lambda w: mx.array(np.random.default_rng(w.size).normal(0, 0.1, w.shape)), model.trainable_parameters()
    )
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(weights)))
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": LORA, "iters": 3}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def reshard(path: Path, out: Path) -> Path:
    shutil.copytree(path, out)
    weights = mx.load(str(out / "model.safetensors"))
    (out / "model.safetensors").unlink()
    names = sorted(weights, reverse=True)
    for i, part in enumerate((names[::2], names[1::2])):
        mx.save_safetensors(str(out / f"model-{i}.safetensors"), {name: weights[name] for name in part})
    return out


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "4-bit"])
def test_a_loaded_model_has_stock_mlx_lms_logits_and_on_a_cpu_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: bool
) -> None:
    monkeypatch.setattr("distill_kernels.on_cpu", lambda: True)
    path = save_tiny_model(tmp_path / "tiny", quantize=quantize)
    stock, _ = mlx_lm.load(str(path))
    loaded = load_model(path)
    assert mx.allclose(loaded.model(IDS), stock(IDS), atol=1e-4)
    assert (loaded.name, loaded.dtype) == ("tiny", "float32")
    assert loaded.quantization == ("4-bit affine, group 32" if quantize else None)
    assert loaded.tokenizer.encode("teacher") == tiny_tokenizer().encode("teacher")
    assert all(w.dtype == mx.float32 for _, w in tree_flatten(loaded.model.parameters()))


@pytest.mark.parametrize(
    ("on_cpu", "unpack", "packed"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_weights_stay_packed_on_a_gpu_unless_they_are_to_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, unpack: bool, packed: bool
) -> None:
    limits: list[None] = []
    monkeypatch.setattr("distill_kernels.on_cpu", lambda: on_cpu)
    monkeypatch.setattr("mlx_lm.utils.maybe_set_recommended_wired_limit", lambda: limits.append(None))
    loaded = load_model(save_tiny_model(tmp_path / "tiny", quantize=True), unpack=unpack)
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(loaded.model.parameters())}
    assert ("scales" in names) == packed
    assert len(limits) == (not on_cpu)


def test_an_adapter_acts_as_in_stock_mlx_lm_with_dropout_off(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny")
    adapter = save_tiny_adapter(path, tmp_path / "adapter")
    stock, _ = mlx_lm.load(str(path), adapter_path=str(adapter))
    loaded = load_model(path, adapter_path=adapter)
    assert mx.allclose(loaded.model(IDS), stock(IDS), atol=1e-5)
    assert not mx.allclose(loaded.model(IDS), load_model(path).model(IDS), atol=1e-2)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "4-bit"])
def test_a_saved_directory_is_loaded_by_stock_mlx_lm_unchanged(tmp_path: Path, quantize: bool) -> None:
    path = save_tiny_model(tmp_path / "tiny", quantize=quantize)
    loaded = load_model(path)
    save_model_dir(loaded.model, loaded.tokenizer, loaded.config, tmp_path / "out")
    stock, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert mx.array_equal(stock(IDS), loaded.model(IDS))
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_packed_model_is_saved_packed(tmp_path: Path) -> None:
    model, tokenizer, config = _load_directory(save_tiny_model(tmp_path / "tiny", quantize=True))
    save_model_dir(model, tokenizer, config, tmp_path / "out")
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "tiny")
    assert mx.array_equal(mlx_lm.load(str(tmp_path / "out"))[0](IDS), model(IDS))


def test_the_weights_digest_is_the_formula_over_every_tensor(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny", layers=1)
    lines = [
        json.dumps([name, "F32", list(w.shape), hashlib.blake2b(w.tobytes(), digest_size=16).hexdigest()])
        for name, w in sorted(load_file(path / "model.safetensors").items())
    ]
    assert weights_digest(path) == hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def test_the_weights_digest_survives_resharding_and_nothing_else(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny")
    digest = weights_digest(path)
    assert weights_digest(reshard(path, tmp_path / "shards")) == digest
    assert weights_digest(save_tiny_model(tmp_path / "other", seed=1)) != digest
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert weights_digest(path) != digest


def test_the_adapter_digest_follows_tensors_and_how_they_act(tmp_path: Path) -> None:
    adapter = save_tiny_adapter(save_tiny_model(tmp_path / "tiny"), tmp_path / "adapter")
    digest = adapter_digest(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, same in (({"iters": 9}, True), ({"lora_parameters": LORA | {"scale": 5.0}}, False)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        assert (adapter_digest(adapter) == digest) is same


def broken(path: Path, name: str, content: bytes | None) -> Path:
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "does not load"),
        ("config.json", b'{"model_type": "abacus"}', "abacus not supported"),
        ("config.json", b'{"model_type": "llama"}', "does not load"),
        ("model.safetensors", None, "has no model"),
        ("model.safetensors", b"", "cannot be read as safetensors"),
        ("model.safetensors", b"\xff" * 64, "cannot be read as safetensors"),
        ("model.safetensors", b"\x02" + b"\0" * 7 + b"{}", "does not load"),
        ("tokenizer.json", b"{", "tokenizer does not load"),
    ],
)
def test_a_broken_directory_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = broken(save_tiny_model(tmp_path / "tiny", layers=1), name, content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_weights_cut_short_are_refused_before_they_are_used(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny", layers=1)
    broken(path, "model.safetensors", (path / "model.safetensors").read_bytes()[:-1])
    for reads in (load_model, weights_digest):
        with pytest.raises(ModelError, match="past the end"):
            reads(path)


def test_a_gguf_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF is another thing")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("change", [{"llama.feed_forward_length": 63}, {"llama.feed_forward_length": 2**32 - 1}])
def test_a_gguf_whose_metadata_describes_another_model_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    tensors, metadata = mx.load(str(tiny_gguf(tmp_path)), return_metadata=True)
    changed = {**metadata, **{key: mx.array(value, mx.uint32) for key, value in change.items()}}  # type: ignore[dict-item]
    mx.save_gguf(str(tmp_path / "other.gguf"), tensors, changed)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"does not fit its own metadata: .*; download it again"):
        load_model(tmp_path / "other.gguf")


def test_a_path_that_is_no_model_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    for source, message in (
        (tmp_path / "model.bin", "neither"),
        (tmp_path / "none", "no model at"),
        ("", "config.json"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(source if source != "" else tmp_path)


def test_a_hub_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hub did not give it") as caught:
        load_model("logitstore-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny")
    wide = save_tiny_model(tmp_path / "wide", hidden=64)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load_model(path, adapter_path=tmp_path)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_model(path, adapter_path=save_tiny_adapter(wide, tmp_path / "adapter"))


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny")
    adapter = save_tiny_adapter(path, tmp_path / "adapter")
    weights = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {k: w for k, w in weights.items() if "lora_b" not in k})
    with pytest.raises(ModelError, match="lacks"):
        load_model(path, adapter_path=adapter)


def test_saving_refuses_what_would_not_load_alone(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny")
    loaded = load_model(path, adapter_path=save_tiny_adapter(path, tmp_path / "adapter"))
    with pytest.raises(ModelError, match="LoRA layers"):
        save_model_dir(loaded.model, loaded.tokenizer, loaded.config, tmp_path / "out")
    plain = load_model(path)
    with pytest.raises(ModelError, match="would be loaded as well"):
        save_model_dir(plain.model, plain.tokenizer, plain.config, reshard(path, tmp_path / "shards"))
