"""The student: loaded, cut, made trainable, and saved as mlx-lm loads it."""

import json
from pathlib import Path
from typing import cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from distill_trainer.config import TrainConfig
from distill_trainer.output import BASE
from logitstore.errors import ConfigError, ModelError
from logitstore.model import LoadedModel, load_model, save_model_dir


def load_student(config: TrainConfig) -> LoadedModel:
    """Load the student, and cut it where asked. Nothing is written, and nothing is trainable yet.

    Raises:
        ModelError: it does not load, or cannot be cut or trained.
    """
    student = load_model(config.student)
    if config.fine_tune_type == "full" and student.quantization and student.dtype != "float32":
        raise ModelError(
            f"student {student.name} is quantised ({student.quantization}) and cannot be trained in full; "
            "type --fine-tune-type lora"
        )
    if config.keep_layers is not None:
        keep_layers(student, config.keep_layers)
    return student


def make_trainable(student: LoadedModel, config: TrainConfig) -> None:
    """Leave trainable what `fine_tune_type` trains; new parameters are drawn from the run's seed.

    An adapter's base is written below the output first, where it exists nowhere else as an mlx-lm model.

    Raises:
        ConfigError: LoRA parameters that cannot be used.
    """
    model = student.model
    mx.random.seed(config.seed)
    if config.fine_tune_type == "full":
        model.unfreeze()
    else:
        if needs_base(student, config):
            write_model(student, Path(config.out) / BASE)
        model.freeze()
        lora = dict(config.lora_parameters)
        try:
            linear_to_lora_layers(model, config.num_layers, lora, use_dora=config.fine_tune_type == "dora")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"lora_parameters {lora} cannot be used: {error}; expected rank, scale and dropout"
            ) from error
    model.train()


def keep_layers(student: LoadedModel, count: int) -> None:
    """Keep `count` of a model's L layers: those at round(i (L - 1) / (count - 1)), so the first and the last stay.

    Raises:
        ConfigError: more layers than there are.
        ModelError: the model's layers do not lie where mlx-lm's usual models have them.

    Reference: Sanh et al., "DistilBERT", 2019, section 3; Muralidharan et al., "Minitron", 2024.
    """
    trunk = getattr(student.model, "model", None)
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, list) or "num_hidden_layers" not in student.config:
        raise ModelError(f"student {student.name} has no plain list of layers to cut; leave --keep-layers out")
    if count > len(layers):
        raise ConfigError(
            f"student {student.name} has {len(layers)} layers, --keep-layers asks for {count}; "
            f"type --keep-layers with at most {len(layers)}"
        )
    kept = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    trunk.layers = [layers[i] for i in kept]  # type: ignore[union-attr]
    student.config["num_hidden_layers"] = count
    if "layer_types" in student.config:
        student.config["layer_types"] = [student.config["layer_types"][i] for i in kept]


def save_student(student: LoadedModel, config: TrainConfig) -> str:
    """Write what was trained to `config.out` and return the line of Python that loads it.

    A full student is an mlx-lm model folder, an adapter an mlx-lm adapter folder.

    Raises:
        OSError: full disk, no permission.
    """
    out = Path(config.out)
    if config.fine_tune_type == "full":
        write_model(student, out)
        return f'mlx_lm.load("{out}")'
    base = str(out / BASE) if needs_base(student, config) else config.student
    settings = {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": dict(config.lora_parameters),
        "model": base,
    }
    partial = out / ".partial.safetensors"
    try:
        mx.save_safetensors(str(partial), trainable(student.model))
        partial.rename(out / "adapters.safetensors")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return f'mlx_lm.load("{base}", adapter_path="{out}")'


def write_model(student: LoadedModel, folder: Path) -> None:
    """Write the student as an mlx-lm model folder.

    Raises:
        OSError: full disk; MLX itself speaks of a RuntimeError.
    """
    try:
        save_model_dir(student.model, student.tokenizer, student.config, folder)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def needs_base(student: LoadedModel, config: TrainConfig) -> bool:
    """Whether an adapter's base exists nowhere as an mlx-lm model: it came from a `.gguf`, or was cut."""
    return student.path.is_file() or config.keep_layers is not None


def trainable(model: Module) -> dict[str, mx.array]:
    """The parameters that are trained, by name."""
    return cast(dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={}))  # type: ignore[no-untyped-call]
