from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_trainer.batches import BUCKET_BATCHES, epochs
from distill_trainer.choosing import choose
from distill_trainer.config import TrainConfig
from distill_trainer.draw import Draw, by_shares
from distill_trainer.mix import Mix
from distill_trainer.teachers import in_order
from distill_trainer.train import train
from logitstore.errors import ConfigError, DatasetError, MissingTargetsError
from logitstore.measures import measure
from logitstore.sequences import TokenSequence
from logitstore.store import create_store, open_store
from tests.runs import World, make_world, write_jsonl
from tests.stores import VOCABULARY, guessed, manifest, tokens
from tests.tiny import CORPUS

SOURCES = ("math", "code", "math", "math", "code", "web")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    rows = [{"text": text, "source": source} for text, source in zip(CORPUS, SOURCES, strict=True)]
    write_jsonl(world.data, rows)
    return world


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TokenSequence]]:
    """A store of 40 documents of 2 to 41 tokens whose teacher guesses, and these, half of their positions trained."""
    made, rng = manifest(), np.random.default_rng(2)
    store = create_store(tmp_path_factory.mktemp("many") / "s.zarr", made, VOCABULARY)
    documents = [tokens(n, n + 2) for n in range(40)]
    for part in (documents[:30], documents[30:]):
        store.write_documents([guessed(d, made.recipe, rng) for d in part])
    trained = [np.arange(len(d) - 1) % 2 == 0 for d in documents]
    columns = [{"source": "ab"[n % 4 == 0]} for n in range(40)]
    rows = zip(documents, trained, range(40), columns, strict=True)
    return store.path, [TokenSequence(d, t, f"document {n}", 0, c) for d, t, n, c in rows]


def config(**options: Any) -> TrainConfig:
    return TrainConfig("s", "d", "o", **{"store": ("s.zarr",), "quiet": True} | options)


def chosen(many: tuple[Path, list[TokenSequence]], **options: Any) -> tuple[list[int], Draw | None, list[str]]:
    """Numbers of the documents that are left, how they are drawn, and what was said."""
    said: list[str] = []
    path, sequences = many
    kept, draw = choose(
        config(**options), in_order([open_store(path)] if config(**options).store else []), sequences, said.append
    )
    return [int(sequence.where.split()[1]) for sequence in kept], draw, said


def values(many: tuple[Path, list[TokenSequence]], name: str) -> list[float]:
    store = open_store(many[0])
    return [measure(s.token_ids, store.get(s.token_ids), s.trained).value(name) for s in many[1]]


def drawn(draw: Draw | None, lengths: list[int], count: int, batch_size: int = 2) -> list[list[int]]:
    """The documents of the first epochs, in their order."""
    found: list[list[int]] = [[] for _ in range(count)]
    for epoch, numbers in epochs(lengths, batch_size, 0, draw):
        if epoch == count:
            return found
        found[epoch] += numbers
    raise AssertionError


def test_nothing_asked_for_is_each_document_once_and_a_draw_of_all_is_the_same_order(
    many: tuple[Path, list[TokenSequence]],
) -> None:
    assert chosen(many)[:2] == (list(range(40)), None)
    everything = Draw((np.arange(7),), (1.0,))
    lengths = [3, 9, 4, 1, 5, 9, 2]
    assert list(islice(epochs(lengths, 2, 5, everything), 20)) == list(islice(epochs(lengths, 2, 5), 20))


def test_a_filter_keeps_the_documents_whose_trained_positions_fulfil_it(many: tuple[Path, list[TokenSequence]]) -> None:
    nll = values(many, "nll")
    middle = sorted(nll)[20]
    kept, _, said = chosen(many, filter=(f"nll<{middle!r}", "length>=10"))
    assert kept == [n for n in range(40) if nll[n] < middle and n + 2 >= 10]
    assert said == [f"--filter 'nll<{middle:g}' --filter 'length>=10': {len(kept)} of 40 documents are kept"]
    correct = values(many, "correct")
    share = max(correct)
    assert chosen(many, filter=(f"teacher-correct:{share}",))[0] == [n for n in range(40) if correct[n] >= share]


def test_a_sample_draws_in_proportion_with_replacement(many: tuple[Path, list[TokenSequence]]) -> None:
    weights = np.array(values(many, "disagreement"))
    kept, draw, said = chosen(many, sample="disagreement")
    assert kept == [n for n in range(40) if weights[n] > 0]
    assert said == [f"--sample disagreement: an epoch draws {len(kept)} times from as many documents, with replacement"]
    found = drawn(draw, [1] * len(kept), 400)
    assert all(len(epoch) == len(kept) for epoch in found) and max(Counter(found[0]).values()) > 1
    wanted = weights[kept] / weights[kept].sum()
    total = 400 * len(kept)
    often = np.bincount(list(chain(*found)), minlength=len(kept)) / total
    assert (np.abs(often - wanted) < 5 * np.sqrt(wanted / total)).all()


def test_a_curriculum_is_easy_first_in_windows_of_near_measure_and_then_as_usual(
    many: tuple[Path, list[TokenSequence]],
) -> None:
    entropy = values(many, "entropy")
    _, draw, _ = chosen(many, curriculum="entropy")
    first, second = drawn(draw, [len(s.trained) for s in many[1]], 2, batch_size=1)
    ranked = sorted(range(40), key=lambda n: entropy[n])
    for at in range(0, 40, BUCKET_BATCHES):
        assert sorted(first[at : at + BUCKET_BATCHES]) == sorted(ranked[at : at + BUCKET_BATCHES])
    assert first != ranked and sorted(second) == list(range(40))
    assert np.corrcoef(range(40), [entropy[n] for n in first])[0, 1] > 0.8
    assert np.corrcoef(range(40), [entropy[n] for n in second])[0, 1] < 0.6
    without_store = chosen(many, curriculum="length", store=(), teacher="t")[1]
    assert without_store is not None and without_store.ranks is not None
    assert without_store.ranks.tolist() == list(range(2, 42))


def test_within_a_window_of_a_curriculum_near_lengths_are_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 64).tolist()
    draw = Draw((np.arange(64),), (1.0,), ranks=np.arange(64.0))
    batches = [numbers for _, numbers in islice(epochs(lengths, 4, 0, draw), 16)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert max(max(b) for b in batches[:8]) < 32 and np.mean(spread) < 25


def test_a_mix_gives_each_group_its_share_of_every_epoch(many: tuple[Path, list[TokenSequence]]) -> None:
    kept, draw, said = chosen(many, mix="source:b=3,a=1")
    assert [n % 4 == 0 for n in kept] == [True] * 10 + [False] * 30
    assert said == ["--mix source: an epoch draws 30 of b (of 10), 10 of a (of 30); 0 documents are of no group"]
    found = drawn(draw, [1] * 40, 3)
    for epoch in found:
        counts = Counter(epoch)
        assert [counts[i] for i in range(10)] == [3] * 10  # each as often as the others
        assert sum(counts[i] for i in range(10, 40)) == len([i for i in range(10, 40) if counts[i]]) == 10
    assert set(found[0]) != set(found[1])
    alone, _, said = chosen(many, mix="source:a=1")
    assert len(alone) == 30 and said[0].endswith("10 documents are of no group")
    assert (
        by_shares(10, [2, 1]) == [7, 3] and by_shares(3, [1, 1]) == [2, 1] and by_shares(5, [0.1, 0.1, 9]) == [0, 0, 5]
    )


def test_filter_sample_curriculum_and_mix_act_together(many: tuple[Path, list[TokenSequence]]) -> None:
    options = {"filter": ("length>5",), "sample": "nll", "curriculum": "nll", "mix": "source:a=1,b=1"}
    kept, draw, _ = chosen(many, **options)
    (epoch,) = drawn(draw, [1] * len(kept), 1, batch_size=1)
    groups = Counter(kept[i] % 4 == 0 for i in epoch)
    assert len(kept) == 36 and groups == {True: 18, False: 18}
    nll = values(many, "nll")
    order = [nll[kept[i]] for i in epoch]
    assert all(max(order[:at]) <= min(order[at:]) for at in range(BUCKET_BATCHES, 36, BUCKET_BATCHES))


@pytest.mark.parametrize(
    "options", [{"sample": "nll"}, {"curriculum": "nll"}, {"mix": "source:b=3,a=1"}, {"filter": ("nll>5",)}]
)
def test_every_order_is_a_function_of_the_seed_alone(
    many: tuple[Path, list[TokenSequence]], options: dict[str, Any]
) -> None:
    kept, draw, _ = chosen(many, **options)
    again = chosen(many, **options)[1]
    lengths = [n + 1 for n in kept]
    orders = [list(islice(epochs(lengths, 3, seed, d), 50)) for seed, d in ((1, draw), (1, again), (2, draw))]
    assert orders[0] == orders[1] != orders[2]


def test_documents_that_no_store_answers_are_counted_left_out_or_last(
    many: tuple[Path, list[TokenSequence]],
) -> None:
    path, sequences = many
    strange = [TokenSequence(tokens(99 + n, 50), np.ones(49, np.bool_), f"document {40 + n}", 0) for n in range(3)]
    more = (path, [strange[0], *sequences, *strange[1:]])
    kept, _, said = chosen(more, filter=("nll>0",))
    assert kept == list(range(40))
    assert said[-1] == "3 of 43 documents are in no store and have no measure: left out"
    assert chosen(more, sample="nll")[0] == list(range(40))
    kept, draw, said = chosen(more, curriculum="nll")
    (first,) = drawn(draw, [1] * 43, 1, batch_size=1)
    assert {kept[i] for i in first[-3:]} == {40, 41, 42}
    assert said == ["3 of 43 documents are in no store and have no measure: last in the first epoch"]
    with pytest.raises(MissingTargetsError, match=r"answers any of the 3 documents, .* --max-seq-length 2048 .*; type"):
        chosen((path, strange), curriculum="nll")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"filter": ("nl<2",)}, "--filter 'nl<2' names no measure; did you mean nll"),
        ({"sample": "disagree"}, "--sample disagree names no measure; did you mean disagreement"),
        ({"curriculum": "entrop"}, "--curriculum entrop names no measure; did you mean entropy"),
        ({"filter": ("nll<2",), "store": (), "teacher": "t"}, "nll of a document is what a store knows"),
        ({"curriculum": "nll", "teacher": "t", "write_back": True}, "type --store STORE, and not --write-back"),
        ({"mix": "source"}, "--mix 'source' gives '', expected VALUE=SHARE above 0; type --mix"),
        ({"mix": "source:a=0"}, "gives 'a=0', expected VALUE=SHARE above 0"),
        ({"mix": "source:a=1,a=2"}, "names a twice"),
        ({"mix": "source:a=1e308,b=1e308"}, "shares whose sum is no number; type smaller"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config(**options)


def test_what_the_documents_do_not_have_is_refused(many: tuple[Path, list[TokenSequence]], tmp_path: Path) -> None:
    for options, expected in (
        ({"filter": ("length>99",)}, "of 40 documents none is left to train on; type --filter"),
        ({"mix": "source:a=1,bb=1"}, "--mix names bb, which no document has as its source; did you mean b"),
        ({"mix": "source:a=1,b=0.001"}, "leaves a group without a document: 40 of a .*, 0 of b"),
    ):
        with pytest.raises(ConfigError, match=expected):
            chosen(many, **options)
    made = manifest("random:9")
    store = create_store(tmp_path / "r", made, VOCABULARY)
    store.write_documents([guessed(tokens(1, 9), made.recipe, np.random.default_rng(0))])
    with pytest.raises(ConfigError, match=r"does not know disagreement: random:9 counts draws.*; type one of length"):
        choose(config(sample="disagreement"), in_order([store]), many[1], lambda _: None)
    assert Mix.parse("a:x=y=2,z=1").shares == {"x=y": 2.0, "z": 1.0}


def test_training_on_a_filter_is_training_on_the_filtered_file(tmp_path: Path, world: World) -> None:
    store = open_store(world.store)
    nll = [measure(s.token_ids, store.get(s.token_ids), s.trained).nll for s in world.sequences()]
    middle = sorted(nll)[3]
    rows = [{"text": text} for text, each in zip(CORPUS, nll, strict=True) if each < middle]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    options = {"store": (str(world.store),), "iters": 4, "batch_size": 1}
    _, whole = world.train(tmp_path / "a", filter=(f"nll<{middle!r}",), **options)
    _, some = world.train(tmp_path / "b", dataset=str(data), **options)
    assert [step["loss"] for step in whole] == [step["loss"] for step in some]


def test_a_run_that_chooses_goes_on_exactly(tmp_path: Path, world: World) -> None:
    options = {
        "store": (str(world.store),),
        "save_every": 3,
        "batch_size": 1,
        "sample": "nll",
        "curriculum": "entropy",
        "mix": "source:math=2,code=1",
    }
    _, whole = world.train(tmp_path / "whole", iters=12, **options)
    world.train(tmp_path / "cut", iters=6, **options)
    _, cut = world.train(tmp_path / "cut", iters=12, resume=True, **options)
    assert [step["loss"] for step in cut] == [step["loss"] for step in whole]
    with pytest.raises(ConfigError, match="was made with sample nll, this run has none"):
        world.train(tmp_path / "cut", iters=15, resume=True, **options | {"sample": None})


def test_a_column_that_the_dataset_lacks_is_named_with_the_nearest(tmp_path: Path, world: World) -> None:
    with pytest.raises(DatasetError, match=r"has no column 'sorce', .* did you mean 'source'"):
        train(world.config(tmp_path / "o", store=(str(world.store),), mix="sorce:math=1"))
