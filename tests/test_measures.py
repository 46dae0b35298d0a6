import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distill_cli.logitstore import main
from logitstore.condition import Condition
from logitstore.errors import ConfigError
from logitstore.measures import Measures, label_is_likeliest, measure
from logitstore.query import query
from logitstore.recipe import DocumentRecord
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCAB, VOCABULARY, guessed, manifest, tokens

TOKENS = np.array([5, 6, 7, 8, 9], np.int32)


def targets(**changed: Any) -> SparseTargets:
    """Labels 6, 7, 8, 9: the likeliest, the second, one drawn from the tail, and one whose head is empty."""
    made = SparseTargets(
        positions=np.arange(4, dtype=np.int32),
        ids=np.array([[6, 30, 0], [7, 31, 0], [32, 8, 33], [9, 34, 35]], np.uint32),
        weights=np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.4, 0.4], [0.4, 0.3, 0.3]], np.float32),
        head_count=np.array([2, 2, 1, 0], np.int32),
        log_tail_mass=np.full(4, np.log(0.5), np.float32),
        label_log_prob=np.array([-0.5, -1, -4, -6.5], np.float32),
        entropy=np.array([1, 2, 3, 4], np.float32),
    )
    return replace(made, **changed)


def test_measures_are_means_over_positions_worked_out_by_hand() -> None:
    assert measure(TOKENS, targets()) == Measures(
        positions=4, length=5, nll=3.0, entropy=2.5, correct=0.25, tail_mass=0.5
    )
    assert measure(TOKENS, targets()).disagreement == 0.75
    trained = np.array([True, True, False, False])
    assert measure(TOKENS, targets(), trained) == Measures(2, 5, 0.75, 1.5, 0.5, 0.5)
    untrained = measure(TOKENS, targets(), np.zeros(4, np.bool_))
    assert untrained.positions == 0 and math.isnan(untrained.nll) and math.isnan(untrained.disagreement)


def test_a_document_that_is_answered_in_part_is_measured_as_far_as_it_is() -> None:
    found = measure(TOKENS, targets().rows(slice(0, 2)), np.array([False, True, True, True]))
    assert (found.positions, found.nll, found.entropy) == (1, 1.0, 2.0)


def test_a_label_is_correct_where_no_head_entry_outweighs_it() -> None:
    assert label_is_likeliest(TOKENS, targets()).tolist() == [True, False, False, False]
    equal = targets(weights=np.full((4, 3), 1 / 3, np.float32))
    assert label_is_likeliest(TOKENS, equal).tolist() == [True, True, False, False]


@pytest.mark.parametrize("select", ["threshold:16", "top-k:8", "top-p:0.9:8"])
def test_on_a_store_they_are_those_of_the_whole_distributions(tmp_path: Path, select: str) -> None:
    made = manifest(select)
    document, rng = tokens(3, 400), np.random.default_rng(0)
    logits = rng.normal(0, 4, (399, VOCAB)).astype(np.float32)
    rows = np.flatnonzero(rng.random(399) < 0.5)
    logits[rows, document[rows + 1]] += 8  # half of the labels are likely
    store = ZarrStore.create(tmp_path / "s", made, VOCABULARY)
    store.write_documents([DocumentRecord(document, made.recipe.record(document, logits))])
    (found,) = query(store)
    z = logits.astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    assert found.measures.nll == pytest.approx(
        np.minimum(-log_p[np.arange(399), document[1:]], 15.875).mean(), abs=0.03
    )
    assert found.measures.entropy == pytest.approx(-(np.exp(log_p) * log_p).sum(axis=1).mean(), abs=0.03)
    top = np.sort(log_p, axis=1)
    near = (top[:, -1] - top[:, -2] < 0.2).mean()  # there the store's rounding may take the other one
    assert abs(found.measures.correct - (log_p.argmax(axis=1) == document[1:]).mean()) <= near < 0.2


def test_conditions_are_read_and_hold_as_they_say() -> None:
    measures = Measures(4, 5, 2.0, 1.0, 0.5)
    for text, holds in {
        "nll<2": False,
        "nll <= 2": True,
        "nll>1.5": True,
        "length==5": True,
        "entropy>=1.01": False,
        "disagreement=0.5": True,
        "teacher-correct": True,
        "teacher-correct:0.6": False,
    }.items():
        assert Condition.parse(text).holds(measures) == holds, text
    assert not Condition.parse("nll<9").holds(replace(measures, nll=math.nan))
    assert str(Condition.parse("teacher-correct:0.6")) == "correct>=0.6"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nl<2", "names no measure; did you mean nll"),
        ("nll", "is no condition; type --where 'nll<2.5'"),
        ("nll<x", "is no condition"),
        ("nll<nan", "is no condition"),
        ("nll<1<2", "is no condition"),
        ("teacher-correct:2", "has the share '2', expected 0 to 1; type --where teacher-correct:0.5"),
        ("teacher-correct:", "has the share '', expected 0 to 1"),
    ],
)
def test_what_is_no_condition_is_told_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Condition.parse(text)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    """Five documents in three shards."""
    made, rng = manifest(), np.random.default_rng(1)
    store = ZarrStore.create(tmp_path_factory.mktemp("q") / "s.zarr", made, VOCABULARY)
    for some in ([7, 2], [30], [12, 5]):
        store.write_documents([guessed(tokens(n, n + len(some)), made.recipe, rng) for n in some])
    return store


def test_documents_are_listed_in_order_and_by_any_measure(store: ZarrStore) -> None:
    plain = list(query(store))
    assert [each.number for each in plain] == list(range(5))
    assert [each.measures.positions for each in plain] == [len(store.document(n)[1]) for n in range(5)]
    for name in ("nll", "entropy", "disagreement", "length", "tail_mass"):
        rising = sorted(plain, key=lambda each: (each.measures.value(name), each.number))
        assert list(query(store, sort=name)) == rising
        falling = sorted(plain, key=lambda each: (-each.measures.value(name), each.number))
        assert list(query(store, sort=name, descending=True)) == falling
        assert list(query(store, sort=name, descending=True, limit=2)) == falling[:2]
    middle = sorted(each.measures.nll for each in plain)[2]
    asked = [f"nll>{middle}", "length>3"]
    assert list(query(store, asked)) == [e for e in plain if e.measures.nll > middle and e.measures.length > 3]
    assert list(query(store, limit=2)) == plain[:2]


def test_the_command_prints_a_line_for_each_document_or_its_json(store: ZarrStore) -> None:
    def run(*args: str) -> list[str]:
        result = CliRunner().invoke(main, ["query", str(store.path), *args])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    header, *lines = run("--sort", "length", "--descending", "--limit", "1")
    token_ids, targets = store.document(int(lines[0].split()[0]))
    assert header.split()[:3] == ["document", "key", "positions"] and len(lines) == 1
    assert lines[0].split()[2] == str(len(targets))
    assert f"{-targets.label_log_prob.mean(dtype=np.float64):.3f}" in lines[0]
    assert f"'<{token_ids[0]}><{token_ids[1]}>" in lines[0]
    first, *_ = map(json.loads, run("--json"))
    assert first["document"] == 0 and len(first["key"]) == 32 and first["begins"].startswith("<")
    assert first.keys() == {
        *("document", "key", "positions", "length", "nll", "entropy", "correct", "disagreement", "tail_mass", "begins")
    }
    for args, expected in (
        (["--sort", "entropi"], "--sort entropi names no measure; did you mean entropy"),
        (["--where", "nll"], "is no condition"),
        (["--limit", "0"], "limit is 0"),
    ):
        result = CliRunner().invoke(main, ["query", str(store.path), *args])
        assert result.exit_code == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_measure_that_a_store_does_not_know_is_shown_as_such_and_refused(tmp_path: Path) -> None:
    for made, lacking in (
        (manifest("random:9"), {"correct", "disagreement", "tail_mass"}),
        (replace(manifest("top-k:4"), imported="dwq", unknown=("entropy",)), {"entropy"}),
    ):
        store = ZarrStore.create(tmp_path / str(made.imported), made, VOCABULARY)
        store.write_documents([guessed(tokens(1, 9), made.recipe, np.random.default_rng(0))])
        (found,) = query(store)
        assert {name for name, value in found.to_json().items() if value is None} == lacking
        assert " - " in found.to_text()
        for name in lacking:
            with pytest.raises(ConfigError, match=f"does not know {name}: .*; type one of length"):
                query(store, sort=name)
            with pytest.raises(ConfigError, match=f"does not know {name}"):
                query(store, [f"{name}>0"])


def test_a_text_that_is_cut_within_a_character_shows_the_whole_ones(tmp_path: Path) -> None:
    made = manifest("top-k:4")
    vocabulary = Vocabulary(tuple(b"\xe4" if i == 5 else b"\n" for i in range(VOCAB)), frozenset(), None, None)
    store = ZarrStore.create(tmp_path / "s", made, vocabulary)
    store.write_documents([guessed(np.array([9, 9, 5], np.int32), made.recipe, np.random.default_rng(0))])
    (found,) = query(store)
    assert found.begins == "\n\n" and found.to_text().endswith(r"'\n\n'")
