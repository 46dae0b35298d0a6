"""The student: loaded, cut, made trainable, and saved as mlx-lm loads it."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from distill_trainer.config import TrainConfig
from distill_trainer.gradients import checkpoint_layers
from distill_trainer.output import BASE, CHECKPOINTS, writing
from logitstore.errors import ConfigError, ModelError, first_line
from logitstore.model import LoadedModel, build_model, load_model, save_model_dir

_LAYER = re.compile(r"(model\.layers\.)(\d+)(?=\.)")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config keys that hold a list with an entry for every layer."""


def load_student(config: TrainConfig) -> LoadedModel:
    """Load the student, and cut it where asked. Nothing is written, and nothing is trainable yet.

    To be trained in full, it is unpacked and float32 on every device.

    Raises:
        ConfigError: `keep_layers` asks for more layers than there are.
        ModelError: it does not load, or cannot be cut.
    """
    student = load_model(config.student, unpack=config.fine_tune_type == "full")
    return student if config.keep_layers is None else keep_layers(student, config.keep_layers)


def make_trainable(student: LoadedModel, config: TrainConfig, *, write_base: bool = True) -> None:
    """Leave trainable what `fine_tune_type` trains; new parameters are drawn from the run's seed.

    An adapter's base is written below the output first, where it exists nowhere else as an mlx-lm model; a run that has
    checkpoints has written it.

    Args:
        write_base: False leaves this to another process of the run.

    Raises:
        ConfigError: LoRA parameters that cannot be used; the output cannot be written.
    """
    model = student.model
    mx.random.seed(config.seed)
    if config.fine_tune_type == "full":
        model.unfreeze()
    else:
        there = any((Path(config.out) / CHECKPOINTS).glob("[0-9]*"))
        if needs_base(student, config) and write_base and not there:
            with writing(Path(config.out)):
                save_model_dir(student.model, student.tokenizer, student.config, Path(config.out) / BASE)
        model.freeze()
        lora, dora = dict(config.lora_parameters), config.fine_tune_type == "dora"
        try:
            linear_to_lora_layers(model, config.num_layers, lora, use_dora=dora)
        except (KeyError, TypeError, ValueError) as error:
            other = "type --fine-tune-type lora, or " * dora
            raise ConfigError(
                f"lora_parameters {lora} cannot be used with --fine-tune-type {config.fine_tune_type}: {error}; "
                f"{other}write other keys"
            ) from error
        adapted = [f".{name.rpartition('.')[0]}" for name in trainable(model)]
        for key in lora.get("keys") or [""]:
            if not any(name.endswith(f".{key}" if key else "") for name in adapted):
                raise ConfigError(
                    f"lora_parameters {lora} adapt no layer {key}{' ' if key else ''}of student {student.name}; write "
                    "keys as its layers are called, as in {keys: [self_attn.q_proj]}, or leave them out"
                )
        if config.resume_adapter_file is not None:
            _load_adapter(model, Path(config.resume_adapter_file).expanduser())
    if config.grad_checkpoint:
        checkpoint_layers(model)
    model.train()


def _load_adapter(model: Module, path: Path) -> None:
    """Put an adapter's weights in the place of the new ones.

    Raises:
        ConfigError: it cannot be read, or is not one of this model with these LoRA parameters.
    """
    try:
        weights = cast(dict[str, mx.array], mx.load(str(path)))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"adapter {path} cannot be read: {first_line(error)}; type --resume-adapter-file with a .safetensors file"
        ) from error
    new = trainable(model)
    shapes, wanted = ({name: value.shape for name, value in some.items()} for some in (weights, new))
    if shapes != wanted:
        name = min(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
        raise ConfigError(
            f"adapter {path} has {shapes.get(name, 'nothing')} for {name}, this run trains "
            f"{wanted.get(name, 'nothing')} there; type --fine-tune-type, --num-layers and lora_parameters as it was "
            "trained with"
        )
    model.load_weights(list(weights.items()), strict=False)


def keep_layers(student: LoadedModel, count: int) -> LoadedModel:
    """Keep `count` of a model's L layers: those at round(i (L - 1) / (count - 1)), so the first and the last stay.

    The shorter model is made anew of its own config, as it will be when it is loaded: where a layer acts by its number
    (Gemma 3: sliding or global), it acts by its new one in training too.

    Raises:
        ConfigError: more layers than there are.
        ModelError: the model's layers do not lie where mlx-lm's usual models have them, or the shorter model does not
            run.

    Reference: Sanh et al., "DistilBERT", 2019, section 3 (every second layer of the teacher).
    """
    layers = getattr(getattr(student.model, "model", None), "layers", None)
    if not isinstance(layers, list) or student.config.get("num_hidden_layers") != len(layers):
        raise ModelError(f"student {student.name} has no plain list of layers to cut; leave --keep-layers out")
    if count > len(layers):
        raise ConfigError(
            f"student {student.name} has {len(layers)} layers, --keep-layers asks for {count}; "
            f"type --keep-layers with at most {len(layers)}"
        )
    kept = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    number_of = {old: new for new, old in enumerate(kept)}
    config = student.config | {"num_hidden_layers": count}
    for name in _PER_LAYER:
        if isinstance(config.get(name), list) and len(config[name]) == len(layers):
            config[name] = [config[name][i] for i in kept]
    for name in ("quantization", "quantization_config"):
        if isinstance(config.get(name), dict):
            config[name] = _renumbered(config[name], number_of)
    weights = cast(dict[str, mx.array], tree_flatten(student.model.parameters(), destination={}))  # type: ignore[no-untyped-call]
    try:
        model = build_model(config, _renumbered(weights, number_of))
        logits = model(mx.array([[0, 1, 2, 1]]))
        if not mx.isfinite(logits).all().item():
            raise ValueError("its logits are not finite")
    except Exception as error:  # every model's class has reasons of its own
        reason = " ".join(str(error).split())
        raise ModelError(
            f"student {student.name} does not run with {count} of its {len(layers)} layers "
            f"({type(error).__name__}: {reason}); type --keep-layers with more, or leave it out"
        ) from error
    return replace(student, model=model, config=config)


def _renumbered(named: Mapping[str, Any], number_of: Mapping[int, int]) -> dict[str, Any]:
    """What belongs to a layer that is kept, under its new number; and what belongs to none."""
    found = {}
    for name, value in named.items():
        match = _LAYER.match(name)
        if match is None:
            found[name] = value
        elif int(match[2]) in number_of:
            found[f"{match[1]}{number_of[int(match[2])]}{name[match.end() :]}"] = value
    return found


def save_student(student: LoadedModel, config: TrainConfig) -> str:
    """Write what was trained to `config.out` and return the line of Python that loads it.

    A full student is an mlx-lm model folder, in the dtype that its source has on disk (packed: the dtype of the
    scales), on a CPU too; an adapter is an mlx-lm adapter folder, in the dtype that it was trained in.

    Raises:
        ConfigError: full disk, no permission.
        ModelError: the output holds the weights of another model.
    """
    out = Path(config.out)
    with writing(out):
        save_weights(student, config, out)
    return (
        f'mlx_lm.load("{out}")'
        if config.fine_tune_type == "full"
        else (f'mlx_lm.load("{_base(student, config)}", adapter_path="{out}")')
    )


def save_weights(student: LoadedModel, config: TrainConfig, folder: Path, *, exact: bool = False) -> None:
    """Write what was trained into a folder that is there.

    Args:
        exact: keep a full student in the dtype that it was trained in.
    """
    if config.fine_tune_type == "full":
        dtype = None if exact else student.stored_dtype
        save_model_dir(student.model, student.tokenizer, student.config, folder, dtype=dtype)
        return
    settings = {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": dict(config.lora_parameters),
        "model": _base(student, config),
    }
    partial = folder / ".partial.safetensors"
    try:
        mx.save_safetensors(str(partial), trainable(student.model))
        partial.rename(folder / "adapters.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _base(student: LoadedModel, config: TrainConfig) -> str:
    return str(Path(config.out) / BASE) if needs_base(student, config) else config.student


def needs_base(student: LoadedModel, config: TrainConfig) -> bool:
    """Whether an adapter's base exists nowhere as an mlx-lm model: it came from a `.gguf`, or was cut."""
    return student.path.is_file() or config.keep_layers is not None


def trainable(model: Module) -> dict[str, mx.array]:
    """The parameters that are trained, by name."""
    return cast(dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={}))  # type: ignore[no-untyped-call]
