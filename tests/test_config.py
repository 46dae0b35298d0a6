import math
from pathlib import Path
from typing import Any

import pytest

from distill_trainer.config import TrainConfig
from distill_trainer.config_file import config_of, read_config
from logitstore.errors import ConfigError

NEEDED = {"student": "s", "dataset": "d", "out": "o", "store": ["a.zarr"]}


def read(tmp_path: Path, text: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return config_of(NEEDED | read_config(path))


def test_numbers_are_numbers_however_yaml_reads_them(tmp_path: Path) -> None:
    config = read(tmp_path, "learning_rate: 1e-4\niters: 5\nalpha: 1\nbatch_size: 2.0\nseed: '7'\n")
    assert (config.learning_rate, config.iters, config.alpha, config.batch_size, config.seed) == (1e-4, 5, 1.0, 2, 7)
    assert [type(v) for v in (config.learning_rate, config.iters, config.alpha, config.batch_size)] == [
        float,
        int,
        float,
        int,
    ]


def test_one_store_may_be_a_plain_path_and_a_key_without_a_value_is_absent(tmp_path: Path) -> None:
    config = read(tmp_path, "store: b.zarr\nalpha:\nteacher: null\n")
    assert (config.store, config.alpha, config.teacher) == (("b.zarr",), TrainConfig.alpha, None)


@pytest.mark.parametrize(
    ("typo", "meant"), [("learning-rate", "learning_rate"), ("itres", "iters"), ("lora_params", "lora_parameters")]
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"'{typo}', which is not known; did you mean '{meant}'"):
        read(tmp_path, f"{typo}: 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("alpha: x", "alpha is 'x', expected a number"),
        ("alpha: [1]", r"alpha is \[1\], expected a number"),
        ("iters: 2.5", "iters is 2.5, expected a whole number"),
        ("iters: .inf", "iters is inf, expected a whole number"),
        ("seed: true", "seed is True, expected a whole number"),
        ("write_back: 'on'", "write_back is 'on', expected true or false"),
        ("student: 3", "student is 3, expected text"),
        ("store: 5", "store is 5, expected text"),
        ("store: [1]", r"store is \[1\], expected text"),
        ("lora_parameters: 8", "lora_parameters is 8, expected keys and values"),
        ("lora_parameters: {rank: 8}", "expected rank, scale and dropout"),
        ("lora_parameters: {rank: x, scale: 1, dropout: 0}", "expected rank, scale and dropout"),
        ("lora_parameters: {rank: 8, scale: .nan, dropout: 0}", "expected rank, scale and dropout"),
        ("on_miss: ask", r"on_miss is ask; type --on-miss online\|"),
        ("fine_tune_type: half", r"fine_tune_type is half; type --fine-tune-type lora\|"),
        ("- alpha", "holds list, expected keys and values"),
        ("alpha: [", "cannot be read"),
        ("alpha: 0.5\nalpha: 0.7", "the key 'alpha' is there twice"),
        ("optimizer_config: {adam: {eps: 1}, adam: {eps: 2}}", "the key 'adam' is there twice"),
        ("lora_parameters: {rank: true, scale: 1, dropout: 0}", "expected rank, scale and dropout"),
        ("lora_parameters: {rank: 8, scale: true, dropout: 0}", "expected rank, scale and dropout"),
        ("lora_parameters: {rank: 4294967296, scale: 1, dropout: 0}", "expected rank, scale and dropout"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_one_line(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        read(tmp_path, line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"alpha": -0.1}, "--alpha"),
        ({"alpha": 1.1}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"learning_rate": math.inf}, "--learning-rate"),
        ({"learning_rate": math.nan}, "--learning-rate"),
        ({"iters": -1}, "--iters"),
        ({"iters": 10**20}, "--iters"),
        ({"save_every": 10**20}, "--save-every"),
        ({"grad_accumulation_steps": 10**20}, "--grad-accumulation-steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"max_seq_length": 1}, "--max-seq-length"),
        ({"num_layers": 0}, "--num-layers"),
        ({"num_layers": 4, "fine_tune_type": "full"}, "--num-layers -1"),
        ({"loss": ["kl=inf"]}, "--loss kl=1"),
        ({"overlay_gb": 5.0}, "--store https"),
        ({"keep_layers": 0}, "--keep-layers"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1 << 64}, "--seed"),
        ({"alpha": "0.9->"}, "--alpha"),
        ({"grad_accumulation_steps": 0}, "--grad-accumulation-steps"),
        ({"max_grad_norm": math.nan}, "--max-grad-norm"),
        ({"save_every": 0}, "--save-every"),
        ({"optimizer": "lion"}, "--optimizer"),
        ({"think_weight": -1.0}, "--think-weight"),
        ({"think_weight": math.nan}, "--think-weight"),
        ({"think_start": "<thought>"}, "--think-weight"),
        ({"think_weight": 2.0, "think_end": ""}, "--think-end"),
        ({"entropy_weight": math.inf}, "--entropy-weight"),
        ({"entropy_weight": 1.0, "alpha": 0.0}, "--alpha"),
        ({"select": "threshold:0"}, "threshold:16"),
        ({"on_miss": "online"}, "--teacher"),
        ({"teacher_adapter_path": "a"}, "--teacher"),
        ({"store": []}, "--store"),
        ({"store": [], "teacher": "t", "on_miss": "error"}, "--on-miss online"),
        ({"write_back": True}, "--teacher"),
        ({"write_back": True, "teacher": "t", "on_miss": "error"}, "--on-miss online"),
    ],
)
def test_a_value_out_of_range_names_the_flag_that_mends_it(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"type .*{flag}"):
        config_of(NEEDED | values)


def test_the_resolved_config_can_be_given_back_as_a_config() -> None:
    config = config_of(NEEDED | {"teacher": "t", "alpha": "0.9->0.1", "optimizer_config": {"adam": {"eps": "1e-6"}}})
    assert config.to_json()["on_miss"] == "online"
    again = config_of({key: value for key, value in config.to_json().items() if value is not None})
    assert again.to_json() == config.to_json()
