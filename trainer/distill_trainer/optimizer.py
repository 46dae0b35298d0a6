"""The optimizer and its learning rate, as mlx-lm's LoRA config spells them.

    optimizer: adamw
    optimizer_config: {adamw: {weight_decay: 0.1}}
    lr_schedule: {name: cosine_decay, arguments: [1e-4, 1000, 1e-6], warmup: 100, warmup_init: 0}

Schedules are mlx.optimizers' and one more, `wsd`, with the arguments [peak, stable steps, decay steps, end = 0].
Two defaults are not MLX's: Adam and AdamW correct their bias, and Adafactor takes the run's learning rate.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from logitstore.errors import ConfigError

OptimizerName = Literal["adam", "adamw", "muon", "sgd", "adafactor"]

_CLASSES: dict[str, type[optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False},
}
_SCHEDULES = ("cosine_decay", "linear_schedule", "exponential_decay", "step_decay", "wsd")
_SCHEDULE_KEYS = {"name", "arguments", "warmup", "warmup_init"}
_EXAMPLE = "lr_schedule: {name: cosine_decay, arguments: [1e-4, 1000], warmup: 100}"


def make_optimizer(
    name: str, configs: Mapping[str, Any], learning_rate: float, lr_schedule: Mapping[str, Any] | None
) -> optim.Optimizer:
    """The optimizer that a run asks for.

    Args:
        configs: keyword arguments by the optimizer's name; those of others are not looked at.
        lr_schedule: takes the place of `learning_rate`.

    Raises:
        ConfigError: saying what to write.
    """
    if name not in _CLASSES:
        raise ConfigError(f"optimizer is {name}; type --optimizer {'|'.join(_CLASSES)}")
    if strange := [key for key in configs if key not in _CLASSES]:
        raise ConfigError(
            f"optimizer_config has the key {strange[0]!r}, expected an optimizer's name, as in "
            f"optimizer_config: {{{name}: {{...}}}}"
        )
    config = configs.get(name) or {}
    kind = _CLASSES[name]
    known = [key for key in inspect.signature(kind).parameters if key != "learning_rate"]
    if not isinstance(config, Mapping) or not set(config) <= set(known):
        raise ConfigError(f"optimizer_config of {name} is {config}, expected some of the keys {', '.join(known)}")
    if name == "adafactor" and config.get("relative_step"):
        raise ConfigError("relative_step makes adafactor ignore the run's learning rate; leave it out")
    rate = learning_rate if lr_schedule is None else learning_rate_schedule(lr_schedule)
    try:
        arguments = _DEFAULTS.get(name, {}) | _numbers(config)
        tried, made = (cast(optim.Optimizer, cast(Any, kind)(learning_rate=rate, **arguments)) for _ in range(2))
        weights = {"w": mx.ones((2, 2))}
        tried.apply_gradients(weights, weights)  # a lone beta shows here alone
        return made
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_config of {name} is {dict(config)}: {error}; write other numbers") from error


def learning_rate_schedule(config: Mapping[str, Any]) -> Callable[[mx.array], mx.array]:
    """Learning rate as a function of the optimizer's steps before this one.

    Raises:
        ConfigError: saying what to write.
    """
    if strange := sorted(map(str, config.keys() - _SCHEDULE_KEYS)):
        raise ConfigError(f"lr_schedule has the key {strange[0]!r}, which is not known; write as in {_EXAMPLE}")
    if config.get("name") not in _SCHEDULES:
        raise ConfigError(
            f"lr_schedule has the name {config.get('name')!r}, expected one of {', '.join(_SCHEDULES)}; "
            f"write as in {_EXAMPLE}"
        )
    try:
        values = {key: value for key, value in _numbers(config, texts=("name",)).items() if value is not None}
        arguments, warmup = values.get("arguments"), values.get("warmup", 0)
        if not isinstance(arguments, list) or not arguments:
            raise ValueError("arguments is no list of numbers")
        if isinstance(warmup, float | bool) or warmup < 0:
            raise ValueError("warmup is no number of steps")
        schedule = _wsd(values, *arguments[1:]) if values["name"] == "wsd" else build_schedule(values)
        rates = [float(schedule(mx.array(step, mx.uint64))) for step in (0, warmup + 1)]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ValueError("it starts at no learning rate")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_schedule is {dict(config)}: {error}; write as in {_EXAMPLE}") from error
    return cast(Callable[[mx.array], mx.array], schedule)


def _wsd(
    config: Mapping[str, Any], stable_steps: int, decay_steps: int, end: float = 0.0
) -> Callable[[mx.array], mx.array]:
    """Warm-up as build_schedule has it, the peak for `stable_steps`, and linearly to `end` in `decay_steps`."""
    peak = config["arguments"][0]
    if stable_steps < 1:
        raise ValueError("wsd has no stable steps")
    stable = build_schedule({**config, "name": "linear_schedule", "arguments": [peak, peak, stable_steps]})
    warm = config["warmup"] + 1 if config.get("warmup") else 0
    return cast(
        Callable[[mx.array], mx.array],
        optim.join_schedules([stable, optim.linear_schedule(peak, end, decay_steps)], [warm + stable_steps]),
    )


def _numbers(config: Mapping[str, Any], texts: Sequence[str] = ()) -> dict[str, Any]:
    """The same with numbers for what YAML reads as text, such as 1e-8."""
    return {key: value if key in texts else _number(value) for key, value in config.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    number = float(value) if isinstance(value, str) else value
    if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
        raise ValueError(f"{value!r} is no number")
    return number
