import json
from pathlib import Path

import pytest

from logitstore.digest import config_digest
from logitstore.errors import ModelError

CONFIG = {"model_type": "llama", "rope_theta": 10_000.0, "quantization": {"bits": 4, "group_size": 32}}


def digest(folder: Path, config: object) -> str | None:
    (folder / "config.json").write_text(json.dumps(config))
    return config_digest(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "/somewhere"},
        {"transformers_version": "9"},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        {"architectures": ["LlamaForCausalLM"]},
        {"eos_token_id": [1, 2]},
        {"quantization_config": CONFIG["quantization"]},
    ],
)
def test_what_changes_no_logit_is_not_in_the_config_digest(tmp_path: Path, change: dict[str, object]) -> None:
    assert digest(tmp_path, CONFIG | change) == digest(tmp_path, dict(reversed(CONFIG.items())))


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 20_000.0}, {"model_type": "qwen2"}, {"quantization": {"bits": 8, "group_size": 32}}, {"new": 1}],
)
def test_whatever_else_changes_is(tmp_path: Path, change: dict[str, object]) -> None:
    assert digest(tmp_path, CONFIG | change) != digest(tmp_path, CONFIG)


def test_a_gguf_file_has_its_config_in_its_weights_digest(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    assert config_digest(tmp_path / "x.gguf") is None


@pytest.mark.parametrize("config", [[], 3, None])
def test_a_config_that_is_none_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read: found a JSON"):
        digest(tmp_path, config)
