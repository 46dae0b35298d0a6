"""The recipe end to end, logits to bytes to targets, on logits shaped like a language model's."""

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.errors import ConfigError
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.targets import SparseTargets
from tests.distributions import softmax, threshold

VOCAB = 49_152
REPLICAS = 2_000
THRESHOLD_16 = Recipe(Selection("threshold", 16), (1.0,), 0, VOCAB)


def zipf_logits(exponent: float, seed: int) -> npt.NDArray[np.float32]:
    """Logits [VOCAB] of a Zipf law with noise, ids shuffled."""
    rng = np.random.default_rng(seed)
    logits = -exponent * np.log(np.arange(1, VOCAB + 1)) + rng.normal(0, 0.5, VOCAB)
    return rng.permutation(logits).astype(np.float32)


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
    targets = replicas(Recipe(Selection("threshold", 16), (temperature,), 0, VOCAB), logits)
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
    targets = replicas(Recipe(Selection("top-k", 50), (1.0,), 0, VOCAB), logits)
    largest = np.sort(np.argsort(-p, kind="stable")[:50])  # kept by rising id
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
        recipe = Recipe(Selection("threshold", 16), (temperature,), 0, VOCAB)
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
    seed = Recipe(Selection("threshold", 16), (1.0,), 1, VOCAB).record(np.array([1, 2, 3], np.int32), logits)
    document = THRESHOLD_16.record(np.array([1, 2, 4], np.int32), logits)
    assert len({row.tobytes() for rows in (first, seed, document) for row in rows[:, :32]}) == 6


def test_a_teacher_that_allows_fewer_tokens_than_k_fills_up_with_nothing() -> None:
    logits = np.full((1, 1_000), -np.inf, np.float32)
    logits[0, [3, 500]] = [1.0, 0.0]
    for select in ("threshold:8", "top-k:8", "top-p:1:8"):
        recipe = Recipe(Selection.parse(select), (1.0,), 0, 1_000)
        targets = recipe.read(recipe.record(np.array([1, 3], np.int32), logits))
        assert targets.head_count.tolist() == [2] and targets.ids[0, :2].tolist() == [3, 500]
        assert targets.weights[0] == pytest.approx([*softmax(np.array([1.0, 0.0], np.float32)), *[0] * 6], rel=0.03)
        assert targets.log_tail_mass[0] == -np.inf


SMALL = np.random.default_rng(8).normal(0, 2.5, 400).astype(np.float32)


def many(recipe: Recipe, n: int = 3_000) -> npt.NDArray[np.uint8]:
    """Records of a document that has one small distribution at every position."""
    return recipe.record(np.arange(n + 1, dtype=np.int32) % 400, np.broadcast_to(SMALL, (n, 400)))


def dense(targets: SparseTargets) -> npt.NDArray[np.float64]:
    """Weights by id [P, 400]."""
    found = np.zeros((len(targets), 400))
    np.add.at(found, (np.arange(len(targets))[:, None], targets.ids), targets.weights)
    return found


@pytest.mark.parametrize("select", ["threshold:6", "random:6", "random:6:0.8"])
def test_each_set_is_an_unbiased_draw_at_its_own_temperature(select: str) -> None:
    recipe = Recipe(Selection.parse(select), (1.0, 2.0), 0, 400, replicas=2)
    records = many(recipe)
    for temperature in recipe.temperatures:
        p = softmax(SMALL, temperature)
        for replica in range(2):
            found = dense(recipe.read(records, temperature, replica))
            often = p * len(found) * 6 > 30
            error = found.std(axis=0) / np.sqrt(len(found)) + 1e-7
            assert often.sum() > 30 and np.abs((found.mean(axis=0) - p) / error)[often].max() < 4.5


def test_sets_are_independent_of_each_other() -> None:
    recipe = Recipe(Selection.parse("threshold:6"), (1.0, 2.0), 0, 400, replicas=2)
    records, p = many(recipe), softmax(SMALL)
    sampled = np.argsort(-p)[20:60]  # of the tail at both temperatures
    kept = [dense(recipe.read(records, t, r))[:, sampled] > 0 for t in recipe.temperatures for r in range(2)]
    for i, a in enumerate(kept):
        for b in kept[:i]:
            together = (a & b).mean(axis=0) - a.mean(axis=0) * b.mean(axis=0)
            spread = np.sqrt(a.var(axis=0) * b.var(axis=0) / len(a))
            assert np.abs(together / spread).max() < 4.5


def test_a_replica_beyond_the_last_is_the_first_again_and_temperatures_are_found_by_value() -> None:
    recipe = Recipe(Selection.parse("threshold:6"), (2.0, 1.0), 0, 400, replicas=3)
    records = many(recipe, 20)
    assert [recipe.set_number(t, r) for t in (2.0, 1.0) for r in range(4)] == [0, 1, 2, 0, 3, 4, 5, 3]
    assert recipe.set_number() == 0 and recipe.set_number(None, 7) == 1
    assert records.shape[1] == recipe.record_width == 6 * recipe.form.entries_width + 2
    np.testing.assert_array_equal(recipe.read(records, 1.0, 5).ids, recipe.read(records, 1.0, 2).ids)
    with pytest.raises(ConfigError, match=r"serves temperature 2,1, this run asks for 1.5.*build --temperature 1.5"):
        recipe.read(records, 1.5)


def test_the_first_set_is_what_a_recipe_of_that_set_alone_would_keep() -> None:
    both = Recipe(Selection.parse("random:6"), (2.0, 1.0), 0, 400, replicas=2)
    alone = Recipe(Selection.parse("random:6"), (2.0,), 0, 400)
    width = both.form.entries_width
    np.testing.assert_array_equal(many(both, 20)[:, both.columns(0)], many(alone, 20)[:, :width])
    np.testing.assert_array_equal(many(both, 20)[:, both.columns(4)], many(alone, 20)[:, width:])


@pytest.mark.parametrize("select", ["top-k:30", "top-p:0.97:100"])
@pytest.mark.parametrize("temperature", [1.5, 4.0])
def test_the_largest_entries_are_served_at_another_temperature_through_log_z(select: str, temperature: float) -> None:
    recipe = Recipe(Selection.parse(select), (1.0,), 0, 400, log_z=(1.5, 4.0))
    records, p = many(recipe, 10), softmax(SMALL, temperature)
    plain, found = recipe.read(records), recipe.read(records, temperature)
    z = (softmax(SMALL) ** (1 / temperature)).sum()
    used = plain.weights > 0
    expected = plain.weights[used].astype(np.float64) ** (1 / temperature) / z  # exact, but for what plain is off
    assert found.weights[used] == pytest.approx(expected, rel=2e-4)
    assert found.weights[used] == pytest.approx(p[found.ids[used]], rel=1 / 16 / temperature + 2e-4)
    assert not found.weights[~used].any()
    tail = 1 - found.weights.sum(axis=1)
    assert np.exp(found.log_tail_mass) == pytest.approx(tail, rel=1e-4)
    np.testing.assert_array_equal(found.label_log_prob, plain.label_log_prob)


def test_log_z_of_one_possible_token_retempers_to_itself() -> None:
    logits = np.full((2, 400), -np.inf, np.float32)
    logits[:, 7] = 3
    recipe = Recipe(Selection.parse("top-k:3"), (1.0,), 0, 400, log_z=(2.0,))
    found = recipe.read(recipe.record(np.array([1, 7, 7], np.int32), logits), 2.0)
    assert found.weights.tolist() == [[1, 0, 0]] * 2 and found.log_tail_mass.tolist() == [-np.inf] * 2


def serves(select: str, temperatures: tuple[float, ...] = (1.0,), **kept: object) -> dict[str, object]:
    return Recipe(Selection.parse(select), temperatures, 0, 400, **kept).serves  # type: ignore[arg-type]


def test_a_recipe_says_which_losses_and_temperatures_it_serves() -> None:
    for select in ("threshold:16", "random:50", "random:50:0.8"):
        drawn = serves(select, (1.0, 2.0), log_z=(4.0,))  # a sample is not served at another temperature
        assert drawn == {"estimate": "unbiased", "losses": ["kl", "soft-ce"], "temperatures": [1.0, 2.0]}
    summed = ["reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "tvd"]
    assert serves("threshold:16", tail_log_probs=True)["losses"] == ["kl", "soft-ce", *summed]
    for select in ("top-k:50", "top-p:0.95:50"):
        largest = serves(select, (2.0, 1.0), log_z=(1.0, 4.0))
        assert largest["losses"] == ["kl", *summed] and largest["temperatures"] == [2.0, 1.0, 4.0]
        assert serves(select, (2.0,), log_z=(4.0,))["temperatures"] == [2.0]  # log Z is of temperature 1


REFUSED = [
    ("threshold:16", {"temperatures": (0.0,)}, "type --temperature 1"),
    ("threshold:16", {"temperatures": (-1.0,)}, "type --temperature 1"),
    ("threshold:16", {"temperatures": (1.0, float("nan"))}, "type --temperature 1"),
    ("threshold:16", {"temperatures": (float("inf"),)}, "type --temperature 1"),
    ("threshold:16", {"temperatures": (1.0, 2.0, 1.0)}, "temperature 1,2,1 names one twice"),
    ("threshold:16", {"temperatures": ()}, "type --temperature 1"),
    ("top-k:16", {"log_z": (1.0, float("inf"))}, "type --log-z 1"),
    ("top-k:16", {"log_z": (0.0,)}, "type --log-z 1"),
    ("top-k:16", {"log_z": (2.0, 0.5)}, "log-z 0.5 is below 1"),
    ("top-k:16", {"log_z": (2.0, 2.0)}, "log-z 2,2 names one twice"),
    ("threshold:16", {"replicas": 0}, "expected 1 to 64"),
    ("threshold:16", {"replicas": 65}, "expected 1 to 64"),
    ("top-k:16", {"replicas": 2}, "leave --replicas out"),
    ("top-p:0.9:16", {"replicas": 2}, "leave --replicas out"),
    ("random:16", {"tail_log_probs": True}, "leave --tail-log-probs out"),
    ("top-k:16", {"tail_log_probs": True}, "leave --tail-log-probs out"),
    ("threshold:401", {}, "with K of at most 400"),
]


@pytest.mark.parametrize(("select", "kept", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused_with_what_to_type(select: str, kept: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(Selection.parse(select), **{"temperatures": (1.0,), "seed": 0, "vocab_size": 400, **kept})  # type: ignore[arg-type]
