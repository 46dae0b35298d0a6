"""Several teachers: their mixture, the one that knew the label best, one for each kind of document."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from distill_trainer.combine import Combination
from distill_trainer.mixture import best_of, mixed
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.teachers import in_order
from distill_trainer.train import train
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError, LogitstoreError
from logitstore.model import load_model
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CORPUS, save_tiny_model, tiny_tokenizer

A, B = 0.7, 0.3
FIRST, SECOND = "threshold:16", "top-k:50"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two teachers, `teacher` and `other`, of one tokenizer, and a store of each by both kinds of selection."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    save_tiny_model(world.folder / "other", seed=3)
    for name in ("teacher", "other"):
        for select in (FIRST, SECOND):
            world.build(path(world, name, select), teacher=str(world.folder / name), select=select)
    return world


def path(world: World, teacher: str, select: str) -> Path:
    return world.folder / f"{teacher}-{select.replace(':', '-')}.zarr"


def probabilities(world: World, teacher: str, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """float64 [L - 1, V], of the live model."""
    logits = np.array(load_model(world.folder / teacher).model(mx.array(token_ids[None, :-1]))[0], np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def dense(targets: SparseTargets, vocab_size: int) -> npt.NDArray[np.float64]:
    """Entries as an array [P, V], of which an id that is named twice would show."""
    found = np.zeros((len(targets), vocab_size))
    for row, (ids, weights) in enumerate(zip(targets.ids, targets.weights, strict=True)):
        named = Counter(ids[weights > 0].tolist())
        assert not named or max(named.values()) == 1
        found[row, ids[weights > 0]] = weights[weights > 0]
    return found


def answers(world: World, stores: tuple[str, ...], **options: Any) -> list[SparseTargets | None]:
    config = world.config(world.folder / "none", store=stores, on_miss="skip", **options)
    with target_source(config, open_stores(config), tiny_tokenizer()) as source:
        return source.answer(world.sequences())[0]


def test_a_mixture_of_truncated_teachers_is_what_each_is_known_to_have_given_and_a_cell_for_the_rest(
    world: World,
) -> None:
    stores = [path(world, name, SECOND) for name in ("teacher", "other")]
    for sequence, found in zip(
        world.sequences(), answers(world, (f"{stores[0]}={A}", f"{stores[1]}={B}")), strict=True
    ):
        assert found is not None
        of_each = [open_store(store).get(sequence.token_ids) for store in stores]
        p, q = (probabilities(world, name, sequence.token_ids) for name in ("teacher", "other"))
        expected = np.zeros_like(p)
        for share, all_of_it, kept in zip((A, B), (p, q), of_each, strict=True):
            assert kept is not None
            for row, ids in enumerate(kept.ids):
                expected[row, ids] += share * all_of_it[row, ids]
        got = dense(found, p.shape[1])
        assert ((got > 0) == (expected > 0)).all()
        assert np.abs(got - expected).sum(axis=1).mean() < 0.015
        assert got.sum(axis=1) + np.exp(found.log_tail_mass) == pytest.approx(1, abs=1e-5)
        labels = sequence.token_ids[1:]
        of_label = np.log(A * p[np.arange(len(p)), labels] + B * q[np.arange(len(p)), labels])
        assert found.label_log_prob == pytest.approx(of_label, abs=1 / 16)


def test_a_mixture_of_samples_is_an_unbiased_sample_of_the_mixture(world: World, tmp_path: Path) -> None:
    """Over 60 replicas any sum over its entries has the mean that 0.7 p + 0.3 q gives it, within sampling error."""
    replicas = 60
    write_jsonl(tmp_path / "one.jsonl", [{"text": CORPUS[0]}])
    stores = []
    for name in ("teacher", "other"):
        stores.append(tmp_path / f"{name}.zarr")
        world.build(
            stores[-1],
            teacher=str(world.folder / name),
            dataset=str(tmp_path / "one.jsonl"),
            select=FIRST,
            replicas=replicas,
            seed=len(stores),
        )
    config = world.config(tmp_path / "o", store=(f"{stores[0]}={A}", f"{stores[1]}={B}"), on_miss="skip")
    sequence = world.sequences()[0]
    p = sum(
        share * probabilities(world, name, sequence.token_ids)
        for share, name in zip((A, B), ("teacher", "other"), strict=True)
    )
    with target_source(config, open_stores(config), tiny_tokenizer()) as source:
        drawn = []
        for epoch in range(replicas):
            (found,), _ = source.answer([sequence], epoch)
            assert found is not None
            drawn.append(dense(found, p.shape[1]))
            assert drawn[-1].sum(axis=1) == pytest.approx(1, abs=1e-5)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (200, *p.shape))
    sums = np.einsum("rtv,stv->sr", np.array(drawn) - p, signs)
    z = sums.mean(axis=1) / (sums.std(axis=1, ddof=1) / np.sqrt(replicas))
    assert np.abs(z).max() < 4.5
    assert np.sqrt((z**2).mean()) == pytest.approx(1, abs=0.2)


def test_equal_teachers_mix_to_themselves(world: World, tmp_path: Path) -> None:
    one = path(world, "teacher", SECOND)
    world.build(tmp_path / "again.zarr", select=SECOND)
    for sequence, found in zip(
        world.sequences(), answers(world, (f"{one}=2", f"{tmp_path}/again.zarr=6")), strict=True
    ):
        expected = open_store(one).get(sequence.token_ids)
        assert found is not None and expected is not None
        assert dense(found, 384) == pytest.approx(dense(expected, 384), abs=1e-6)
        assert found.log_tail_mass == pytest.approx(expected.log_tail_mass, abs=1e-4)


@pytest.mark.parametrize("select", [FIRST, SECOND])
def test_by_label_each_position_is_that_of_the_teacher_that_gave_the_label_more(world: World, select: str) -> None:
    stores = [path(world, name, select) for name in ("teacher", "other")]
    taken = [0, 0]
    for sequence, found in zip(
        world.sequences(), answers(world, tuple(map(str, stores)), combine="label"), strict=True
    ):
        of_each = [open_store(store).get(sequence.token_ids) for store in stores]
        assert found is not None and None not in of_each
        for row in range(len(found)):
            first, second = (each.label_log_prob[row] for each in of_each if each is not None)
            best = of_each[int(second > first)]
            assert best is not None
            taken[int(second > first)] += 1
            for name in ("ids", "weights", "head_count", "log_tail_mass", "label_log_prob", "entropy"):
                assert (getattr(found, name)[row] == getattr(best, name)[row]).all()
    assert min(taken) > 10


def test_by_label_the_longer_answer_goes_on_alone_and_the_narrower_is_padded() -> None:
    def made(p: int, k: int, label: float) -> SparseTargets:
        rng = np.random.default_rng(k)
        return SparseTargets(
            positions=np.arange(p, dtype=np.int32),
            ids=rng.integers(0, 99, (p, k)).astype(np.uint32),
            weights=rng.random((p, k)).astype(np.float32),
            head_count=np.full(p, k, np.int32),
            log_tail_mass=np.full(p, -1, np.float32),
            label_log_prob=np.full(p, label, np.float32),
            entropy=np.full(p, 1, np.float32),
        )

    short, long = made(3, 4, -1.0), made(5, 2, -2.0)
    found = best_of([long, short])
    assert (found.ids.shape, found.positions.tolist()) == ((5, 4), [0, 1, 2, 3, 4])
    assert (found.ids[:3] == short.ids).all()
    assert (found.ids[3:, :2] == long.ids[3:]).all()
    assert not found.weights[3:, 2:].any()
    mixture = mixed([short, long], [0.5, 0.5], unbiased=False)
    assert mixture.ids.shape == (3, 6)


def test_each_document_is_taught_by_the_store_of_its_column(world: World, tmp_path: Path) -> None:
    rows = [{"text": text, "subject": "math" if number % 2 else "code"} for number, text in enumerate(CORPUS)]
    rows[-1]["subject"] = "verse"
    write_jsonl(tmp_path / "train.jsonl", rows)
    stores = [f"{path(world, name, SECOND)}={value}" for name, value in (("teacher", "math"), ("other", "code"))]
    said: list[str] = []
    config = world.config(
        tmp_path / "o", store=tuple(stores), combine="column:subject", on_miss="skip", dataset=str(tmp_path)
    )
    report = train(config, said.append)
    assert report.count.misses > 0
    assert re.search(r"documents: \d of math by .*teacher-top-k-50.zarr .*; 1 of another subject", "\n".join(said))
    sequences = [
        replace(s, columns={"subject": row["subject"]}) for s, row in zip(world.sequences(), rows, strict=True)
    ]
    with target_source(config, open_stores(config), tiny_tokenizer()) as source:
        for sequence, found in zip(sequences, source.answer(sequences)[0], strict=True):
            name = {"math": "teacher", "code": "other"}.get(sequence.columns["subject"])
            expected = None if name is None else open_store(path(world, name, SECOND)).get(sequence.token_ids)
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert (found.ids == expected.ids).all()
                assert (found.weights == expected.weights).all()


def test_documents_of_wider_and_narrower_stores_share_a_batch(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "narrow.zarr", teacher=str(world.folder / "other"), select="top-k:5")
    rows = [{"text": text, "subject": "ab"[number % 2]} for number, text in enumerate(CORPUS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    report, lines = world.train(
        tmp_path / "o",
        store=(f"{path(world, 'teacher', SECOND)}=a", f"{tmp_path}/narrow.zarr=b"),
        combine="column:subject",
        dataset=str(tmp_path),
        batch_size=6,
    )
    assert (report.count.misses, len(lines)) == (0, 3)


@pytest.mark.parametrize("select", [FIRST, SECOND])
def test_a_student_of_a_mixture_comes_nearer_to_it_on_held_out_text(world: World, tmp_path: Path, select: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in CORPUS[:4]])
    write_jsonl(tmp_path / "valid.jsonl", [{"text": text} for text in CORPUS[4:]])
    learning = {"fine_tune_type": "full", "learning_rate": 2e-3, "iters": 10, "alpha": 1.0}
    stores = f"{path(world, 'teacher', select)}={A}", f"{path(world, 'other', select)}={B}"
    _, lines = world.train(
        tmp_path / "o", store=stores, dataset=str(tmp_path), valid_split="valid", steps_per_eval=1, **learning
    )
    assert lines[-1]["valid_kd_loss"] < lines[0]["valid_kd_loss"] - 0.05
    assert {line["misses"] for line in lines} == {0}


def test_a_mixture_answers_what_all_answer_and_counts_the_rest(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "few.zarr", teacher=str(world.folder / "other"), select=FIRST, limit=2)
    stores = str(path(world, "teacher", FIRST)), f"{tmp_path}/few.zarr"
    found = answers(world, tuple(f"{store}=1" for store in stores))
    assert [answer is not None for answer in found] == [True, True, False, False, False, False]
    assert all(answer is not None for answer in answers(world, stores, combine="label"))


@pytest.mark.parametrize(
    ("stores", "combine", "expected"),
    [
        (("a=0.7", "b"), None, "--store b gives no share above 0"),
        (("a=0.7", "b=0"), None, "--store b=0 gives no share above 0"),
        (("a=0.7", "b=inf"), None, "--store b=inf gives no share"),
        (("runs/lr=0.7",), None, "type a / after it"),
        (("a=1", "a=1"), None, "names one store twice, a, a; type each once"),
        (("a",), "label", "--combine is given, and 1 store"),
        (("a", "b"), "lable", "--combine lable is no way to combine stores; type --store A=0.7"),
        (("a", "b"), "column:", "is no way to combine stores"),
        (("a=x", "b"), "column:c", "--store b does not say which c it teaches; type --store b=VALUE"),
        (("a=x", "b="), "column:c", "--store b= does not say which c it teaches; type --store b=VALUE"),
        (("a=x", "b=x"), "column:c", "--store names one c twice, x, x"),
    ],
)
def test_stores_that_are_typed_wrong_are_told_what_to_type(
    stores: tuple[str, ...], combine: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        Combination.parse(stores, combine)


def test_what_is_typed_is_read() -> None:
    assert Combination.parse(["x=2", "y=6"], None).shares == (0.25, 0.75)
    assert Combination.parse(["x=1.5e308", "y=1.5e308"], None).shares == (0.5, 0.5)  # whose sum no float holds
    assert Combination.parse(["a", "b"], None) == Combination("order", ("a", "b"))
    assert Combination.parse(["runs/lr=0.1/", "b"], None).paths == ("runs/lr=0.1/", "b")
    read = Combination.parse(["p=q=math", "b=0.5"], "column:kind")
    assert (read.paths, read.values, read.column) == (("p=q", "b"), ("math", "0.5"), "kind")
    assert in_order([]).recipe is None


def test_stores_and_options_that_do_not_go_together_are_refused(world: World, tmp_path: Path) -> None:
    a, b = (path(world, name, FIRST) for name in ("teacher", "other"))
    truncated = path(world, "other", SECOND)
    tiny_tokenizer(300).save_pretrained(save_tiny_model(tmp_path / "foreign", seed=1))
    world.build(tmp_path / "foreign.zarr", teacher=str(tmp_path / "foreign"))
    world.build(tmp_path / "warm.zarr", teacher=str(world.folder / "other"), temperature=(2.0,))
    mixture = (f"{a}=0.5", f"{b}=0.5")
    cases: list[tuple[type[LogitstoreError], dict[str, Any], str]] = [
        (
            ConfigError,
            {"store": (str(a), f"{tmp_path}/foreign.zarr"), "combine": "label"},
            "--combine label compares what teachers gave a label",
        ),
        (IncompatibleStoreError, {"store": (f"{a}=1", f"{truncated}=1")}, "one a sample and one truncated"),
        (ConfigError, {"store": (f"{a}=1", f"{tmp_path}/warm.zarr=1")}, "serves temperature 2, .* none in common"),
        (IncompatibleStoreError, {"store": mixture, "loss": ("reverse-kl",)}, "cannot serve --loss reverse-kl"),
        (ConfigError, {"store": mixture, "teacher": str(world.teacher)}, "--teacher does not fit: a live teacher is"),
        (ConfigError, {"store": mixture, "filter": ("nll<2",)}, "nll of a document does not fit: it is what one"),
        (ConfigError, {"store": mixture, "alpha": 0}, "--alpha 0 does not fit"),
        (ConfigError, {"store": mixture, "hidden_loss": "mse"}, "--hidden-loss does not fit"),
        (ConfigError, {"store": mixture, "temperature": 3.0}, "serves temperature 1, this run asks for 3"),
        (DatasetError, {"store": (f"{a}=x", f"{b}=y"), "combine": "column:kind"}, "has no column 'kind'"),
    ]
    for kind, options, expected in cases:
        with pytest.raises(kind, match=expected):
            world.train(tmp_path / "o", **options)
        assert not (tmp_path / "o").exists()


def test_the_nearest_value_is_named_for_a_store_that_teaches_no_document(world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text, "kind": "code"} for text in CORPUS])
    stores = tuple(f"{path(world, n, FIRST)}={v}" for n, v in (("teacher", "code"), ("other", "cod")))
    with pytest.raises(ConfigError, match="no document has cod as its kind; did you mean code"):
        world.train(tmp_path / "o", store=stores, combine="column:kind", dataset=str(tmp_path))


def test_a_mixture_is_resumed_to_the_last_bit_and_not_with_other_shares(world: World, tmp_path: Path) -> None:
    stores = tuple(f"{path(world, name, FIRST)}={s}" for name, s in (("teacher", A), ("other", B)))
    _, whole = world.train(tmp_path / "whole", store=stores, iters=4)
    world.train(tmp_path / "o", store=stores, iters=2, save_every=2)
    with pytest.raises(ConfigError, match=r"was made with shares or values of --store 0.7, 0.3, this run has 0.6"):
        world.train(tmp_path / "o", store=(stores[0], f"{stores[1]}1"), iters=4, resume=True, save_every=2)
    _, parts = world.train(tmp_path / "o", store=stores, iters=4, resume=True, save_every=2)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


def test_a_run_does_not_go_on_where_other_teachers_teach_its_documents(world: World, tmp_path: Path) -> None:
    rows = [{"text": text, "kind": "ab"[number % 2]} for number, text in enumerate(CORPUS)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    stores = tuple(f"{path(world, name, SECOND)}={value}" for name, value in (("teacher", "a"), ("other", "b")))
    options = {"dataset": str(data), "store": stores, "combine": "column:kind", "save_every": 2, "on_miss": "skip"}
    world.train(tmp_path / "o", iters=2, **options)
    write_jsonl(data, [row | {"kind": "ab"[number < 3]} for number, row in enumerate(rows)])
    with pytest.raises(ConfigError, match="the content of the dataset"):
        world.train(tmp_path / "o", iters=4, resume=True, **options)
