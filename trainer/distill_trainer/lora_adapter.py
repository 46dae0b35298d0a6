"""A LoRA adapter of mlx-lm's or ours as arrays, checked by itself; its base is not asked for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np

from logitstore.digest import read_json_object, read_safetensors_header
from logitstore.errors import ModelError, first_line

Factors = tuple[np.ndarray, np.ndarray]
"""A and B of one layer, float32: [inputs, rank] and [rank, outputs], or with experts [E, rank, inputs] and [E, outputs,
rank]."""

RANK_AXES = {2: (1, 0), 3: (1, 2)}
"""Where the rank lies in A and B, by their number of axes."""
_MOST = float(np.finfo(np.float32).max)
_TENSOR = re.compile(r"(.+)\.lora_([ab])")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder, read and checked by itself."""

    path: Path
    settings: dict[str, Any]
    rank: int
    scale: float
    factors: dict[str, Factors]
    """By the name of the layer that they adapt."""


def read_adapter(path: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        ModelError: it is not there, broken, or no LoRA adapter of mlx-lm's.
    """
    settings = read_json_object(
        path / "adapter_config.json", "a LoRA adapter; type the folder that distill-train or mlx_lm.lora has written"
    )
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ModelError(
            f"{path} was trained with --fine-tune-type {kind}, whose updates cannot be summed; type adapters that were "
            "trained with --fine-tune-type lora"
        )
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    rank, scale, keys = (parameters.get(name) for name in ("rank", "scale", "keys"))
    dropout, num_layers = parameters.get("dropout", 0), settings.get("num_layers")
    if not (
        _is_number(scale)
        and (_is_number(dropout) and 0 <= dropout < 1)
        and (_is_number(rank) and rank >= 1)
        and (isinstance(num_layers, int) and not isinstance(num_layers, bool))
        and (keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys)))
    ):
        raise ModelError(
            f"{path / 'adapter_config.json'} has num_layers {num_layers} and lora_parameters "
            f"{parameters}; expected rank, scale, dropout and perhaps keys as mlx-lm writes them: train it again"
        )
    factors = _read_factors(path / "adapters.safetensors")
    for name, (a, b) in factors.items():
        axes = RANK_AXES.get(a.ndim)
        if (
            axes is None
            or a.ndim != b.ndim
            or {a.shape[axes[0]], b.shape[axes[1]]} != {rank}
            or a.shape[:-2] != b.shape[:-2]  # experts
        ):
            raise ModelError(
                f"{path} has shapes {a.shape} and {b.shape} for {name}, expected a rank of {rank} as its "
                "adapter_config.json says, and of experts as many in both; train it again"
            )
    return Adapter(path, settings, int(cast(int, rank)), float(cast(float, scale)), factors)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST


def _read_factors(file: Path) -> dict[str, Factors]:
    read_safetensors_header(file)  # MLX reads late: a file cut short would fail in the middle
    try:
        tensors = {
            name: np.array(w.astype(mx.float32)) for name, w in cast(dict[str, mx.array], mx.load(str(file))).items()
        }
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}; train it again") from error
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{file} holds {name}, expected lora_a and lora_b alone; type plain LoRA adapters")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if single := next((name for name, pair in pairs.items() if len(pair) < 2), None):
        raise ModelError(f"{file} holds one of lora_a and lora_b for {single}, expected both; train it again")
    if not pairs:
        raise ModelError(f"{file} holds no tensors, expected lora_a and lora_b; train it again")
    return {name: (pairs[name]["a"], pairs[name]["b"]) for name in sorted(pairs)}
