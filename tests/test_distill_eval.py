"""`distill-eval`: figures from a store beside those of the live teacher, answers, and pages."""

import json
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from distill_cli import distill_eval as command
from distill_trainer.answers import answers, rouge_l
from distill_trainer.distill_eval import EvalConfig, Held, distill_eval
from distill_trainer.pages import evaluation_page, run_page
from logitstore.errors import ConfigError
from logitstore.model import load_model
from tests.runs import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def held(world: World, **against: Any) -> Held:
    return distill_eval(EvalConfig(str(world.student), str(world.data), quiet=True, **against))


def test_a_store_of_everything_says_what_the_live_teacher_says(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "all.zarr", select="top-k:384")
    live, stored = held(world, teacher=str(world.teacher)), held(world, store=str(tmp_path / "all.zarr"))
    assert stored.positions == live.positions and stored.unanswered == 0 and stored.bins == live.bins
    for name in ("perplexity", "ece"):
        assert stored.figures[name].value == pytest.approx(live.figures[name].value, rel=1e-6)
    for name in ("kl", "reverse_kl", "acceptance"):  # kept probabilities are rounded to 1/16 nat, at random
        assert stored.figures[name].value == pytest.approx(live.figures[name].value, rel=0.02)
    for name in ("agreement", "top5_agreement"):
        assert stored.figures[name].value == pytest.approx(live.figures[name].value, abs=0.06)


def test_a_sample_gives_what_it_can_without_bias_and_says_what_it_lacks(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "s.zarr", select="threshold:16", tail_log_probs=True, replicas=1)
    live, full = held(world, teacher=str(world.teacher)).figures, held(world, store=str(tmp_path / "s.zarr")).figures
    for name, within in (("kl", 0.1), ("reverse_kl", 0.4), ("acceptance", 0.1)):  # q may be large where p is not
        assert full[name].what.startswith("unbiased") and full[name].value == pytest.approx(
            live[name].value, rel=within
        )
    plain = held(world, store=str(world.store)).figures
    assert plain["acceptance"].value is None and "--tail-log-probs" in plain["acceptance"].what
    assert plain["reverse_kl"].value is None and "sample" in plain["reverse_kl"].what
    assert plain["top5_agreement"].value is None and "top-k:5" in plain["top5_agreement"].what


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([], [], 1.0), ([1, 2, 3], [], 0.0), ([1, 2, 3, 4], [1, 3, 4, 9], 0.75), ([1, 2], [2, 1, 2, 5], 4 / 6)],
)
def test_rouge_l_is_that_of_the_longest_common_subsequence(one: list[int], other: list[int], expected: float) -> None:
    assert rouge_l(one, other) == pytest.approx(expected) == rouge_l(other, one)


def test_answers_are_the_likeliest_tokens_after_the_prompt(world: World) -> None:
    student, sequences = load_model(world.student), world.sequences()
    (answer,) = answers(student, student, sequences[:1], 3, max_tokens=4)
    ids = sequences[0].token_ids[: len(sequences[0].token_ids) // 2].tolist()
    assert answer.prompt == student.tokenizer.decode(ids) and answer.similarity == 1.0
    for _ in range(4):
        ids.append(int(np.array(student.model(mx.array([ids])))[0, -1].argmax()))
    assert answer.student == answer.teacher == student.tokenizer.decode(ids[-4:])


def test_the_page_of_a_run_shows_its_curves_and_escapes_what_models_write(world: World, tmp_path: Path) -> None:
    world.train(
        tmp_path / "o", store=(str(world.store),), report_samples=2, valid_dataset=str(world.data), steps_per_eval=2
    )
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    for text in ("Loss on held-out documents", "Hit rate", "Answer 2", "learning_rate", "hits"):
        assert text in page
    found = held(world, teacher=str(world.teacher), samples=1)
    (answer,) = found.answers
    hostile = Held(**vars(found) | {"answers": (type(answer)("<script>", "a", "b", "c", 0.5),)})
    page = evaluation_page(hostile)
    assert "<script>" not in page and "&lt;script&gt;" in page and "://" not in page
    assert run_page(tmp_path / "o", hostile).count("Reliability") >= 1
    with pytest.raises(ConfigError, match="holds no run"):
        run_page(tmp_path)


def test_the_command_prints_a_table_and_writes_numbers_and_page(world: World, tmp_path: Path) -> None:
    args = f"--student {world.student} --dataset {world.data} --store {world.store} --quiet"
    result = CliRunner().invoke(
        command.main, [*args.split(), "--json", f"{tmp_path}/e.json", "--html", f"{tmp_path}/e.html"]
    )
    assert result.exit_code == 0 and "KL(teacher || student), nats" in result.stdout
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["figures"]["kl"]["value"] > 0 and len(numbers["reliability"]) == 15
    assert (tmp_path / "e.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    result = CliRunner().invoke(command.main, [*args.split(), "--teacher", str(world.teacher)])
    assert result.exit_code == 2 and "type --teacher T, or --store STORE" in result.stderr
