"""Loads a teacher or student (mlx-lm directory, GGUF file, hub id), and saves one for mlx-lm.

On a CPU the weights are unpacked and made float32, the one precision in which MLX uses BLAS there; on a GPU they stay
as they are stored, unless they are to be trained. `import logitstore` never comes here: a store is read where MLX is
not installed.
"""

import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import distill_kernels

import mlx.core as mx
import mlx_lm.utils as mlx_lm_utils
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import load_adapters
from transformers import AutoTokenizer

from logitstore.digest import read_safetensors_header
from logitstore.errors import ModelError, first_line
from logitstore.gguf import read_gguf

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what it was made from.

    `tokenizer` is the Hugging Face one. `quantization` says how the weights are stored, also where they were unpacked
    to load; `dtype` is that of the parameters in memory, `stored_dtype` of those in the source. `name` is the hub id as
    typed, or the last part of the path.
    """

    model: Module
    tokenizer: Any
    config: dict[str, Any]
    name: str
    path: Path
    quantization: str | None
    adapter_path: Path | None
    dtype: str
    stored_dtype: str

    @property
    def end_tokens(self) -> set[int]:
        """The tokens that end an answer, by the tokenizer and by the model's config, as mlx-lm has it."""
        named = self.config.get("eos_token_id")
        every = self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])
        return {token for token in every if token is not None}

    @property
    def places(self) -> int | None:
        """How many tokens it can read, where it learned a vector for each place (GPT-2, StarCoder); None elsewhere."""
        tables = (array for name, array in _parameters(self.model).items() if name.endswith("wpe.weight"))
        return next((len(table) for table in tables), None)


def load_model(source: str | Path, *, adapter_path: str | Path | None = None, unpack: bool = False) -> LoadedModel:
    """Load `source`, with the adapter of `adapter_path` if given.

    Args:
        unpack: make all weights plain float32 on a GPU too, so that they can be trained: packed ones have no gradient,
            and bfloat16 ones lose the small steps of an optimizer.

    Raises:
        ModelError: whatever is missing, broken, unsupported or out of reach, on one line.
    """
    path = _locate(str(source))
    if path.is_file():
        model, tokenizer, config = _load_gguf(path)
    else:
        model, tokenizer, config = _load_directory(path)
    adapter = Path(adapter_path).expanduser() if adapter_path is not None else None
    stored_dtype = _dtype(model)
    plain = distill_kernels.on_cpu() or unpack
    if plain:
        model.set_dtype(mx.float32)  # the scales too: unpacked values are then exact products, not rounded ones
        model = mlx_lm_utils.dequantize_model(model)
    elif path.is_file():
        model.set_dtype(_matrix_dtype(model))  # GGUF keeps norms in float32, which would promote every activation
    if adapter is not None:
        _apply_adapter(model, adapter)
    if plain:
        model.set_dtype(mx.float32)
    model.eval()
    if not distill_kernels.on_cpu():
        mlx_lm_utils.maybe_set_recommended_wired_limit()  # else macOS may page a large model out between two steps
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
        stored_dtype=stored_dtype,
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
        return Path(mlx_lm_utils._download(source))
    except Exception as error:  # whatever the network, the proxy or the hub may raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"no directory {source}, and the hub did not give it ({reason}); check the name and the network, "
            f"or download it first: `hf download {source}`"
        ) from error


def _load_directory(path: Path) -> tuple[Module, Any, dict[str, Any]]:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("[!.]*.gguf"))
        hint = f"; it holds {ggufs[0]}: type {path / ggufs[0]}" if ggufs else "; expected a model saved by mlx-lm"
        raise ModelError(f"{path} has no config.json{hint}")
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no model*.safetensors; download it again, or convert it with `mlx_lm.convert`")
    for file in files:
        read_safetensors_header(file)  # MLX reads late: a file cut short would fail in the middle of a run
    try:
        model, config = mlx_lm_utils.load_model(path, lazy=True)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"{path} does not load: {first_line(error)}; expected a model of mlx-lm's") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise plain Exception for a broken file
        raise ModelError(
            f"{path}: its tokenizer does not load: {first_line(error)}; expected tokenizer.json"
        ) from error
    return model, tokenizer, config


def _load_gguf(path: Path) -> tuple[Module, Any, dict[str, Any]]:
    gguf = read_gguf(path)
    try:
        model = build_model(gguf.config, gguf.weights)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes and numbers that no model has
        raise ModelError(f"{path} does not fit its own metadata: {first_line(error)}; download it again") from error
    return model, gguf.tokenizer, gguf.config


def build_model(config: dict[str, Any], weights: dict[str, mx.array]) -> Module:
    """Make the model that mlx-lm would load from a folder of this config and these weights, in eval mode.

    Raises:
        Exception: whatever mlx-lm's class raises for a config or weights that do not fit it.
    """
    model_class, args_class = mlx_lm_utils._get_classes(config)
    model: Any = model_class(args_class.from_dict(config))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(dict(weights))
    if any(name.endswith(".scales") for name in weights):
        quantization: dict[str, Any] = config["quantization"]

        def packed(name: str, module: Module) -> Any:
            if name in quantization:
                return quantization[name]
            if not hasattr(module, "to_quantized") or f"{name}.scales" not in weights:
                return False
            return mlx_lm_utils.infer_quant_config(name, module, weights)

        mode = quantization.get("mode", "affine")
        quantize(model, quantization["group_size"], quantization["bits"], mode=mode, class_predicate=packed)
    model.load_weights(list(weights.items()))
    model.eval()
    return cast(Module, model)


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


# Saving


def save_model_dir(
    model: Module, tokenizer: Any, config: dict[str, Any], out: Path, *, dtype: str | None = None
) -> None:
    """Write a directory that `mlx_lm.load` loads as it is: config, tokenizer, chat template, weights.

    Weights are written in `dtype` (those apart that the model's class keeps in float32), or as they are in memory.
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
        _save_weights(model, partial, dtype)
        tokenizer.save_pretrained(partial)
        mlx_lm_utils.save_config({k: v for k, v in config.items() if k not in dropped}, partial / "config.json")
        written = {file.name for file in partial.iterdir()}
        if strays := sorted(f.name for f in out.glob("model*.safetensors") if f.name not in written):
            raise ModelError(
                f"{out} already holds {strays[0]}, which would be loaded as well; save to an empty directory"
            )
        (out / "config.json").unlink(missing_ok=True)
        for name in sorted(written, key=lambda name: name == "config.json"):
            shutil.move(partial / name, out / name)


def _save_weights(model: Module, folder: Path, dtype: str | None) -> None:
    before = model.parameters()  # type: ignore[no-untyped-call]
    castable = getattr(model, "cast_predicate", lambda _name: True)  # as in `mlx_lm.convert`

    def cast_one(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, str(dtype))) if floating and castable(name) else array

    try:
        if dtype is not None:
            model.update(tree_map_with_path(cast_one, before))
        mlx_lm_utils.save_model(folder, model)
    finally:
        model.update(before)
