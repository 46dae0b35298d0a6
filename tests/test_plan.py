import numpy as np
import pytest

import logitstore.plan
from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.plan import Part, plan_batches, window_count, windows
from logitstore.sequences import TokenSequence


def sequences(lengths: list[int]) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1_000, length).astype(np.int32) for length in lengths]
    return [TokenSequence(row, np.ones(len(row) - 1, np.bool_), "", 0) for row in rows]


def documents(lengths: list[int]) -> dict[bytes, TokenSequence]:
    return {document_key(sequence.token_ids): sequence for sequence in sequences(lengths)}


def planned(rows: list[TokenSequence], done: frozenset[bytes] = frozenset()) -> list[list[bytes]]:
    return [list(window) for window in windows(rows, lambda key: key not in done)]


LENGTHS = np.random.default_rng(1).integers(2, 60, 80).tolist()


def test_equal_documents_count_once_in_the_order_of_their_first() -> None:
    rows = [np.array(ids, np.int32) for ids in ([1, 2], [3, 4], [1, 2], [5, 6])]
    (found,) = windows([TokenSequence(row, np.ones(1, np.bool_), str(i), 0) for i, row in enumerate(rows)], bool)
    assert [sequence.where for sequence in found.values()] == ["0", "1", "3"]
    assert list(found) == [document_key(ids) for ids in ([1, 2], [3, 4], [5, 6])]


def test_equal_documents_of_two_windows_in_a_row_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logitstore.plan, "SHARD_POSITIONS", 1)
    rows = sequences([5, 6])
    assert [len(window) for window in planned([rows[0], rows[0], rows[1]])] == [1, 1]


def test_windows_are_cut_where_they_are_full_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logitstore.plan, "SHARD_POSITIONS", 100)
    lengths = [61, 41, 2, 301, 51, 50, 3]
    found = list(windows(sequences(lengths), bool))
    assert [len(s.trained) for window in found for s in window.values()] == [60, 40, 1, 300, 50, 49, 2]
    assert [len(window) for window in found] == [2, 2, 3]
    assert window_count(length - 1 for length in lengths) == 3


def test_what_is_planned_after_finished_shards_is_what_was_planned_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logitstore.plan, "SHARD_POSITIONS", 300)
    shards = planned(sequences(LENGTHS))
    for done in range(1, len(shards)):
        finished = frozenset(key for shard in shards[:done] for key in shard)
        assert planned(sequences(LENGTHS), finished) == shards[done:]


def test_what_is_planned_after_finished_batches_is_what_was_planned_before() -> None:
    todo = documents(LENGTHS)
    batches = plan_batches(todo, 200)
    for done in range(1, len(batches)):
        finished = {key for batch in batches[:done] for key in batch}
        assert plan_batches({key: s for key, s in todo.items() if key not in finished}, 200) == batches[done:]


def test_a_batch_padded_is_no_larger_than_asked_unless_it_is_one_document() -> None:
    todo = documents([*LENGTHS, 500])
    batches = plan_batches(todo, 200)
    assert sorted(key for batch in batches for key in batch) == sorted(todo)
    for batch in batches:
        longest = max(len(todo[key].token_ids) for key in batch)
        assert longest * len(batch) <= 200 or len(batch) == 1
    assert len(batches[0]) == 1 and len(batches) < len(todo) / 2


def test_parts_are_disjoint_and_together_everything() -> None:
    todo = documents(LENGTHS)
    for count in (1, 2, 3, 7):
        holders = [[Part(i, count).holds(key) for i in range(1, count + 1)] for key in todo]
        assert all(sum(row) == 1 for row in holders)
        assert count > 3 or min(np.sum(holders, axis=0)) > len(todo) / count / 2


def test_a_part_is_read_as_it_is_typed() -> None:
    assert (Part.parse("2/3"), Part.parse("1/1")) == (Part(2, 3), Part())
    for text in ("0/2", "3/2", "2", "", "1/", "/2", "-1/2", "1/0", "1/2/3", "²/3", "1/٣", "1/2\n"):
        with pytest.raises(ConfigError, match="type --shard 1/2 here"):
            Part.parse(text)
