"""A config that mlx_lm.lora takes is one that distill-train takes, and what it cannot mean here is said or refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS

from distill_trainer.config import TrainConfig
from distill_trainer.config_file import config_of, read_config
from logitstore.errors import ConfigError


def read(path: Path, values: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    file, said = path / "lora.yaml", list[str]()
    file.write_text(yaml.safe_dump(values))
    return config_of(read_config(file, said.append) | {"store": ["s"]}), said


def test_every_key_of_mlx_lm_is_read(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").touch()
    given = CONFIG_DEFAULTS | {"train": True, "model": "m", "data": str(tmp_path), "adapter_path": "a", "num_layers": 4}
    given |= {"lora_parameters": {"keys": ["self_attn.q_proj"], "rank": 4, "scale": 10.0, "dropout": 0.1}}
    config, said = read(tmp_path, given)
    assert (config.student, config.dataset, config.out, config.num_layers) == ("m", str(tmp_path), "a", 4)
    assert (config.steps_per_eval, config.val_batches, config.valid_split) == (200, 25, "valid")
    assert not config.mask_prompt and config.lora_parameters["keys"] == ["self_attn.q_proj"]
    (line,) = said
    assert "steps_per_report (every step is reported)" in line and "student" not in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train": False}, "distill-train trains"),
        ({"trust_remote_code": True}, "never run"),
        ({"hf_dataset": {"path": "d"}}, "write data:"),
        ({"student": "s"}, "model and student, which mean the same"),
        ({"steps_per_evaluation": 3}, "did you mean 'steps_per_eval'"),
    ],
)
def test_what_it_cannot_mean_here_is_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, {"model": "m", "data": "d", "adapter_path": "a"} | values)
