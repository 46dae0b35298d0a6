"""`distill-eval`: figures from a store beside those of the live teacher, answers, and pages."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
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
from distill_trainer.evaluate import evaluate
from distill_trainer.pages import evaluation_page, run_page
from distill_trainer.stored_evaluation import evaluate_stored
from distill_trainer.two_prompts import read_both
from logitstore.contract import Store
from logitstore.errors import ConfigError, ModelError
from logitstore.import_cache import ImportConfig, import_cache
from logitstore.model import load_model
from logitstore.sequences import TokenizeReport, TokenSequence
from logitstore.store import open_store
from logitstore.teacher import Teacher
from tests.oracle import log_softmax
from tests.runs import World, make_world, write_jsonl
from tests.test_foreign_axolotl import prepared
from tests.test_foreign_axolotl import write as write_axolotl
from tests.test_foreign_document import teacher as distribution
from tests.test_foreign_document import top
from tests.test_plots import HOSTILE, assert_good
from tests.tiny import save_tiny_model, tiny_tokenizer


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
    assert "tokens that the teacher gives 1.3e-07 or more" in full["reverse_kl"].what  # no lower log-prob is kept
    plain = held(world, store=str(world.store)).figures
    assert plain["acceptance"].value is None and "--tail-log-probs" in plain["acceptance"].what
    assert plain["reverse_kl"].value is None and "build --tail-log-probs`: a sample" in plain["reverse_kl"].what
    assert plain["top5_agreement"].value is None and "top-k:5" in plain["top5_agreement"].what


@pytest.mark.parametrize("times", [20, 20_000])
def test_tokens_that_a_nearly_certain_teacher_keeps_no_probability_of_are_not_its_five_likeliest(
    world: World, tmp_path: Path, times: int
) -> None:
    sure = save_tiny_model(tmp_path / "sure", seed=1)
    weights = dict(mx.load(str(sure / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] * times
    mx.eval(weights)
    mx.save_safetensors(str(sure / "model.safetensors"), weights, metadata={"format": "mlx"})
    world.build(tmp_path / "s.zarr", teacher=str(sure), select="top-k:50")
    of_itself = EvalConfig(str(sure), str(world.data), quiet=True, store=str(tmp_path / "s.zarr"))
    five = distill_eval(of_itself).figures["top5_agreement"]
    if times == 20:
        assert five.value is not None and five.value > 0.95 and "positions of which five were kept" in five.what
    else:
        assert five.value is None and five.what == "top-k:50 has five tokens of no position"


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
    assert_good(page)
    found = held(world, teacher=str(world.teacher), samples=1)
    (answer,) = found.answers
    hostile = Held(**vars(found) | {"answers": (type(answer)(HOSTILE, "<script>", "b", "c", 0.5),)})
    page = evaluation_page(hostile)
    assert "<script>" not in page and "&lt;script&gt;" in page and "://" not in page
    assert_good(page)
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


@pytest.fixture
def run(world: World, tmp_path: Path) -> Iterator[Path]:
    world.train(tmp_path / "o", store=(str(world.store),), iters=2)
    yield tmp_path / "o"


def test_a_run_that_was_killed_within_a_line_is_shown_and_a_broken_one_refused(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "After 2 steps." in run_page(run) and "not ended" in run_page(run)
    for broken in ('{"step": 1}\n', "[1]\n", "3\n"):
        (run / "metrics.jsonl").write_text(broken)
        with pytest.raises(ConfigError, match="holds no run that can be shown"):
            run_page(run)


@pytest.mark.parametrize("fault", [KeyError("x"), KeyboardInterrupt()])
def test_a_page_that_fails_does_not_lose_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("distill_trainer.pages.answers", fail)
    report, _ = world.train(tmp_path / "o", store=(str(world.store),), report_samples=1)
    assert report.steps == 3 and (tmp_path / "o" / "adapters.safetensors").exists()
    assert not (tmp_path / "o" / "report.html").exists()


def test_a_run_is_measured_and_shown_on_one_page(world: World, run: Path, tmp_path: Path) -> None:
    args = ["--run", run, "--dataset", world.data, "--store", world.store, "--html", tmp_path / "e.html", "--quiet"]
    result = CliRunner().invoke(command.main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "What it is worth" in page and "Step by step" in page
    trained = distill_eval(
        EvalConfig(str(world.student), str(world.data), str(run), store=str(world.store), quiet=True)
    )
    assert f"{trained.figures['kl'].value:.4f}" in result.stdout
    (run / "adapter_config.json").unlink()
    result = CliRunner().invoke(command.main, list(map(str, args)))
    assert result.exit_code == 2 and "has saved no student" in result.stderr


@pytest.mark.parametrize(
    "how", [{"mask_prompt": False}, {"student_prompt_template": "Be brief. {input}", "alpha": 0.0}], ids=str
)
def test_a_run_is_measured_on_what_its_student_reads(world: World, tmp_path: Path, how: dict[str, Any]) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "How many?", "completion": " Two."}])
    options = {"dataset": str(data), "teacher": str(world.teacher), "iters": 1, **how}
    world.train(tmp_path / "o", **options, learning_rate=1e-9)
    args = ["--run", tmp_path / "o", "--dataset", data, "--teacher", world.teacher, "--json", tmp_path / "e.json"]
    result = CliRunner().invoke(command.main, [*map(str, args), "--html", f"{tmp_path}/e.html", "--quiet"])
    assert result.exit_code == 0, result.output
    config = world.config(tmp_path / "p", **options)
    sequences = read_both(config, str(data), "train", (), tiny_tokenizer(), TokenizeReport())
    wanted = evaluate({"s": load_model(world.student)}, Teacher(str(world.teacher)), sequences, quiet=True)["s"]
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["positions"] == wanted.positions
    assert found["figures"]["kl"]["value"] == pytest.approx(wanted.kl, rel=1e-5)


def imported(world: World, tmp_path: Path, row: dict[str, Any]) -> tuple[Store, TokenSequence]:
    """A store of an axolotl cache of one document, and that."""
    into = ImportConfig(
        format="axolotl",
        source=write_axolotl(tmp_path / "cache", [row]),
        out=tmp_path / "s.zarr",
        teacher="T",
        tokenizer=str(world.student),
        alignment="current",
        assume_normalised=True,
        quiet=True,
    )
    import_cache(into)
    tokens = np.array(row["input_ids"], np.int32)
    return open_store(into.out), TokenSequence(tokens, np.ones(len(tokens) - 1, bool), "here", 0)


def test_no_figure_is_called_a_bound_where_the_tail_was_assumed_to_be_none(world: World, tmp_path: Path) -> None:
    tokens, log_probs = distribution(80, 384)
    store, sequence = imported(world, tmp_path, prepared(tokens, log_probs, 10, legacy=False))
    student = load_model(world.student)
    figures = evaluate_stored(student, store, [sequence], quiet=True).figures
    q = np.exp(log_softmax(np.array(student.model(mx.array(tokens[None, :-1]))[0], np.float64)))
    ids, values = top(log_probs[:-1], 10)
    q, p = np.take_along_axis(q, ids, axis=1), np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    assert figures["kl"].value == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=0.02)
    for name in ("kl", "reverse_kl", "acceptance"):
        assert "bound" not in figures[name].what and "tail assumed to be none" in figures[name].what


def test_the_five_likeliest_are_compared_where_there_are_five(world: World, tmp_path: Path) -> None:
    tokens, log_probs = distribution(80, 384)
    student = load_model(world.student)
    ids = np.argsort(-np.array(student.model(mx.array(tokens[None, :-1]))[0]), axis=1)
    row = prepared(tokens, log_probs, 10, legacy=False)
    row["target_token_ids"][:40] = ids[:40, :2].tolist()  # the student's own, and no more
    row["target_logprobs"][:40] = [[math.log(0.5)] * 2] * 40
    store, sequence = imported(world, tmp_path, row)
    found = evaluate_stored(student, store, [sequence], quiet=True)
    theirs, _ = top(log_probs[40:-1], 5)
    shares = [len(set(a) & set(b)) / 5 for a, b in zip(theirs.tolist(), ids[40:, :5].tolist(), strict=True)]
    assert found.figures["top5_agreement"].value == pytest.approx(np.mean(shares), abs=0.02)
    assert found.figures["top5_agreement"].what.endswith("over the 39 positions of which five were kept")


def test_a_teachers_padding_beyond_the_student_is_left_out(world: World, tmp_path: Path) -> None:
    teacher, student = save_tiny_model(tmp_path / "t", seed=5, vocab_size=416), load_model(world.student)
    world.build(tmp_path / "s", teacher=str(teacher))
    store, sequences = open_store(tmp_path / "s"), world.sequences()
    found, sums, outside = evaluate_stored(student, store, sequences, quiet=True), [], 0
    for s in sequences:
        targets = store.get(s.token_ids)
        assert targets is not None
        z = np.array(student.model(mx.array(s.token_ids[None, :-1]))[0], np.float64)
        log_q = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        for row in range(len(targets)):
            there = targets.ids[row] < 384
            outside += int((~there).sum())
            cross = -(targets.weights[row][there] * log_q[row, targets.ids[row][there]]).sum()
            sums.append(cross - targets.entropy[row])
    assert outside and found.figures["kl"].value == pytest.approx(np.mean(sums), rel=1e-5)


def test_a_students_padding_beyond_the_teacher_is_left_out(world: World, tmp_path: Path) -> None:
    wide = load_model(save_tiny_model(tmp_path / "wide", seed=3, vocab_size=416))
    live = evaluate({"s": wide}, Teacher(str(world.teacher)), world.sequences(), quiet=True)["s"]
    stored = evaluate_stored(wide, open_store(world.store), world.sequences(), quiet=True)
    assert stored.figures["perplexity"].value == pytest.approx(live.perplexity, rel=1e-6)


def test_a_student_without_numbers_is_told_and_infinity_is_null(world: World) -> None:
    student = load_model(world.student)
    student.model.update({"model": {"norm": {"weight": mx.full((32,), mx.nan)}}})
    with pytest.raises(ModelError, match="logits that are no numbers"):
        evaluate({"s": student}, Teacher(str(world.teacher)), world.sequences(), quiet=True)
    with pytest.raises(ModelError, match="logits that are no numbers"):
        evaluate_stored(student, open_store(world.store), world.sequences(), quiet=True)
    found = held(world, store=str(world.store))
    endless = replace(found, figures={"kl": replace(found.figures["kl"], value=float("inf"))})
    assert json.loads(json.dumps(endless.to_json(), allow_nan=False))["figures"]["kl"]["value"] is None


def test_an_answer_ends_with_any_of_the_models_ends(world: World) -> None:
    student, sequences = load_model(world.student), world.sequences()[:1]
    ids = sequences[0].token_ids[: len(sequences[0].token_ids) // 2]
    first = int(np.array(student.model(mx.array(ids[None])))[0, -1].argmax())
    ending = replace(student, config=student.config | {"eos_token_id": [0, first]})
    assert answers(ending, None, sequences, 1)[0].student == ""
