import json
from pathlib import Path
from typing import Any

import distill_kernels

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from distill_trainer.config import TrainConfig
from distill_trainer.train import train
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, DatasetError, MissingTargetsError
from logitstore.model import load_model
from logitstore.sequences import tokenize
from logitstore.store import open_store
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CORPUS, tiny_tokenizer

VALID = ("Ask once, and read.", "Two students learn from one teacher.", "for x in y: pass", "What it said is kept.")
DOMAINS = ("talk", "talk", "code", "talk")
DROPOUT = {"rank": 4, "dropout": 0.3, "scale": 10.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Its dataset is a folder with train.jsonl and valid.jsonl, of which the store knows all."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    data = world.folder / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", [{"text": text} for text in CORPUS])
    rows = [{"text": text, "domain": domain} for text, domain in zip(VALID, DOMAINS, strict=True)]
    write_jsonl(data / "valid.jsonl", rows)
    for split in ("train", "valid"):
        world.build(world.store, dataset=str(data), split=split)
    return world


def run(world: World, out: Path, **options: Any) -> list[dict[str, Any]]:
    usual = {"dataset": str(world.folder / "data"), "valid_split": "valid", "store": (str(world.store),)}
    return world.train(out, **usual | {"steps_per_eval": 2} | options)[1]


def by_hand(world: World, student: Path, answered: tuple[int, ...] = (0, 1, 2, 3)) -> list[np.ndarray]:
    """Of each held-out document the KL (0 without targets) and cross-entropy of every position, in float64: [2, P]."""
    model, store, found = load_model(student).model, open_store(world.store), []
    rows = read_documents(str(world.folder / "data"), split="valid")
    for number, sequence in enumerate(tokenize(rows, tiny_tokenizer(), 512)):
        z = np.array(model(mx.array(sequence.token_ids[None, :-1]))[0], np.float64)
        log_q = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        at = np.arange(len(z))
        targets = store.get(sequence.token_ids)
        assert targets is not None
        w = targets.weights.astype(np.float64)
        kl = (w * (np.log(np.where(w > 0, w, 1)) - log_q[at[:, None], targets.ids])).sum(axis=1)
        found.append(np.stack([kl if number in answered else 0 * kl, -log_q[at, sequence.token_ids[1:]]]))
    return found


def test_figures_are_means_over_positions_worked_out_in_float64(tmp_path: Path, world: World) -> None:
    steps = run(world, tmp_path / "o", iters=3, fine_tune_type="full", alpha=0.7, domain_column="domain")
    assert ["valid_loss" in step for step in steps] == [False, True, True]  # every second one, and the last
    documents = by_hand(world, tmp_path / "o")
    for suffix, chosen in (
        ("", documents),
        ("/talk", [d for d, domain in zip(documents, DOMAINS, strict=True) if domain == "talk"]),
        ("/code", documents[2:3]),
    ):
        kd, ce = np.concatenate(chosen, axis=1).mean(axis=1)
        figures = [steps[-1][f"valid_{name}{suffix}"] for name in ("kd_loss", "ce_loss", "loss")]
        assert figures == pytest.approx([kd, ce, 0.7 * kd + 0.3 * ce], rel=1e-5)
    positions = sum(d.shape[1] for d in documents)
    assert (steps[-1]["valid_hits"], steps[-1]["valid_misses"]) == (positions, 0)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["valid"]["valid_loss"] == steps[-1]["valid_loss"]


def test_a_miss_is_handled_as_in_training_and_counted_apart(tmp_path: Path, world: World) -> None:
    store = tmp_path / "s.zarr"
    world.build(store, dataset=str(world.folder / "data"))
    some = write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in VALID[:2]])
    world.build(store, dataset=str(some))
    options = {"store": (str(store),), "iters": 2, "fine_tune_type": "full"}
    documents = by_hand(world, world.student)
    n = [d.shape[1] for d in documents]
    hard = run(world, tmp_path / "hard", on_miss="hard-only", **options)[-1]
    skipped = run(world, tmp_path / "skip", on_miss="skip", **options)[-1]
    online = run(world, tmp_path / "online", teacher=str(world.teacher), **options)[-1]
    for step in (hard, skipped, online):
        assert (step["valid_hits"], step["valid_misses"], step["misses"]) == (n[0] + n[1], n[2] + n[3], 0)
    documents = by_hand(world, tmp_path / "hard", answered=(0, 1))
    first, rest = (np.concatenate(some, axis=1) for some in (documents[:2], documents[2:]))
    kd, ce = first.mean(axis=1)
    assert skipped["valid_loss"] == pytest.approx(0.9 * kd + 0.1 * ce, rel=1e-5)
    assert [hard["valid_kd_loss"], skipped["valid_ce_loss"]] == pytest.approx([kd, ce], rel=1e-5)
    total = (0.9 * first[0] + 0.1 * first[1]).sum() + rest[1].sum()
    assert hard["valid_loss"] == pytest.approx(total / sum(n), rel=1e-5)
    kd, ce = np.concatenate(by_hand(world, tmp_path / "online"), axis=1).mean(axis=1)
    assert online["valid_loss"] == pytest.approx(0.9 * kd + 0.1 * ce, rel=1e-3)  # the teacher's own rounding
    alone = run(world, tmp_path / "alone", teacher=str(world.teacher), **options | {"store": ()})[-1]
    assert (alone["valid_hits"], alone["valid_misses"]) == (0, sum(n))
    assert alone["valid_loss"] == pytest.approx(online["valid_loss"], rel=1e-3)
    with pytest.raises(MissingTargetsError, match="2 of 4 held-out documents are not in the store; type `logitstore"):
        run(world, tmp_path / "error", **options)
    assert not (tmp_path / "error").exists()
    world.build(tmp_path / "train.zarr", dataset=str(world.folder / "data"))
    with pytest.raises(MissingTargetsError, match="no held-out document is in the store"):
        run(world, tmp_path / "none", on_miss="skip", iters=1, store=(str(tmp_path / "train.zarr"),))


def test_without_distillation_the_held_out_loss_is_cross_entropy(tmp_path: Path, world: World) -> None:
    (step,) = run(world, tmp_path / "o", iters=1, store=(), alpha=0.0, fine_tune_type="full")
    ce = np.concatenate(by_hand(world, tmp_path / "o"), axis=1)[1].mean()
    assert step["valid_loss"] == step["valid_ce_loss"] == pytest.approx(ce, rel=1e-5)
    assert step["valid_kd_loss"] is None


def test_measuring_changes_nothing_that_is_learned(tmp_path: Path, world: World) -> None:
    options = {"iters": 5, "lora_parameters": DROPOUT}
    watched = run(world, tmp_path / "watched", steps_per_eval=1, **options)
    alone = run(world, tmp_path / "alone", valid_split=None, **options)
    assert [step["loss"] for step in watched] == [step["loss"] for step in alone]
    saved = [mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("watched", "alone")]
    assert all(mx.array_equal(saved[0][name], saved[1][name]).item() for name in saved[0])


def test_a_whole_head_and_a_schedule_of_alpha_measure_by_the_loss_of_the_last_step(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"iters": 2, "alpha": "0.9->0.2", "steps_per_eval": 1}
    fused = run(world, tmp_path / "fused", **options)
    assert all(
        step["valid_loss"] == pytest.approx(0.2 * step["valid_kd_loss"] + 0.8 * step["valid_ce_loss"]) for step in fused
    )
    monkeypatch.setattr(distill_kernels, "split_head", lambda model: distill_kernels.Head(model, "it is knotted"))
    whole = run(world, tmp_path / "whole", **options)
    assert [step["valid_loss"] for step in whole] == pytest.approx([step["valid_loss"] for step in fused], rel=1e-5)


def test_a_run_that_goes_on_measures_the_same(tmp_path: Path, world: World) -> None:
    options = {"lora_parameters": DROPOUT, "save_every": 4, "val_batches": 1}
    whole = run(world, tmp_path / "whole", iters=12, **options)
    run(world, tmp_path / "cut", iters=8, **options)
    cut = run(world, tmp_path / "cut", iters=12, resume=True, **options)

    def figures(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in step.items() if k == "loss" or k.startswith("valid")} for step in steps]

    assert len(cut) == 12 and figures(cut) == figures(whole)
    data = tmp_path / "other.jsonl"
    write_jsonl(data, [{"text": text} for text in VALID[:2]])
    with pytest.raises(ConfigError, match="was made with valid_dataset none, this run has"):
        run(world, tmp_path / "cut", iters=16, resume=True, valid_split=None, valid_dataset=str(data), **options)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(tmp_path: Path, world: World) -> None:
    """Trained on one text and held out on another: what is learned of the first is lost on the second."""
    data, other = (write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 8}]) for name in ("Read it. ", "(x + 1) "))
    options = {"dataset": str(data), "valid_split": None, "valid_dataset": str(other), "alpha": 0.0}
    options |= {"store": (), "fine_tune_type": "full", "steps_per_eval": 100, "learning_rate": 1e-2}
    steps = run(world, tmp_path / "o", iters=10, save_every=2, **options)
    saved = {step["step"]: step["valid_loss"] for step in steps if "valid_loss" in step}
    assert list(saved) == [2, 4, 6, 8, 10]  # where a checkpoint is, whatever steps_per_eval
    best = min(saved, key=lambda step: saved[step])
    assert best < 10 and steps[-1]["loss"] < steps[0]["loss"]
    assert sorted(int(f.name) for f in (tmp_path / "o" / "checkpoints").iterdir()) == [best, 10]
    mlx_lm.load(str(tmp_path / "o" / "checkpoints" / f"{best:07d}"))


def test_a_run_says_on_how_much_it_measures_and_takes_the_same_documents_each_time(
    tmp_path: Path, world: World
) -> None:
    said: list[str] = []
    options = {"dataset": str(world.folder / "data"), "valid_split": "valid", "store": (str(world.store),)}
    train(world.config(tmp_path / "o", val_batches=1, iters=1, **options), said.append)
    (line,) = [line for line in said if line.startswith("held out")]
    assert line.startswith("held out: 4 documents, ") and line.endswith("; measured on 2 of them")
    assert not [line for line in said if "trained on too" in line]
    options |= {"dataset": str(write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in (*VALID[:3], "More.")]))}
    options |= {"valid_split": None, "valid_dataset": str(world.folder / "data" / "valid.jsonl"), "on_miss": "skip"}
    train(world.config(tmp_path / "twice", iters=1, **options), said.append)
    assert [line for line in said if line.startswith("3 of these 4 are trained on too")]
    assert not [line for line in said if line.endswith("miss")]
    world.build(tmp_path / "one.zarr", dataset=str(write_jsonl(tmp_path / "one.jsonl", [{"text": VALID[0]}])))
    options |= {"store": (str(tmp_path / "one.zarr"),), "on_miss": "hard-only"}
    train(world.config(tmp_path / "lacks", iters=1, **options), said.append)
    assert "held out: 1 of 4 documents are in the store, 3 miss" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps_per_eval": 0}, "type --steps-per-eval 200"),
        ({"val_batches": 0}, "type --val-batches 25"),
        ({"val_batches": -2}, "or -1 for all"),
        ({"valid_split": "train"}, "is what is trained on; type --valid-split valid"),
        ({"domain_column": "domain"}, "type --valid-split valid with it"),
    ],
)
def test_what_cannot_be_held_out_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TrainConfig("s", "d", "o", alpha=0, **options)


def test_a_held_out_dataset_that_is_not_there_is_refused_before_the_run(tmp_path: Path, world: World) -> None:
    for options, expected in (
        ({"valid_split": "test"}, "neither test.jsonl nor test.parquet"),
        ({"valid_split": None, "valid_dataset": str(tmp_path / "none.jsonl")}, "none.jsonl does not exist"),
        ({"domain_column": "domian"}, "has no column 'domian', .* did you mean 'domain'"),
    ):
        with pytest.raises(DatasetError, match=expected):
            run(world, tmp_path / "o", **options)
        assert not (tmp_path / "o").exists()


def test_a_loss_that_moves_is_measured_as_it_is_at_the_end(tmp_path: Path, world: World) -> None:
    store = tmp_path / "s.zarr"
    for split in ("train", "valid"):
        options = {"select": "top-k:24", "temperature": (1.0,), "log_z": (1.0, 2.0)}
        world.build(store, dataset=str(world.folder / "data"), split=split, **options)
    still = run(world, tmp_path / "kl", store=(str(store),), learning_rate=1e-12)
    moving = run(world, tmp_path / "m", store=(str(store),), learning_rate=1e-12, loss=("taid",), temperature="2->1")
    assert [step.get("temperature") for step in moving] == [2.0, 2.0, 1.0]  # 1.5 is nearer to 2, by ratio
    assert moving[-1]["valid_kd_loss"] == pytest.approx(still[-1]["valid_kd_loss"], rel=1e-4)
    assert moving[1]["valid_kd_loss"] == pytest.approx(moving[-1]["valid_kd_loss"], rel=1e-5)
