import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.target_source import open_stores
from distill_trainer.weights import thought_spans, weighted
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError, LogitstoreError
from logitstore.model import load_model
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from tests.runs import World, gradient, make_world, write_jsonl
from tests.test_documents import write_parquet
from tests.tiny import tiny_tokenizer

THINKING = [
    {"text": "Ask. <think>One, two.</think> Three.", "right": 1},
    {"text": "No thought here.", "right": 0.5},
    {"text": "<think>It never ends, and more", "right": 2},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), store=False)
    write_jsonl(made.data, THINKING)
    made.build(made.store)
    return made


def read(world: World, dataset: Path | None = None, **options: Any) -> tuple[list[TokenSequence], list[str]]:
    """The weighted documents of a run, and what it says."""
    config, said = world.config(world.folder / "o", store=(str(world.store),), **options), []
    rows = read_documents(str(dataset or world.data), columns=config.columns)
    sequences = list(tokenize(rows, tiny_tokenizer(), 512, columns=config.columns))
    return weighted(sequences, config, tiny_tokenizer(), said.append), said


def weighs(sequence: TokenSequence, weight: float) -> str:
    """The text of the labels that have this weight."""
    assert sequence.weights is not None
    return str(tiny_tokenizer().decode(sequence.token_ids[1:][sequence.weights == np.float32(weight)]))


def test_labels_within_a_thought_weigh_more_and_one_that_never_ends_runs_to_the_end(world: World) -> None:
    sequences, said = read(world, think_weight=3.0)
    assert [weighs(s, 3) for s in sequences] == ["One, two.", "", "It never ends, and more<|im_end|>"]
    assert weighs(sequences[0], 1).endswith("<think></think> Three.<|im_end|>")
    thoughts = sum(int((s.weights == 3).sum()) for s in sequences if s.weights is not None)
    assert said == [f"2 of 3 documents hold thoughts: {thoughts} trained positions weigh 3"]


@pytest.mark.parametrize(
    ("pieces", "thoughts"),
    [
        ("a|<think>|b|c|</think>|d", "bc"),  # marks that are tokens
        ("a|<|th|ink|>|b|c|</|think>|d", "bc"),  # marks of several
        ("a|<think|>\n|b|c|.</|think>|d", "bc"),  # marks that merged with their neighbours: those are no thoughts
        ("a|<think>|</think>|b|<think>|c", "c"),  # an empty one, and one that never ends
        ("a|</think>|b|<think>|c|<think>|d", "c<think>d"),  # marks in the wrong place are text
        ("a|b</think>|<think>c</think>|d", ""),
        ("<think>|a||b|</think>|", "ab"),  # ids without bytes
        ("a|b", ""),
    ],
)
def test_marks_are_found_in_the_bytes_whichever_tokens_spell_them(pieces: str, thoughts: str) -> None:
    tokens = [piece.encode() for piece in pieces.split("|")]
    if "<||" in pieces or "|<|" in pieces:  # the separator is no part of a mark
        assert b"".join(tokens).count(b"<think>") == 1
    found = thought_spans(tokens, b"<think>", b"</think>")
    assert b"".join(token for start, stop in found for token in tokens[start:stop]).decode() == thoughts


def test_a_tokenizer_that_merges_a_mark_with_its_neighbours_hides_no_thought(tmp_path: Path, world: World) -> None:
    (sequence,), _ = read(
        world,
        write_jsonl(tmp_path / "a.jsonl", [{"text": "def mean(values):\n    return sum"}]),
        think_weight=2.0,
        think_start="values)",
        think_end="return",
    )
    tokens = [tiny_tokenizer().decode(i) for i in sequence.token_ids]
    assert "):" in tokens and " re" in tokens  # no mark's own ids are in the document
    assert weighs(sequence, 2) == "\n   "


def test_outcomes_come_from_jsonl_and_parquet_and_multiply_thoughts(tmp_path: Path, world: World) -> None:
    file = Path(write_parquet(tmp_path / "a.parquet", [row | {"right": float(row["right"])} for row in THINKING]))
    for dataset in (world.data, file):
        sequences, _ = read(world, dataset, think_weight=3.0, outcome_column="right")
        assert [set(s.weights.tolist()) for s in sequences if s.weights is not None] == [{1, 3}, {0.5}, {2, 6}]
    rows = [{"text": "Right.", "ok": True}, {"text": "Wrong.", "ok": False}]
    for dataset in (write_jsonl(tmp_path / "b.jsonl", rows), Path(write_parquet(tmp_path / "b.parquet", rows))):
        (kept,), said = read(world, dataset, outcome_column="ok")
        assert weighs(kept, 1) == "ight.<|im_end|>" and said == [
            "1 documents are left out: nothing in them weighs anything"
        ]


def test_what_weighs_nothing_is_not_trained(world: World) -> None:
    sequences, _ = read(world, think_weight=0.0)
    learned = [tiny_tokenizer().decode(s.token_ids[1:][s.trained]) for s in sequences]
    assert learned[0].endswith("<think></think> Three.<|im_end|>") and "One" not in learned[0]
    assert all((s.weights[s.trained] > 0).all() for s in sequences if s.weights is not None)


@pytest.mark.parametrize("value", [-1, None, "yes", math.nan, math.inf, [1]])
def test_an_outcome_that_is_no_weight_names_its_row(tmp_path: Path, world: World, value: Any) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "Fine.", "ok": 1}, {"text": "Bad.", "ok": value}])
    with pytest.raises(DatasetError, match=r"a.jsonl:2: ok is .*, expected true, false or a number of at least 0"):
        read(world, data, outcome_column="ok")


def test_weights_that_can_do_nothing_are_refused(tmp_path: Path, world: World) -> None:
    refused: list[tuple[dict[str, Any], type[LogitstoreError], str]] = [
        ({"think_weight": 2.0, "think_start": "<thought>"}, ConfigError, "none of 3 documents holds '<thought>'"),
        ({"outcome_column": "rihgt"}, DatasetError, "has no column 'rihgt', .* did you mean 'right'"),
    ]
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            read(world, **options)
    with pytest.raises(DatasetError, match="no position weighs anything"):
        read(world, write_jsonl(tmp_path / "a.jsonl", [{"text": "Bad.", "ok": 0}]), outcome_column="ok")


def test_a_store_whose_entropies_are_unknown_weighs_nothing_by_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(world.store)
    manifest = replace(store.manifest, imported="dwq", unknown=("teacher", "entropy"))
    monkeypatch.setattr(type(store), "manifest", manifest, raising=False)
    monkeypatch.setattr("distill_trainer.target_source.open_store", lambda _: store)
    store.__dict__["manifest"] = manifest
    config = world.config(world.folder / "o", store=(str(world.store),), entropy_weight=1.0)
    with pytest.raises(IncompatibleStoreError, match="imported from dwq, which keeps no entropy"):
        open_stores(config)


def batches(world: World, groups: list[list[int]], entropy_weight: float = 0.5, missing: int = 1) -> list[Batch]:
    """Weighted batches; one document is not in the store."""
    sequences, _ = read(world, think_weight=3.0, outcome_column="right")
    store, found = open_store(world.store), []
    for numbers in groups:
        chosen = [sequences[i] for i in numbers]
        targets = [None if i == missing else store.get(sequences[i].token_ids) for i in numbers]
        batch = collate(chosen, targets, Weighing(0.7, "hard-only", entropy_weight))
        assert batch is not None
        found.append(batch)
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_is_the_weighted_mean_of_float64(world: World, whole: bool) -> None:
    model, store = load_model(world.student).model, open_store(world.store)
    (batch,) = batches(world, [[0, 1, 2]])
    head = distill_kernels.split_head(model)
    if whole:
        head = replace(head, reason="told so")
    found = [mean.item() for mean in batch_loss(head, SparseKL(), batch)]

    outcome, sums = [1, 0.5, 2], np.zeros(5)
    for i, sequence in enumerate(read(world, think_weight=3.0)[0]):
        logits = np.array(model(mx.array(sequence.token_ids[None, :-1])))[0].astype(np.float64)
        log_q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        ids, target = sequence.token_ids, store.get(sequence.token_ids)
        assert target is not None
        first, last = [(12, 21), (99, 99), (7, 999)][i]  # characters of the thought
        for t in range(len(ids) - 1):
            begin, end = (len(tiny_tokenizer().decode(ids[:n])) for n in (t + 1, t + 2))
            w = (3.0 if begin >= first and end <= last else 1.0) * outcome[i]
            ce = -log_q[t, ids[t + 1]]
            if i == 1:  # not in the store
                sums += [w * ce, 0, w * ce, w, 0]
                continue
            w *= 1 + 0.5 * float(target.entropy[t])
            p = target.weights[t].astype(np.float64)
            kl = (p * (np.log(np.where(p > 0, p, 1)) - log_q[t, target.ids[t]]))[p > 0].sum()
            sums += [w * (0.7 * kl + 0.3 * ce), w * kl, w * ce, w, w]
    assert found == pytest.approx([sums[0] / sums[3], sums[1] / sums[4], sums[2] / sums[3]], rel=1e-5)


def test_accumulated_batches_weigh_by_their_weights(world: World) -> None:
    model = load_model(world.student).model
    model.unfreeze()
    means, one = gradient(model, batches(world, [[0, 1, 2]]))
    found, several = gradient(model, batches(world, [[1], [2], [0]]))
    assert np.allclose(found, means, rtol=1e-5)
    for name, value in one.items():
        assert np.allclose(several[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * np.abs(value).max()), name


def test_without_weights_a_batch_has_none_and_with_ones_it_is_the_same_batch(world: World) -> None:
    store, sequences = open_store(world.store), world.sequences()
    targets = [store.get(s.token_ids) for s in sequences]
    plain = collate(sequences, targets, Weighing(0.7, "error"))
    ones = [replace(s, weights=np.ones(len(s.trained), np.float32)) for s in sequences]
    weighed = collate(ones, targets, Weighing(0.7, "error"))
    assert plain is not None and weighed is not None
    assert plain.row_weights is None
    for name in set(plain._fields) - {"row_weights"}:
        assert np.array_equal(getattr(plain, name), getattr(weighed, name)), name
    head = distill_kernels.split_head(load_model(world.student).model)
    one, other = ([m.item() for m in batch_loss(head, SparseKL(), batch)] for batch in (plain, weighed))
    assert one == pytest.approx(other, rel=1e-6)


def test_a_run_with_every_weight_goes_on_exactly_and_refuses_other_outcomes(tmp_path: Path, world: World) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", THINKING)
    options = {"dataset": str(data), "store": (str(world.store),), "batch_size": 1, "grad_accumulation_steps": 2}
    options |= {"think_weight": 3.0, "entropy_weight": 0.5, "outcome_column": "right", "save_every": 2}
    _, whole = world.train(tmp_path / "whole", iters=4, **options)
    world.train(tmp_path / "o", iters=2, **options)
    _, resumed = world.train(tmp_path / "o", iters=4, resume=True, **options)
    assert [step["loss"] for step in resumed] == [step["loss"] for step in whole]
    for step in whole:
        assert step["loss"] == pytest.approx(0.9 * step["kd_loss"] + 0.1 * step["ce_loss"], rel=1e-4)
    write_jsonl(data, [row | {"right": 1} for row in THINKING])
    with pytest.raises(ConfigError, match="the content of the dataset"):
        world.train(tmp_path / "o", iters=6, resume=True, **options)
