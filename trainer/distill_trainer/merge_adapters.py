"""`distill-merge`: several LoRA adapters of one base as one adapter, which mlx-lm loads and fuses as any other.

What the merged adapter adds to a layer is the weighted sum of what each of them adds,

    sum_i w_i scale_i A_i B_i  =  scale [A_1 | A_2 | ...] [B_1 w_1 scale_1 / scale; B_2 w_2 scale_2 / scale; ...],

with their ranks side by side: exact but for one rounding to float32, and the rank is the sum of theirs. Averaging the
As and the Bs, each by themselves, is something else: the product of the means also holds A_1 B_2 and A_2 B_1, which
nobody has trained, and half of what was.

Files alone are read; the base is never loaded, and nothing is trained.
"""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np

from distill_trainer.lora_adapter import RANK_AXES, Adapter, Factors, read_adapter
from distill_trainer.output import require_new, writing
from logitstore.digest import config_digest, weights_digest
from logitstore.durable import sync
from logitstore.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Merged:
    """What was merged."""

    weights: tuple[float, ...]
    """One an adapter."""
    rank: int
    layers: int
    """How many are adapted."""
    base: str | None
    """The model that the adapters name; None where none names one."""


def merge_adapters(adapters: Sequence[str], out: Path) -> Merged:
    """Write the weighted sum of adapters, each typed as ADAPTER or ADAPTER=WEIGHT, as one adapter folder.

    Without weights all are equal and sum to one; those that are typed are used as they are.

    Raises:
        ConfigError: fewer than two adapters, a weight that is no number, an output that is there or cannot be written.
        ModelError: an adapter that cannot be read, is no LoRA adapter, or is not of the first one's base.
    """
    paths, weights = _as_typed(adapters)
    require_new(out)
    read = [read_adapter(path) for path in paths]
    base = _one_base(read)
    rank = max(sum(one.rank for one in read if name in one.factors) for name in _adapted(read))
    scale = max((one.scale for one in read), key=abs) or 1.0
    tensors = _tensors(read, weights, rank, scale)
    num_layers, keys = _where(read)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": max(_dropout(one) for one in read)}
    settings = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters | ({} if keys is None else {"keys": keys}),
        **({} if base is None else {"model": base}),
        "merged": [{"adapter": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)],
    }
    _save(tensors, settings, out)
    return Merged(weights, rank, len(tensors) // 2, base)


def _as_typed(adapters: Sequence[str]) -> tuple[list[Path], tuple[float, ...]]:
    paths: list[Path] = []
    typed: list[float | None] = []
    for text in adapters:
        path, equals, number = text.rpartition("=")
        if not equals or Path(text).expanduser().is_dir():
            path = text
            typed.append(None)
        else:
            typed.append(_weight(number, path))
        paths.append(Path(path).expanduser())
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} adapters are given, expected at least 2; type distill-merge A B --out OUT")
    given = [weight for weight in typed if weight is not None]
    if given and len(given) < len(paths):
        bare = paths[typed.index(None)]
        raise ConfigError(f"{bare} has no weight, and others have; type {bare}=WEIGHT, or no weight at all")
    return paths, tuple(given) or (1 / len(paths),) * len(paths)


def _weight(text: str, path: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"the weight of {path} is {text!r}, expected a number; type {path}=0.5")
    return weight


def _adapted(adapters: Sequence[Adapter]) -> set[str]:
    """The names of all layers that some adapter adapts."""
    return {name for one in adapters for name in one.factors}


def _one_base(adapters: Sequence[Adapter]) -> str | None:
    """The base that they name, which is the same by name or by content; None where none names one."""
    named = [(one.path, one.settings["model"]) for one in adapters if isinstance(one.settings.get("model"), str)]
    if not named:
        return None
    first_path, first = named[0]
    for path, base in named[1:]:
        if base != first and not _same_files(base, first):
            raise ModelError(
                f"{path} was trained on {base}, {first_path} on {first}; expected adapters of one base. If they are "
                'the same model, write the same name under "model" in both adapter_config.json'
            )
    return str(first)


def _same_files(base: str, first: str) -> bool:
    # a name may be of a hub, or of another machine's user
    one, other = (Path(os.path.expanduser(name)) for name in (base, first))  # noqa: PTH111
    if not (one.exists() and other.exists()):
        return False
    return one.samefile(other) or (config_digest(one), weights_digest(one)) == (
        config_digest(other),
        weights_digest(other),
    )


def _tensors(adapters: Sequence[Adapter], weights: Sequence[float], rank: int, scale: float) -> dict[str, np.ndarray]:
    """The merged factors by the names of their tensors; what is missing to the rank is zero."""
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(_adapted(adapters)):
        of = [
            (one, weight, one.factors[name])
            for one, weight in zip(adapters, weights, strict=True)
            if name in one.factors
        ]
        first, _, factors = of[0]
        for one, _, others in of:
            if _sizes(others) != _sizes(factors):
                raise ModelError(
                    f"{one.path} adapts {name} of {_sizes(others)} inputs and outputs, {first.path} one of "
                    f"{_sizes(factors)}; expected adapters of one base"
                )
        axes = RANK_AXES[factors[0].ndim]
        scaled = [b.astype(np.float64) * (weight * one.scale / scale) for one, weight, (_, b) in of]
        with np.errstate(over="ignore"):
            tensors[f"{name}.lora_a"] = _side_by_side([a for _, _, (a, _) in of], axes[0], rank)
            tensors[f"{name}.lora_b"] = _side_by_side(scaled, axes[1], rank)
        if not all(np.isfinite(tensors[f"{name}.lora_{factor}"]).all() for factor in "ab"):
            raise ModelError(
                f"the sum is not finite for {name}; expected finite adapters and weights that float32 holds: "
                "type smaller weights, or train again"
            )
    return tensors


def _sizes(factors: Factors) -> tuple[int, ...]:
    """What A and B have beside their rank: inputs and outputs, and the number of experts."""
    return tuple(
        size
        for factor, axis in zip(factors, RANK_AXES[factors[0].ndim], strict=True)
        for i, size in enumerate(factor.shape)
        if i != axis
    )


def _side_by_side(parts: Sequence[np.ndarray], axis: int, rank: int) -> np.ndarray:
    joined = np.concatenate(parts, axis=axis).astype(np.float32)
    missing = [(0, rank - size if i == axis else 0) for i, size in enumerate(joined.shape)]
    return np.pad(joined, missing)


def _where(adapters: Sequence[Adapter]) -> tuple[int, list[str] | None]:
    """`num_layers` and `keys` that make mlx-lm adapt just the layers that some adapter adapts.

    They are those of an adapter that adapts all of these, where there is one. Else the keys are the layers' full names,
    which mlx-lm takes too: no number of layers and keys say "q_proj of the last two, v_proj of the last".
    """
    names = _adapted(adapters)
    for one in adapters:
        if one.factors.keys() == names:
            return one.settings["num_layers"], one.settings["lora_parameters"].get("keys")
    return max(one.settings["num_layers"] for one in adapters), sorted(names)


def _dropout(adapter: Adapter) -> float:
    return float(adapter.settings["lora_parameters"].get("dropout", 0.0))


def _save(tensors: dict[str, np.ndarray], settings: dict[str, Any], out: Path) -> None:
    """Write the folder beside `out`, and rename it."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            partial = Path(folder) / "adapter"
            partial.mkdir()
            mx.save_safetensors(str(partial / "adapters.safetensors"), {k: mx.array(w) for k, w in tensors.items()})
            (partial / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.replace(out)
        sync(out.parent)
