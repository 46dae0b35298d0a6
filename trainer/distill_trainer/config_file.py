"""From a YAML file of config keys, and from what was typed, to a `TrainConfig`."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from distill_trainer.config import TrainConfig
from distill_trainer.kinds import AttentionKind, CrossVocab, FineTuneType, HiddenKind, OnMiss
from distill_trainer.mlx_lm_config import translated
from distill_trainer.optimizer import OptimizerName
from logitstore.errors import ConfigError


def read_config(path: Path, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Read a YAML or JSON file of config keys, ours or mlx-lm's. A key without a value is as good as absent.

    Args:
        say: takes a line that names mlx-lm's keys without a place here.

    Raises:
        ConfigError: it cannot be read, has a key twice, or one that no option has, naming the nearest.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config {path} cannot be read: {reason}; expected YAML such as `alpha: 0.9`") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds {type(values).__name__}, expected keys and values such as `alpha: 0.9`")
    known = [f.name for f in fields(TrainConfig)]
    values = translated(values, path, say)
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise ConfigError(f"config {path} has the key {key!r}, which is not known; did you mean {nearest[0]!r}?")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """Make a config of values as YAML gives them: 1e-4 is a string there, 1000.0 may stand for 1000.

    Raises:
        ConfigError: a value of another type than its key takes.
    """
    hints = get_type_hints(TrainConfig)
    typed = {}
    for name, value in values.items():
        expected, read = _KINDS[hints[name]]
        try:
            typed[name] = read(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} is {value!r}, expected {expected}; see `distill-train --help`") from None
    if "out" in typed:
        typed["out"] = os.path.expanduser(typed["out"])  # noqa: PTH111  text in, text out
    typed["store"] = tuple(os.path.expanduser(path) for path in typed.get("store", ()))  # noqa: PTH111
    return TrainConfig(**typed)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number_or_text(value: Any) -> float | str:
    try:
        return _number(value)
    except ValueError:
        return _texts(value)[0]


def _of(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_of(str), [value] if isinstance(value, str) else value))


_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("text", _of(str)),
    str | None: ("text", _of(str)),
    OnMiss | None: ("text", _of(str)),
    HiddenKind | None: ("text", _of(str)),
    AttentionKind | None: ("text", _of(str)),
    CrossVocab: ("text", _of(str)),
    FineTuneType: ("text", _of(str)),
    OptimizerName: ("text", _of(str)),
    float | str: ("a number, or a schedule as in 0.9->0.3:cosine", _number_or_text),
    float | str | None: ("a number, or a schedule as in 4->1:linear", _number_or_text),
    tuple[str, ...]: ("text, or a list of texts", _texts),
    bool: ("true or false", _of(bool)),
    int: ("a whole number", _whole),
    int | None: ("a whole number", _whole),
    float: ("a number", _number),
    float | None: ("a number", _number),
    Mapping[str, Any]: ("keys and values such as {rank: 8}", _of(dict)),
    Mapping[str, Any] | None: ("keys and values such as {name: cosine_decay, arguments: [1e-4, 1000]}", _of(dict)),
}
"""For each type of a field: what to expect, and how a value is read as one."""
