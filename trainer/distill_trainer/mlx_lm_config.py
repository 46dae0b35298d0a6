"""mlx-lm's LoRA config, as `mlx_lm.lora --config` takes it, read as a `distill-train` config.

Most keys are the same. Three have another name here; some speak of what `distill-train` does anyway or not at all, and
are left out and said; and those that ask for something else than training are refused. A data folder with valid.jsonl
is measured on, as there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError

RENAMED = {"model": "student", "data": "dataset", "adapter_path": "out"}
LEFT_OUT = {
    "train": "distill-train trains",
    "steps_per_report": "every step is reported",
    "test": "distill-eval tests",
    "test_batches": "distill-eval tests",
    "clear_cache_threshold": "MLX keeps its own",
    "trust_remote_code": "no code of a model is ever run",
    "config": "it names a config file in itself",
    "wandb": "mlx-lm's older name of report_to",
}
"""Keys of mlx-lm's without a place here, and why."""


def translated(values: Mapping[str, Any], where: object, say: Callable[[str], object]) -> dict[str, Any]:
    """The same values under this project's names, without those that are left out.

    Args:
        where: names the file, for messages.

    Raises:
        ConfigError: a key that asks for what `distill-train` does not do, or the same thing under two names.
    """
    if values.get("train") is False:
        raise ConfigError(f"config {where} says train: false, and distill-train trains; leave the key out")
    if values.get("trust_remote_code"):
        raise ConfigError(f"config {where} says trust_remote_code: true; a model's own code is never run: leave it out")
    if isinstance(values.get("wandb"), str):
        raise ConfigError(f"config {where} says wandb: {values['wandb']}; write report_to: wandb instead")
    if values.get("hf_dataset"):
        raise ConfigError(f"config {where} has hf_dataset; write data: with the dataset's name instead")
    found = {}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if name != key and name in values:
            raise ConfigError(f"config {where} has {key} and {name}, which mean the same; leave one out")
        if value is not None and key not in LEFT_OUT and key != "hf_dataset":
            found[name] = value
    if "data" in values and (Path(str(values["data"])).expanduser() / "valid.jsonl").exists():
        found.setdefault("valid_split", "valid")  # as mlx-lm does
    dropped = [key for key in values if key in LEFT_OUT and values[key] is not None]
    if dropped:
        reasons = "; ".join(f"{key} ({LEFT_OUT[key]})" for key in dropped)
        say(f"config {where}: left out {reasons}")
    return found
