import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.target_source import open_stores, target_source
from distill_trainer.targets import Count
from distill_trainer.two_prompts import read_both
from logitstore.asked import align
from logitstore.build import BuildConfig
from logitstore.documents import Document
from logitstore.dry_run import estimate
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError
from logitstore.info import info, to_text
from logitstore.live import replay
from logitstore.manifest import Manifest
from logitstore.model import load_model
from logitstore.prompts import prompted, read_template
from logitstore.sequences import TokenizeReport, TokenSequence
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher
from tests.runs import World, make_world, write_jsonl
from tests.tiny import tiny_tokenizer

TEMPLATE = "You know it is four.\n{input} Say so."
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
ROWS = [
    {"prompt": "2+2=", "completion": "It is four, and more."},
    {"messages": [*TURNS, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "That is all."}]},
    {"prompt": "Où?", "completion": "Là-bas 你好"},
]
HEAD = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
TEACHER_TEXTS = [
    f"{HEAD}You know it is four.\n2+2= Say so.{ANSWER}It is four, and more.<|im_end|>\n",
    f"{HEAD}Why?{ANSWER}Because.<|im_end|>\n{HEAD}You know it is four.\nAnd? Say so.{ANSWER}That is all.<|im_end|>\n",
    f"{HEAD}You know it is four.\nOù? Say so.{ANSWER}Là-bas 你好<|im_end|>\n",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), store=False)
    write_jsonl(made.data, ROWS)
    made.build(made.store, prompt_template=TEMPLATE)
    return made


def read(world: World, **options: Any) -> list[TokenSequence]:
    config = world.config(world.folder / "o", store=(str(world.store),), **options)
    return read_both(config, config.dataset, "train", (), tiny_tokenizer(), TokenizeReport())


def answered(world: World, **options: Any) -> tuple[list[TokenSequence], list[SparseTargets | None], Count]:
    """The documents of a run, and what its source says of them."""
    config = world.config(world.folder / "o", **options)
    sequences = read_both(config, config.dataset, "train", (), tiny_tokenizer(), TokenizeReport())
    with target_source(config, open_stores(config), tiny_tokenizer()) as source:
        return sequences, *source.answer(sequences)


def label_log_probs(world: World, ids: np.ndarray) -> np.ndarray:
    """float64 [L - 1], from the teacher itself."""
    logits = np.array(load_model(world.teacher).model(mx.array(ids[None, :-1])))[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.array(log_p[np.arange(len(ids) - 1), ids[1:]])


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("cut", [512, 36])
def test_a_completion_is_taught_by_the_teacher_that_was_asked_with_its_own_prompt(
    world: World, live: bool, cut: int
) -> None:
    where = {"teacher": str(world.teacher)} if live else {"store": (str(world.store),)}
    sequences, targets, count = answered(world, teacher_prompt_template=TEMPLATE, max_seq_length=cut, **where)
    assert any(s.truncated for s in sequences) == (cut == 36)
    assert (count.misses if live else count.hits) == sum(int(s.trained.sum()) for s in sequences)
    for sequence, target in zip(sequences, targets, strict=True):
        text = TEACHER_TEXTS[int(sequence.where[-1]) - 1]
        ids = np.array(tiny_tokenizer().encode(text))
        taught = label_log_probs(world, ids)
        own = np.flatnonzero(sequence.trained)
        learned = tiny_tokenizer().decode(sequence.token_ids[own + 1])
        assert target is not None and len(target) > own[-1]
        assert sequence.truncated or learned.endswith("<|im_end|>\n")
        # counted from the front, through the teacher's text: where each learned token ends
        ends = [len(tiny_tokenizer().decode(ids[: n + 1]).encode()) for n in range(len(ids))]
        assert "�" not in tiny_tokenizer().decode(ids)
        starts = [len(text.partition(ANSWER)[0].encode()) + len(ANSWER)]
        if text.count(ANSWER) == 2:
            starts.append(len(text.rpartition(ANSWER)[0].encode()) + len(ANSWER))
        closes = [text.encode().index(b"<|im_end|>\n", start) + len("<|im_end|>\n") for start in starts]
        begins = [0, *ends[:-1]]
        there = [
            n - 1
            for n in range(1, len(ids))
            if any(begins[n] >= start and ends[n] <= close for start, close in zip(starts, closes, strict=True))
        ][: len(own)]
        assert tiny_tokenizer().decode(ids[np.array(there) + 1]) == learned
        assert np.allclose(target.label_log_prob[own], np.maximum(taught[there], -15.875), atol=0.04)


def test_a_run_from_the_templated_store_is_the_run_that_asks_live_and_no_other(tmp_path: Path, world: World) -> None:
    options = {"fine_tune_type": "full", "teacher_prompt_template": TEMPLATE, "iters": 4, "save_every": 2}
    stored, from_store = world.train(tmp_path / "store", store=(str(world.store),), **options)
    _, online = world.train(tmp_path / "online", teacher=str(world.teacher), **options)
    assert stored.count.misses == 0
    assert np.allclose([m["loss"] for m in from_store], [m["loss"] for m in online], atol=1e-3)
    _, plain = world.train(tmp_path / "plain", teacher=str(world.teacher), fine_tune_type="full", iters=4)
    assert abs(plain[0]["kd_loss"] - online[0]["kd_loss"]) > 0.01
    held_out = {"valid_dataset": str(world.data), "steps_per_eval": 2}
    _, valid = world.train(tmp_path / "valid", store=(str(world.store),), **options | held_out)
    figures = [step for step in valid if step.get("valid_kd_loss") is not None]
    assert figures and figures[-1]["valid_misses"] == 0
    world.train(tmp_path / "half", store=(str(world.store),), **options | {"iters": 2})
    _, resumed = world.train(tmp_path / "half", store=(str(world.store),), resume=True, **options)
    assert [m["loss"] for m in resumed] == [m["loss"] for m in from_store]


def test_the_same_words_for_both_and_a_bare_place_are_no_two_prompts(world: World) -> None:
    both = read(world, teacher_prompt_template=TEMPLATE, student_prompt_template=TEMPLATE)
    assert all(s.asked is None for s in both)
    assert [tiny_tokenizer().decode(s.token_ids) for s in both] == TEACHER_TEXTS
    assert all(s.asked is None for s in read(world, teacher_prompt_template="{input}"))
    student = read(world, student_prompt_template=TEMPLATE)
    assert [s.token_ids.tolist() for s in student] == [s.token_ids.tolist() for s in both]
    assert [tiny_tokenizer().decode(s.asked_ids) for s in student] == [
        tiny_tokenizer().decode(s.token_ids) for s in read(world)
    ]


def test_without_a_chat_template_the_words_stand_before_the_completion(world: World, tmp_path: Path) -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    data = write_jsonl(tmp_path / "d.jsonl", ROWS[:1])
    config = world.config(tmp_path, store=("s",), dataset=str(data), teacher_prompt_template="Q: {input}\nA: ")
    (sequence,) = read_both(config, config.dataset, "train", (), bare, TokenizeReport())
    assert bare.decode(sequence.token_ids) == "2+2=It is four, and more.<|im_end|>"
    assert bare.decode(sequence.asked_ids) == "Q: 2+2=\nA: It is four, and more.<|im_end|>"
    assert sequence.asked is not None
    shift = len(sequence.asked_ids) - len(sequence.token_ids)
    own = np.flatnonzero(sequence.trained)
    assert (sequence.asked.positions[own] == own + shift).all() and len(own) == len(
        bare.encode(ROWS[0]["completion"])
    ) + 1
    assert sequence.answered(own[0] + shift) <= own[0] and sequence.answered(own[0] + shift + 1) > own[0]


def test_a_completion_that_merges_with_one_prompt_alone_is_refused_by_name(tmp_path: Path, world: World) -> None:
    merging = tiny_tokenizer()
    merging.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "def mean(values", "completion": ":\n    return sum"}])
    config = world.config(tmp_path, store=("s",), dataset=str(data), teacher_prompt_template="{input})")
    assert "):" in [merging.decode(i) for i in merging.encode("def mean(values):")]
    with pytest.raises(DatasetError, match=r"d.jsonl:1: .*the completion is other tokens .*--teacher-prompt-template"):
        read_both(config, config.dataset, "train", (), merging, TokenizeReport())
    ids, trained = np.arange(5, dtype=np.int32), np.array([False, False, True, True])
    with pytest.raises(DatasetError, match="here"):  # one token more on one side is no shift
        align(
            ids, trained, np.arange(6, dtype=np.int32), np.array([False, False, True, True, True]), "here", cut_at=None
        )


def test_a_template_or_a_row_without_a_place_for_it_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"--prompt-template is 'Solve: ' and has no place .* type --prompt-template"):
        BuildConfig("t", "d", Path("o"), prompt_template="Solve: ")
    for name in ("teacher", "student"):
        with pytest.raises(ConfigError, match=f"type --{name}-prompt-template"):
            world.config(world.folder / "o", store=("s",), **{f"{name}_prompt_template": "{inptu}"})
    with pytest.raises(
        ConfigError, match=r"the prompt is trained too; leave --no-mask-prompt out, or type --teacher-prompt-template"
    ):
        world.config(world.folder / "o", store=("s",), teacher_prompt_template=TEMPLATE, mask_prompt=False)
    assert read_template("{input}", "x") is None
    for row, message in (
        ({"text": "One."}, "found a text, expected a prompt"),
        ({"messages": TURNS[:1]}, "the messages end with user, expected"),
        ({"messages": [TURNS[1], TURNS[1]]}, "end with assistant and assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TURNS[1]]}, "expected a user's text"),
    ):
        with pytest.raises(DatasetError, match=f"a.jsonl:1: .*{message}"):
            list(prompted([Document(row, "a.jsonl:1")], TEMPLATE))


def test_a_store_of_another_prompt_is_refused_with_what_to_type(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "plain.zarr")
    for store, template, message in (
        (world.store, None, 'prompt template "You know.* type .*--teacher-prompt-template'),
        (world.store, "Other: {input}", "this run has .*Other"),
        (tmp_path / "plain.zarr", TEMPLATE, "with prompt template none .*leave .*--teacher-prompt-template.* out"),
    ):
        with pytest.raises(IncompatibleStoreError, match=message) as caught:
            open_stores(world.config(tmp_path / "o", store=(str(store),), teacher_prompt_template=template))
        assert "\n" not in str(caught.value)
    with pytest.raises(IncompatibleStoreError, match="prompt template"):
        world.build(world.store)
    for template in (TEMPLATE, None):
        config = BuildConfig(
            str(world.teacher), str(world.data), tmp_path / "x.zarr", prompt_template=template, quiet=True
        )
        assert estimate(config).documents == 3


def test_the_manifest_keeps_the_template_and_older_stores_their_fingerprint(world: World) -> None:
    store = open_store(world.store)
    assert store.manifest.prompt_template == TEMPLATE
    assert Manifest.from_json(store.manifest.to_json(), "x") == store.manifest
    without = replace(store.manifest, prompt_template=None)
    assert "prompt_template" not in without.to_json() and without.fingerprint != store.manifest.fingerprint
    assert "You know it is four.\\n{input}" in to_text(info(store), world.store)
    assert replay(store, Teacher(str(world.teacher), quiet=True), 3, 0, quiet=True).ok
    with pytest.raises(TypeError, match="its prompt template"):
        Manifest.from_json(without.to_json() | {"prompt_template": 3}, "x")


def test_a_live_teacher_reads_so_many_tokens_and_no_more(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    records = Teacher.records

    def watched(self: Teacher, documents: Any, recipe: Any) -> Any:
        asked.extend(map(len, documents))
        return records(self, documents, recipe)

    monkeypatch.setattr(Teacher, "records", watched)
    live = {"teacher": str(world.teacher), "max_teacher_length": 30}
    options = {**live, "store": (str(tmp_path / "kept.zarr"),), "write_back": True}
    sequences, targets, count = answered(world, **options)
    assert max(asked) == 30 and len(asked) == 3
    whole = answered(world, teacher=str(world.teacher))[1]
    for sequence, target, every in zip(sequences, targets, whole, strict=True):
        assert target is not None and every is not None
        assert len(target) == min(29, len(sequence.trained))
        assert np.allclose(target.label_log_prob, every.label_log_prob[: len(target)], atol=0.07)
    beyond = sum(int(s.trained[29:].sum()) for s in sequences)
    trained = sum(int(s.trained.sum()) for s in sequences)
    assert beyond > 0 and (count.hits, count.misses, count.unasked) == (0, trained, beyond)

    asked.clear()
    _, again, count = answered(world, **options)  # shorter than what a lookup by beginnings needs, and there
    assert not asked and (count.hits, count.misses, count.unasked) == (trained - beyond, beyond, beyond)
    assert [len(t) for t in again if t is not None] == [len(t) for t in targets if t is not None]

    world.build(tmp_path / "full.zarr")  # what a store answers is used as far as it goes
    _, _, count = answered(world, **live, store=(str(tmp_path / "full.zarr"),))
    assert not asked and count == Count(trained, 0, 0)

    report, steps = world.train(tmp_path / "o", **live, batch_size=3, iters=2)
    assert report.count.unasked == 2 * beyond and steps[0]["unasked"] == beyond
    assert math.isfinite(steps[-1]["loss"])


def test_a_bound_on_a_teacher_that_nobody_asks_is_refused(world: World) -> None:
    for options in ({"store": ("s",)}, {"teacher": "t", "alpha": 0.0}, {"teacher": "t", "max_teacher_length": 1}):
        with pytest.raises(ConfigError, match="--max-teacher-length"):
            world.config(world.folder / "o", **{"max_teacher_length": 9} | options)
