"""Loads a teacher or student (mlx-lm directory, GGUF file, hub id), and saves one for mlx-lm.

On a CPU the weights are unpacked and made float32, the one precision in which MLX uses BLAS there; on a GPU they stay
as they are stored. `import logitstore` never comes here: a store is read where MLX is not installed.
"""

import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm.utils as mlx_lm
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import load_adapters
from transformers import AutoTokenizer

from logitstore.digest import read_safetensors_header
from logitstore.errors import ModelError
from logitstore.gguf import read_gguf

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what it was made from.

    `tokenizer` is the Hugging Face one. `quantization` says how the weights are stored, also where they were unpacked
    to load; `dtype` is that of the parameters in memory. `name` is the hub id as typed, or the last part of the path.
    """

    model: Module
    tokenizer: Any
    config: dict[str, Any]
    name: str
    path: Path
    quantization: str | None
    adapter_path: Path | None
    dtype: str


def load_model(source: str | Path, *, adapter_path: str | Path | None = None, lazy: bool = False) -> LoadedModel:
    """Load `source`, with the adapter of `adapter_path` if given; `lazy` leaves weights on disk until they are used.

    Raises:
        ModelError: whatever is missing, broken, unsupported or out of reach, on one line.
    """
    path = _locate(str(source))
    if path.is_file():
        model, tokenizer, config = _load_gguf(path)
    else:
        model, tokenizer, config = _load_directory(path)
    adapter = Path(adapter_path).expanduser() if adapter_path is not None else None
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if on_cpu:
        model.set_dtype(mx.float32)  # the scales too: unpacked values are then exact products, not rounded ones
        model = mlx_lm.dequantize_model(model)
    elif path.is_file():
        model.set_dtype(_matrix_dtype(model))  # GGUF keeps norms in float32, which would promote every activation
    if adapter is not None:
        _apply_adapter(model, adapter)
    if on_cpu:
        model.set_dtype(mx.float32)
    model.eval()
    if not lazy:
        mx.eval(_parameters(model))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        name=str(source) if _HUB_ID.fullmatch(str(source)) and not Path(source).exists() else path.resolve().name,
        path=path,
        quantization=_describe_quantization(config),
        adapter_path=adapter,
        dtype=_dtype(model),
    )


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a directory nor a .gguf file; type the directory that it is in")
        return path
    if not _HUB_ID.fullmatch(source):
        raise ModelError(f"no model at {source}; expected a directory, a .gguf file or a hub id like org/name")
    try:
        return Path(mlx_lm._download(source))
    except Exception as error:  # whatever the network, the proxy or the hub may raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(
            f"no directory {source}, and the hub did not give it ({reason}); check the name and the network, "
            f"or download it first: `hf download {source}`"
        ) from error


def _load_directory(path: Path) -> tuple[Module, Any, dict[str, Any]]:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: type {path / ggufs[0]}" if ggufs else "; expected a model saved by mlx-lm"
        raise ModelError(f"{path} has no config.json{hint}")
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no model*.safetensors; download it again, or convert it with `mlx_lm.convert`")
    for file in files:
        read_safetensors_header(file)  # MLX reads late: a file cut short would fail in the middle of a run
    try:
        model, config = mlx_lm.load_model(path, lazy=True)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"{path} does not load: {_first_line(error)}; expected a model of mlx-lm's") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise plain Exception for a broken file
        raise ModelError(
            f"{path}: its tokenizer does not load: {_first_line(error)}; expected tokenizer.json"
        ) from error
    return model, tokenizer, config


def _load_gguf(path: Path) -> tuple[Module, Any, dict[str, Any]]:
    gguf = read_gguf(path)
    quantization: dict[str, Any] = gguf.config.get("quantization", {})

    def packed(name: str, _module: Module) -> bool | dict[str, int]:
        return f"{name}.scales" in gguf.weights and quantization.get(name, True)

    try:
        model = llama.Model(llama.ModelArgs.from_dict(gguf.config))
        if quantization:
            quantize(model, quantization["group_size"], quantization["bits"], class_predicate=packed)
        model.load_weights(list(gguf.weights.items()))
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes and numbers that no model has
        raise ModelError(f"{path} does not fit its own metadata: {_first_line(error)}; download it again") from error
    return model, gguf.tokenizer, gguf.config


def _apply_adapter(model: Module, path: Path) -> None:
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (path / name).is_file():
            raise ModelError(
                f"{path} has no {name}; expected an adapter directory saved by mlx_lm.lora or distill-train"
            )
    try:
        stored = set(read_safetensors_header(path / "adapters.safetensors")[0])
        load_adapters(model, str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"adapter {path} does not fit the model: {reason}; use the model it was trained on") from error
    expected = {name for name in _parameters(model) if name.rpartition(".")[2] in _ADAPTER_LEAVES}
    if missing := sorted(expected - stored):
        raise ModelError(
            f"adapter {path} lacks {len(missing)} of the {len(expected)} tensors that its config asks for, "
            f"first {missing[0]}; train it again, or use the checkpoint before it"
        )


def _describe_quantization(config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization")
    if not quantization:
        return None
    mixed = any(isinstance(value, dict) for value in quantization.values())
    mode = quantization.get("mode", "affine")
    return f"{quantization['bits']}-bit {mode}, group {quantization['group_size']}{', mixed' if mixed else ''}"


def _dtype(model: Module) -> str:
    return str(_matrix_dtype(model)).removeprefix("mlx.core.")


def _matrix_dtype(model: Module) -> mx.Dtype:
    """The floating type that most parameters have; where they are packed, that of their scales."""
    sizes: Counter[mx.Dtype] = Counter()
    for parameter in _parameters(model).values():
        if mx.issubdtype(parameter.dtype, mx.floating) and parameter.ndim > 1:
            sizes[parameter.dtype] += parameter.size
    return sizes.most_common(1)[0][0] if sizes else mx.bfloat16


def _parameters(model: Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".;:")


# Saving


def save_model_dir(model: Module, tokenizer: Any, config: dict[str, Any], out: Path) -> None:
    """Write a directory that `mlx_lm.load` loads as it is: config, tokenizer, chat template, weights in their dtype.

    All is written beside `out` first and moved in with config.json last: a killed save is not taken for a model.

    Raises:
        ModelError: the model holds LoRA layers, or `out` holds weights that mlx-lm would load together with these.
    """
    names = list(_parameters(model))
    if any(name.rpartition(".")[2] in _ADAPTER_LEAVES - {"m"} for name in names):
        raise ModelError(
            "a model with LoRA layers does not load by itself; save the adapter, or fuse it with `mlx_lm.fuse`"
        )
    unpacked = not any(name.endswith(".scales") for name in names)
    dropped = {"quantization", "quantization_config"} if unpacked else set()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        partial = Path(folder)
        mlx_lm.save_model(partial, model)
        tokenizer.save_pretrained(partial)
        mlx_lm.save_config({k: v for k, v in config.items() if k not in dropped}, partial / "config.json")
        written = {file.name for file in partial.iterdir()}
        if strays := sorted(f.name for f in out.glob("model*.safetensors") if f.name not in written):
            raise ModelError(
                f"{out} already holds {strays[0]}, which would be loaded as well; save to an empty directory"
            )
        (out / "config.json").unlink(missing_ok=True)
        for name in sorted(written, key=lambda name: name == "config.json"):
            shutil.move(partial / name, out / name)
