"""Several stores answer as one: the first that holds a document wholly, else who holds most of it."""

from pathlib import Path

import numpy as np

from logitstore.recipe import DocumentRecord
from logitstore.stack import Stack
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, guessed, manifest, tokens

LONG = tokens(1, 100)


def store(path: Path, *documents: DocumentRecord) -> ZarrStore:
    made = ZarrStore.create(path, manifest(), VOCABULARY)
    made.write_documents(documents)
    return made


def answers(*documents: np.ndarray, seed: int) -> list[DocumentRecord]:
    rng = np.random.default_rng(seed)
    return [guessed(token_ids, manifest().recipe, rng) for token_ids in documents]


def test_the_first_store_that_holds_a_document_answers(tmp_path: Path) -> None:
    first, second = answers(LONG, seed=0), answers(LONG, tokens(2, 9), seed=1)
    stack = Stack([store(tmp_path / "a", *first), store(tmp_path / "b", *second)])
    found = stack.get(LONG)
    assert found is not None and (found.ids == manifest().recipe.read(first[0].records).ids).all()
    assert stack.get(tokens(2, 9)) is not None and stack.get(tokens(3, 9)) is None
    assert first[0].key in stack and second[1].key in stack and answers(tokens(3, 9), seed=0)[0].key not in stack


def test_of_partial_answers_the_longest_counts_and_a_whole_one_before_all(tmp_path: Path) -> None:
    shared = np.concatenate([LONG[:60], tokens(4, 40)])
    stores = [store(tmp_path / "a", *answers(shared, seed=0)), store(tmp_path / "b", *answers(LONG[:90], seed=1))]
    asked = np.append(LONG, 7)
    assert [Stack([s]).answered(asked) for s in stores] == [59, 89]
    for stack in (Stack(stores), Stack(stores[::-1])):
        found = stack.get(asked)
        assert stack.answered(asked) == 89 and found is not None and len(found) == 89
    assert Stack([*stores, store(tmp_path / "c", *answers(asked, seed=2))]).answered(asked) == 100


def test_an_empty_stack_misses_everything() -> None:
    assert Stack([]).get(LONG) is None and Stack([]).answered(LONG) == 0
