"""The recipe end to end, logits to bytes to targets, on logits shaped like a language model's."""

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.errors import ConfigError
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.targets import SparseTargets

VOCAB = 49_152
REPLICAS = 2_000
THRESHOLD_16 = Recipe(Selection("threshold", 16), 1.0, 0, VOCAB)


def zipf_logits(exponent: float, seed: int) -> npt.NDArray[np.float32]:
    """Logits [VOCAB] of a Zipf law with noise, ids shuffled."""
    rng = np.random.default_rng(seed)
    logits = -exponent * np.log(np.arange(1, VOCAB + 1)) + rng.normal(0, 0.5, VOCAB)
    return rng.permutation(logits).astype(np.float32)


def softmax(logits: npt.NDArray[np.float32], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    return np.asarray(p / p.sum())


def threshold(p: npt.NDArray[np.float64], k: int) -> float:
    """tau with sum_i min(1, p_i / tau) = k, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, p / tau).sum() > k else (low, tau)
    return low


def replicas(recipe: Recipe, logits: npt.NDArray[np.float32]) -> SparseTargets:
    """What is kept of one distribution under 2,000 independent draws: a document that has it at every position."""
    token_ids = np.arange(REPLICAS + 1, dtype=np.int32)
    parts = [
        recipe.record(token_ids, np.broadcast_to(logits, (100, VOCAB)), first) for first in range(0, REPLICAS, 100)
    ]
    return recipe.read(np.concatenate(parts))


@pytest.mark.parametrize(("exponent", "temperature"), [(0.9, 1.0), (1.3, 1.0), (2.5, 2.0)])
def test_threshold_16_keeps_16_entries_whose_mean_is_the_teachers_distribution(
    exponent: float, temperature: float
) -> None:
    logits = zipf_logits(exponent, seed=int(10 * exponent))
    p = softmax(logits, temperature)
    targets = replicas(Recipe(Selection("threshold", 16), temperature, 0, VOCAB), logits)
    weights = targets.weights.astype(np.float64)
    assert targets.ids.shape == (REPLICAS, 16) and (targets.weights > 0).all()
    assert (np.diff(np.sort(targets.ids, axis=1)) > 0).all()  # no id twice
    assert np.abs(targets.weights.sum(axis=1) - 1).max() < 1e-3

    tau = threshold(p, 16)
    tested = REPLICAS * np.minimum(1, p / tau) >= 5
    mean, square = (np.bincount(targets.ids.ravel(), w.ravel(), VOCAB) / REPLICAS for w in (weights, weights**2))
    variance = np.maximum(square - mean**2, p * (tau - p).clip(0))  # of few draws, or as the formula has it
    off = np.abs(mean - p)[tested] / np.sqrt(variance[tested] / REPLICAS + 1e-18)
    assert tested.sum() > 100 and off.max() < 5.5 and np.sqrt((off**2).mean()) < 1.1


def test_top_k_keeps_the_largest_probabilities_and_the_rest_as_tail_mass() -> None:
    logits = zipf_logits(1.1, seed=3)
    p = softmax(logits)
    targets = replicas(Recipe(Selection("top-k", 50), 1.0, 0, VOCAB), logits)
    largest = np.argsort(-p, kind="stable")[:50]
    assert (targets.ids == largest).all() and (targets.head_count == 50).all()
    error = np.abs(targets.weights.mean(axis=0) - p[largest])
    assert (error <= 5 * targets.weights.std(axis=0) / np.sqrt(REPLICAS) + 1e-7).all()
    assert np.exp(targets.log_tail_mass).mean() == pytest.approx(1 - p[largest].sum(), rel=0.005)
    assert targets.weights.sum(1) + np.exp(targets.log_tail_mass) == pytest.approx(np.ones(REPLICAS), abs=1e-5)


def test_label_and_entropy_are_those_of_temperature_one() -> None:
    logits = zipf_logits(1.1, seed=4)
    p = softmax(logits)
    token_ids = np.array([1, int(p.argmax()), 7], np.int32)
    for temperature in (1.0, 2.0):
        recipe = Recipe(Selection("threshold", 16), temperature, 0, VOCAB)
        targets = recipe.read(recipe.record(token_ids, np.broadcast_to(logits, (2, VOCAB))))
        assert np.abs(targets.label_log_prob - np.log(p[token_ids[1:]])).max() <= 1 / 32 + 1e-6
        assert np.abs(targets.entropy + (p * np.log(p)).sum()).max() <= 1 / 32 + 1e-6


def test_the_same_logits_give_the_same_bytes_in_one_part_or_in_many() -> None:
    rng = np.random.default_rng(5)
    logits = np.stack([zipf_logits(1.1, seed=i) for i in range(40)])
    token_ids = rng.integers(0, VOCAB, 41).astype(np.int32)
    whole = THRESHOLD_16.record(token_ids, logits)
    parts = [THRESHOLD_16.record(token_ids, logits[at : at + 7], at) for at in range(0, 40, 7)]
    assert (np.concatenate(parts) == whole).all()
    assert DocumentRecord(token_ids, whole).key == DocumentRecord(token_ids.astype(np.int64), whole).key


def test_another_seed_document_or_position_draws_another_sample() -> None:
    logits = np.broadcast_to(zipf_logits(1.1, seed=0), (2, VOCAB))
    first = THRESHOLD_16.record(np.array([1, 2, 3], np.int32), logits)
    seed = Recipe(Selection("threshold", 16), 1.0, 1, VOCAB).record(np.array([1, 2, 3], np.int32), logits)
    document = THRESHOLD_16.record(np.array([1, 2, 4], np.int32), logits)
    assert len({row.tobytes() for rows in (first, seed, document) for row in rows[:, :32]}) == 6


def test_a_teacher_that_allows_fewer_tokens_than_k_fills_up_with_nothing() -> None:
    logits = np.full((1, 1_000), -np.inf, np.float32)
    logits[0, [3, 500]] = [1.0, 0.0]
    for kind in ("threshold", "top-k"):
        recipe = Recipe(Selection(kind, 8), 1.0, 0, 1_000)
        targets = recipe.read(recipe.record(np.array([1, 3], np.int32), logits))
        assert targets.head_count.tolist() == [2] and targets.ids[0, :2].tolist() == [3, 500]
        assert targets.weights[0] == pytest.approx([*softmax(np.array([1.0, 0.0], np.float32)), *[0] * 6], rel=0.03)
        assert targets.log_tail_mass[0] == -np.inf


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="type --temperature 1"):
        Recipe(Selection("threshold", 16), temperature, 0, VOCAB)


def test_more_entries_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="with K of at most 10"):
        Recipe(Selection("threshold", 11), 1.0, 0, 10)
