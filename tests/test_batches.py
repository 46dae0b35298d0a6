from itertools import chain, islice

import numpy as np

from distill_trainer.batches import Weighing, collate, epochs
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets


def sequence(token_ids: list[int], trained: list[bool]) -> TokenSequence:
    return TokenSequence(np.array(token_ids, np.int32), np.array(trained), "here", 0)


def targets(positions: int, first_id: int) -> SparseTargets:
    """Two entries per position, of which the first is `first_id` + position."""
    ids = np.stack([first_id + np.arange(positions), np.zeros(positions, np.int64)], axis=1).astype(np.uint32)
    zeros = np.zeros(positions, np.float32)
    weights = np.tile(np.array([0.75, 0.25], np.float32), (positions, 1))
    counts = np.full(positions, 2, np.int32)
    return SparseTargets(np.arange(positions, dtype=np.int32), ids, weights, counts, zeros, zeros, zeros)


SHORT = sequence([5, 6, 7], [False, True])  # a prompt of two tokens
LONG = sequence([10, 11, 12, 13, 14], [True, True, False, True])


def test_the_row_of_position_t_carries_the_label_t_plus_1_and_the_targets_of_t() -> None:
    batch = collate([SHORT, LONG], [targets(2, 100), targets(4, 200)], Weighing(0.9, "error"))
    assert batch is not None
    assert batch.tokens.tolist() == [[5, 6, 0, 0], [10, 11, 12, 13]]
    assert batch.rows.tolist() == [1, 4, 5, 7]  # b * 4 + t: neither padding, nor prompt, nor the untrained position
    assert batch.labels.tolist() == [7, 11, 12, 14]
    assert batch.ids[:, 0].tolist() == [101, 200, 201, 203]
    assert np.allclose(batch.kd_weight, 0.9)
    assert np.allclose(batch.ce_weight, 0.1)


def test_a_position_without_targets_is_left_out_or_trained_on_its_label_alone() -> None:
    answers = [None, targets(4, 200)]
    skip = collate([SHORT, LONG], answers, Weighing(0.9, "skip"))
    hard = collate([SHORT, LONG], answers, Weighing(0.9, "hard-only"))
    assert skip is not None
    assert hard is not None
    assert skip.rows.tolist() == [4, 5, 7]
    assert hard.rows.tolist() == [1, 4, 5, 7]
    assert np.allclose(hard.kd_weight, [0, 0.9, 0.9, 0.9])
    assert np.allclose(hard.ce_weight, [1, 0.1, 0.1, 0.1])
    assert not np.array(hard.weights)[0].any()


def test_a_batch_with_nothing_to_train_is_none() -> None:
    assert collate([SHORT, LONG], [None, None], Weighing(0.9, "skip")) is None


def test_every_epoch_has_every_document_once_in_another_order() -> None:
    lengths = [3, 9, 4, 1, 5, 9, 2]
    batches = list(islice(epochs(lengths, 2, seed=0), 8))
    assert [epoch for epoch, _ in batches] == [0] * 4 + [1] * 4
    first, second = ([numbers for _, numbers in half] for half in (batches[:4], batches[4:]))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(7))
    assert first != second
    assert batches == list(islice(epochs(lengths, 2, seed=0), 8))
    assert batches != list(islice(epochs(lengths, 2, seed=1), 8))
