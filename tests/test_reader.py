"""Batches are what `get` answers, padded; the second thread changes neither their order nor their errors."""

from pathlib import Path

import numpy as np
import pytest

from logitstore.contract import Store
from logitstore.errors import ConfigError, CorruptStoreError
from logitstore.reader import read_batches, read_codes
from logitstore.store import create_store
from tests.stores import VOCABULARY, manifest, records, shard_folder, small_store, tokens


@pytest.fixture(params=["s.zarr", "s.lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = create_store(tmp_path / request.param, manifest(replicas=2), VOCABULARY)
    for seed in range(2):
        documents = records([7, 2, 40], seed, made.manifest.recipe)
        with made.writer("test") as writer:
            writer.append(documents)
            writer.commit([document.key for document in documents])
    return made


def documents() -> list[np.ndarray]:
    """Hits of both shards, a miss, a document that is cut short and one that goes on."""
    long = tokens(2, 40)
    return [tokens(100, 7), tokens(5_000, 9), tokens(1, 2), long[:35], np.append(long, 7), tokens(102, 40)]


@pytest.mark.parametrize("replica", [0, 1])
def test_a_padded_batch_holds_what_get_answers_and_zeros(store: Store, replica: int) -> None:
    (batch,) = read_batches(store, [documents()], replica=replica)
    assert batch.positions.tolist() == [6, 0, 1, 34, 39, 39] and batch.ids.shape == (6, 39, 4)
    for row, token_ids in enumerate(documents()):
        targets, n = store.get(token_ids, replica=replica), batch.positions[row]
        assert (targets is None) == (n == 0)
        if targets is not None:
            assert (batch.ids[row, :n] == targets.ids).all() and (batch.weights[row, :n] == targets.weights).all()
            assert batch.tail_mass[row, :n] == pytest.approx(np.exp(targets.log_tail_mass))
        assert not batch.ids[row, n:].any() and not batch.weights[row, n:].any() and not batch.tail_mass[row, n:].any()


def test_codes_are_those_of_the_records_and_none_for_a_miss(store: Store) -> None:
    hit, miss = tokens(0, 7), tokens(5_000, 9)
    ((found, nothing),) = read_codes(store, [[hit, miss]])
    (record,) = records([7], 0, store.manifest.recipe)
    assert nothing is None and found is not None
    assert (found.ids == store.manifest.recipe.read(record.records).ids).all()


def test_batches_come_in_order_and_a_batch_of_misses_is_empty(store: Store) -> None:
    batches = [[tokens(0, 7)], [tokens(5_000, 9)], [tokens(1, 2), tokens(2, 40)]]
    assert [b.positions.tolist() for b in read_batches(store, batches)] == [[6], [0], [1, 39]]


def test_a_temperature_that_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="serves temperature 1, this run asks for 2"):
        list(read_batches(store, [documents()], temperature=2.0))


def test_damage_is_told_at_the_batch_that_it_concerns(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    entries = shard_folder(store) / "entries-0" / "c" / "0" / "0"
    entries.write_bytes(entries.read_bytes()[:-1])
    batches = read_batches(store, [[tokens(5_000, 9)], [tokens(0, 7)]])
    assert next(batches).positions.tolist() == [0]
    with pytest.raises(CorruptStoreError, match="entries-0"):
        next(batches)
