"""Next-token distributions of every ugly shape, and recipes of every kind, for the property tests. No MLX."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from logitstore.recipe import Recipe
from logitstore.selection import Selection

Logits = npt.NDArray[np.float32]

SHAPES = ("normal", "sharp", "uniform", "one-hot", "two spikes", "1e-30 tail", "few possible", "ties")
VOCAB_SIZES = (1, 2, 7, 64, 65, 300, 1_000, 40_000)


@dataclass(frozen=True)
class Case:
    """A document, its teacher's logits, and what is to be kept of them."""

    token_ids: npt.NDArray[np.int32]
    logits: Logits
    recipe: Recipe

    @property
    def records(self) -> npt.NDArray[np.uint8]:
        return self.recipe.record(self.token_ids, self.logits)


def softmax(logits: Logits, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """softmax(logits / temperature) of the last axis, in float64."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def threshold(p: npt.NDArray[np.float64], k: int) -> float:
    """tau with sum_i min(1, p_i / tau) = k, by bisection on that."""
    low, high = 0.0, 1.0
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, p / tau).sum() > k else (low, tau)
    return high


def logits_row(shape: str, vocab_size: int, rng: np.random.Generator) -> Logits:
    """One row [V] of a shape."""
    z = np.zeros(vocab_size)
    spikes = rng.choice(vocab_size, min(vocab_size, 2), replace=False)
    match shape:
        case "normal" | "sharp":
            z = rng.normal(0, 1 if shape == "normal" else 8, vocab_size)
        case "one-hot":
            z[spikes[0]] = np.inf
            z = np.where(z > 0, 0, -np.inf)
        case "two spikes" | "1e-30 tail":
            z[spikes] = 12.0 if shape == "two spikes" else -np.log(1e-30)
        case "few possible":
            z = np.full(vocab_size, -np.inf)
            z[rng.choice(vocab_size, min(vocab_size, 5), replace=False)] = rng.normal(0, 2, min(vocab_size, 5))
        case "ties":
            z = rng.integers(-3, 3, vocab_size)
    return np.asarray(z, np.float32)


@st.composite
def selections(draw: st.DrawFn, vocab_size: int) -> Selection:
    """Any that the vocabulary allows."""
    k = draw(st.integers(1, min(vocab_size, 40)) | st.sampled_from([min(vocab_size, k) for k in (1, 255, 256, 300)]))
    match draw(st.sampled_from(["threshold", "random", "random:t", "top-k", "top-p"])):
        case "random":
            return Selection("random", draw(st.integers(1, 255)))  # more draws than tokens are no fault
        case "random:t":
            return Selection("random", min(k, 255), exponent=draw(st.sampled_from([0.5, 0.8, 1.5])))
        case "top-p":
            return Selection("top-p", k, mass=draw(st.sampled_from([1e-9, 0.5, 0.95, 1.0])))
        case "top-k":
            return Selection("top-k", k)
    return Selection("threshold", k)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few positions of any shapes under any recipe."""
    vocab_size = draw(st.sampled_from(VOCAB_SIZES))
    selection = draw(selections(vocab_size))
    recipe = Recipe(
        selection,
        temperatures=draw(st.sampled_from([(1.0,), (2.0, 1.0), (0.5,)])),
        seed=draw(st.integers(0, 9)),
        vocab_size=vocab_size,
        replicas=draw(st.integers(1, 2)) if selection.unbiased else 1,
        tail_log_probs=draw(st.booleans()) and selection.kind == "threshold",
        log_z=draw(st.sampled_from([(), (1.0, 2.0, 4.0)])),
    )
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = np.stack([logits_row(shape, vocab_size, rng) for shape in shapes])
    token_ids = rng.integers(0, vocab_size, len(shapes) + 1).astype(np.int32)
    likeliest = rng.random(len(shapes)) < 0.5  # the label is most often among the entries
    token_ids[1:][likeliest] = logits.argmax(axis=1)[likeliest]
    return Case(token_ids, logits, recipe)
