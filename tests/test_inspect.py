from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitstore.errors import ConfigError
from logitstore.info import info, to_text
from logitstore.inspect import inspect
from logitstore.recipe import DocumentRecord
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCAB, VOCABULARY, contents, manifest, small_store

TOKENS = np.array([5, 6, 7], np.int32)


def one_document(path: Path, vocabulary: Vocabulary, probs: dict[int, float]) -> ZarrStore:
    made = manifest("top-k:3")
    made = replace(made, tokenizer=replace(made.tokenizer, size=len(vocabulary)))
    store = ZarrStore.create(path, made, vocabulary)
    logits = np.full((2, VOCAB), -30.0, np.float32)
    for token, p in probs.items():
        logits[:, token] = np.log(p)
    store.write_documents([DocumentRecord(TOKENS, made.recipe.record(TOKENS, logits))])
    return store


def test_a_position_shows_what_followed_and_the_candidates_largest_first(tmp_path: Path) -> None:
    store = one_document(tmp_path / "s", VOCABULARY, {9: 0.7, 6: 0.2, 8: 0.1})
    title, header, first, second = inspect(store, 0)
    assert title.startswith("document 0: 3 tokens, perplexity ") and "next token" in header
    assert first.split()[:3] == ["0", "'<6>'", "0.197"]  # 0.2 on the grid of 1/16 nat
    assert first.index("'<9>' 0.") < first.index("'<6>'* 0.") < first.index("'<8>' 0.")
    assert second.split()[:2] == ["1", "'<7>'"] and "*" not in second
    assert "'<6>'*" not in "".join(list(inspect(store, 0, shown=1))[2:])


def test_entries_drawn_from_the_tail_are_marked(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    drawn = sum(line.count("~ ") for line in list(inspect(store, 0))[2:])
    _, targets = store.document(0)
    assert drawn == (4 - targets.head_count).sum()


def test_an_id_that_the_tokenizer_has_no_token_for_is_shown_as_such(tmp_path: Path) -> None:
    store = one_document(tmp_path / "s", Vocabulary((b"a",) * 8, frozenset(), None, None), {299: 1.0})
    assert "<no token 299> 1.000" in list(inspect(store, 0))[2]


def test_a_document_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"document 6 is not there: .* holds 0 \.\. 5; type --document 0"):
        list(inspect(small_store(tmp_path / "s"), 6))
    with pytest.raises(ConfigError, match="holds none yet"):
        list(inspect(ZarrStore.create(tmp_path / "empty", manifest(), VOCABULARY), 0))


def test_info_counts_what_is_on_disk(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    facts = info(store)
    size = sum(map(len, contents(store.path).values()))
    assert (facts["documents"], facts["positions"], facts["shards"], facts["disk_bytes"]) == (6, 72, 2, size)
    assert facts["bytes_per_token"] == size / 72 and facts["unfinished_builds"] == 0
    (store.path / ".journal-build").touch()
    assert "1 build(s) running or interrupted" in to_text(info(store), "s")


def test_info_of_an_empty_store_divides_nothing_by_nothing(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY)
    assert info(store)["bytes_per_token"] is None and "- per token" in to_text(info(store), "s")


def test_bytes_that_are_no_whole_character_are_shown_as_bytes(tmp_path: Path) -> None:
    tokens = tuple(b"\xc3" if i == 9 else b"a" for i in range(VOCAB))
    store = one_document(tmp_path / "s", Vocabulary(tokens, frozenset(), None, None), {9: 1.0})
    assert "b'\\xc3' 1.000" in list(inspect(store, 0))[2]
