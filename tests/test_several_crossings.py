"""Several teachers with tokenizers of their own: each one's targets by the student's names, then combined."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_trainer.cross_vocab import crossing_of
from distill_trainer.several_crossings import SeveralCrossings
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.train import train
from logitstore.errors import ConfigError, IncompatibleStoreError, LogitstoreError
from logitstore.model import load_model
from logitstore.sequences import TokenSequence
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from tests.runs import World, make_world, write_jsonl
from tests.test_across import LEARNING
from tests.test_combine import dense
from tests.tiny import CORPUS, save_tiny_model, tiny_tokenizer

A, B = 0.7, 0.3
SAMPLE, TRUNCATED = "threshold:16", "top-k:50"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Stores of `teacher`, whose tokens are the student's, and of `other`, with 330 tokens of its own."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    save_tiny_model(world.folder / "other", seed=7, vocab_size=330)
    tokenizer = tiny_tokenizer(330, texts=[text[::2] + text for text in CORPUS[2:]])
    tokenizer.save_pretrained(world.folder / "other")
    for name in ("teacher", "other"):
        for select in (SAMPLE, TRUNCATED):
            world.build(path(world, name, select), teacher=str(world.folder / name), select=select)
    write_jsonl(world.folder / "train.jsonl", [{"text": text} for text in CORPUS[:4]])
    write_jsonl(world.folder / "valid.jsonl", [{"text": text} for text in CORPUS[4:]])
    return world


def path(world: World, teacher: str, select: str) -> Path:
    return world.folder / f"{teacher}-{select.replace(':', '-')}.zarr"


def mixture(world: World, select: str) -> tuple[str, str]:
    return f"{path(world, 'teacher', select)}={A}", f"{path(world, 'other', select)}={B}"


def answered(world: World, stores: tuple[str, ...], **options: Any) -> list[tuple[TokenSequence, SparseTargets | None]]:
    """Each document as it crosses, with its targets; a single store is asked as it is."""
    config = world.config(world.folder / "none", store=stores, on_miss="skip", min_coverage=0.1, **options)
    teachers, student = open_stores(config), load_model(world.student)
    sequences = world.sequences()
    crossing = crossing_of(config, teachers, student, 384, sequences, lambda _: None)
    if crossing is not None:
        teachers, sequences = crossing.teachers, crossing.over(sequences, lambda _: None)
    with target_source(config, teachers, student.tokenizer, crosses=crossing is not None) as source:
        return list(zip(sequences, source.answer(sequences)[0], strict=True))


@pytest.mark.parametrize("select", [SAMPLE, TRUNCATED])
def test_a_mixture_is_that_of_what_each_teaches_alone(world: World, select: str) -> None:
    ours, theirs = (str(path(world, name, select)) for name in ("teacher", "other"))
    alone = answered(world, (theirs,), cross_vocab="mapped")
    own = answered(world, (ours,))
    both = answered(world, mixture(world, select))
    rows = 0
    for (_, a), (crossed, b), (sequence, found) in zip(own, alone, both, strict=True):
        assert a is not None and b is not None and found is not None
        assert sequence.asked is not None and sequence.asked.taught is not None
        assert crossed.asked is not None and crossed.asked.taught is not None
        assert (sequence.asked.taught == crossed.asked.taught).all()
        at = np.flatnonzero(sequence.asked.taught[: len(found)])
        cell = 0 if select == TRUNCATED else b.weights.sum(axis=1, keepdims=True) - 1  # what has a name, no cell in it
        assert np.abs(cell).max() < 1e-5
        expected = A * dense(a.rows(at), 384) + B * dense(b.rows(at), 384)
        assert dense(found.rows(at), 384) == pytest.approx(expected, abs=1e-6)
        if select == TRUNCATED:
            tails = A * np.exp(a.log_tail_mass[at]) + B * np.exp(b.log_tail_mass[at])
            assert np.exp(found.log_tail_mass[at]) == pytest.approx(tails, abs=1e-5)
        rows += len(at)
    assert rows > 50


@pytest.mark.parametrize("select", [SAMPLE, TRUNCATED])
def test_a_student_learns_from_teachers_of_two_tokenizers(world: World, tmp_path: Path, select: str) -> None:
    shown = {"dataset": str(world.folder), "valid_split": "valid", "steps_per_eval": 1}
    report, lines = world.train(tmp_path / "o", store=mixture(world, select), **LEARNING, **shown)
    assert lines[-1]["valid_kd_loss"] < lines[0]["valid_kd_loss"] - 0.02
    assert report.count.misses == 0
    assert 0 < sum(line["taught"] for line in lines) < sum(line["trained_tokens"] for line in lines)
    assert report.across is not None and "other-" in report.across["teaches"]


def test_each_document_has_the_teacher_of_its_column(world: World, tmp_path: Path) -> None:
    rows = [{"text": text, "of": "xy"[number % 2]} for number, text in enumerate(CORPUS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    stores = f"{path(world, 'teacher', SAMPLE)}=x", f"{path(world, 'other', SAMPLE)}=y"
    said: list[str] = []
    config = world.config(
        tmp_path / "o", store=stores, combine="column:of", dataset=str(tmp_path), min_coverage=0.1, iters=6
    )
    report = train(config, said.append)
    assert report.count.misses == 0
    assert not any("no store begins with" in line for line in said)
    sequences = [replace(s, columns={"of": r["of"]}) for s, r in zip(world.sequences(), rows, strict=True)]
    crossing = SeveralCrossings(config, open_stores(config), load_model(world.student), 384)
    for sequence in crossing.over(sequences, lambda _: None):
        found = crossing.teachers.of(sequence).get(sequence.token_ids)
        assert found is not None
        own = open_store(path(world, "teacher", SAMPLE)).get(sequence.token_ids)
        if sequence.columns["of"] == "x":
            assert own is not None and (found.ids == own.ids).all()
            assert sequence.asked is not None and sequence.asked.taught is not None and sequence.asked.taught.all()


def test_a_run_is_resumed_to_the_last_bit(world: World, tmp_path: Path) -> None:
    options = {"store": mixture(world, SAMPLE), "min_coverage": 0.3}
    _, whole = world.train(tmp_path / "whole", **options, iters=4)
    world.train(tmp_path / "o", **options, iters=2, save_every=2)
    _, parts = world.train(tmp_path / "o", **options, iters=4, resume=True, save_every=2)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"cross_vocab": "span"}, ConfigError, "--cross-vocab span does not combine several teachers"),
        ({"loss": ("reverse-kl",)}, IncompatibleStoreError, "cannot serve --loss reverse-kl"),
        ({"min_coverage": 0.999}, ConfigError, "carries over 0.* of what the teacher says"),
        (
            {"teacher_tokenizer": "{teacher}"},
            ConfigError,
            "--teacher-tokenizer of several teachers needs .*; leave it out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    world: World, tmp_path: Path, options: dict[str, Any], kind: type[LogitstoreError], expected: str
) -> None:
    options = {k: v.format(teacher=world.teacher) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(kind, match=expected):
        world.train(tmp_path / "o", store=mixture(world, SAMPLE), **options)
    assert not (tmp_path / "o").exists()
