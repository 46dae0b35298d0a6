"""Selection: held against the definition in float64, against its own expectation, and NumPy against MLX."""

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from logitstore import device_selection
from logitstore.errors import ConfigError
from logitstore.selection import Randomness, Selected, Selection, randomness, select

KEY = bytes(range(16))


def rows(n: int, vocab_size: int, scale: float, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, vocab_size)) * scale).astype(np.float32)


def softmax(z: npt.NDArray[np.float32], temperature: float = 1) -> npt.NDArray[np.float64]:
    z64 = z.astype(np.float64) / temperature
    p = np.exp(z64 - z64.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def run(z: npt.NDArray[np.float32], text: str, temperature: float = 1, seed: int = 0) -> Selected:
    selection = Selection.parse(text)
    random = randomness(KEY, np.arange(len(z)), selection, z.shape[1], seed=seed)
    return select(z, np.zeros(len(z), np.int64), selection, temperature, random)


def weights(s: Selected) -> npt.NDArray[np.float64]:
    k = s.ids.shape[1]
    tau = s.tail_mass / np.maximum(k - s.head_count, 1)
    return np.where(np.arange(k) < s.head_count[:, None], s.head_probs, tau[:, None])


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size", [7, 64, 1000, 4099])
def test_threshold_keeps_the_head_and_tau_of_its_definition(vocab_size: int, scale: float) -> None:
    k = 5
    z = rows(20, vocab_size, scale)
    kept = run(z, f"threshold:{k}")
    for p, ids, probs, h, tail in zip(
        softmax(z), kept.ids, kept.head_probs, kept.head_count, kept.tail_mass, strict=True
    ):
        # tau by bisection on sum min(1, p / tau) = k
        low, high = 0.0, 1.0
        for _ in range(200):
            mid = (low + high) / 2
            low, high = (mid, high) if np.minimum(1, p / mid).sum() > k else (low, mid)
        assert set(ids[:h]) == set(np.flatnonzero(p > high * (1 - 1e-6))) or h == (p > high * (1 + 1e-6)).sum()
        np.testing.assert_allclose(probs[:h], p[ids[:h]], rtol=2e-6)
        np.testing.assert_allclose(tail / max(k - h, 1), high, rtol=1e-5)
        assert len(set(ids)) == k


@pytest.mark.parametrize(("scale", "temperature"), [(0.5, 1.0), (2.0, 1.0), (6.0, 1.0), (3.0, 2.0)])
def test_the_mean_weight_of_every_id_is_its_probability(scale: float, temperature: float) -> None:
    draws, z = 20_000, rows(1, 300, scale, seed=3)
    kept = run(np.repeat(z, draws, axis=0), "threshold:16", temperature, seed=7)
    p, w = softmax(z, temperature)[0], np.zeros((draws, 300))
    np.add.at(w, (np.arange(draws)[:, None], kept.ids), weights(kept))
    error = w.std(axis=0) / np.sqrt(draws) + 1e-7
    often = p * draws > 20
    assert np.abs((w.mean(axis=0) - p) / error)[often].max() < 4.5
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-6)


def test_top_k_keeps_the_largest_in_order_and_sums_the_rest() -> None:
    z = rows(30, 1000, 2.0)
    kept, p = run(z, "top-k:10"), softmax(z)
    order = np.argsort(-p, axis=1)[:, :10]
    np.testing.assert_array_equal(kept.ids, order)
    np.testing.assert_allclose(kept.head_probs, np.take_along_axis(p, order, 1), rtol=2e-6)
    np.testing.assert_allclose(kept.tail_mass, 1 - np.take_along_axis(p, order, 1).sum(axis=1), rtol=1e-4)


def test_a_tiny_tail_mass_is_summed_and_not_cancelled() -> None:
    z = np.full((1, 1000), -30.0, np.float32)
    z[0, 0] = 0
    expected = 999 * np.exp(-30.0)  # 9e-11, far below float32's 1 - sum
    np.testing.assert_allclose(run(z, "top-k:1").tail_mass, [expected], rtol=1e-4)


def test_equal_logits_are_ordered_by_id() -> None:
    kept = run(np.zeros((2, 1000), np.float32), "top-k:4")
    np.testing.assert_array_equal(kept.ids, [[0, 1, 2, 3]] * 2)


def test_a_teacher_with_fewer_possible_tokens_than_k_is_kept_whole() -> None:
    z = np.full((1, 500), -np.inf, np.float32)
    z[0, [3, 400]] = [1.0, 0.0]
    for text in ("threshold:8", "top-k:8"):
        kept = run(z, text)
        assert kept.head_count[0] == 2 and kept.tail_mass[0] == 0
        np.testing.assert_array_equal(kept.ids[0], [3, 400, 0, 0, 0, 0, 0, 0])
        np.testing.assert_allclose(kept.head_probs[0, :2], softmax(z)[0, [3, 400]], rtol=1e-6)


def test_k_may_be_one_and_may_be_the_whole_vocabulary() -> None:
    z = rows(50, 7, 1.0)
    assert (weights(run(z, "threshold:1")) == 1).all()
    whole = run(z, "threshold:7")
    np.testing.assert_allclose(np.take_along_axis(softmax(z), whole.ids.astype(int), 1), weights(whole), rtol=1e-5)
    np.testing.assert_array_equal(np.sort(whole.ids, axis=1), [range(7)] * 50)


def test_label_log_prob_and_entropy_are_those_of_temperature_one() -> None:
    z = rows(20, 3000, 2.0)
    p = softmax(z)
    for temperature in (1.0, 3.0):
        kept = run(z, "threshold:4", temperature)
        np.testing.assert_allclose(kept.label_log_prob, np.log(p[:, 0]), rtol=1e-5)
        np.testing.assert_allclose(kept.entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-4)


def test_a_row_is_the_same_whatever_else_is_in_the_batch() -> None:
    z = rows(40, 4099, 2.0)
    selection = Selection.parse("threshold:16")
    whole = run(z, "threshold:16")
    for first, stop in ((0, 1), (3, 20), (39, 40)):
        random = randomness(KEY, np.arange(first, stop), selection, 4099, seed=0)
        part = select(z[first:stop], np.zeros(stop - first, np.int64), selection, 1, random)
        for name in Selected.__annotations__:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[first:stop])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_teacher_is_refused(bad: float) -> None:
    z = rows(3, 100, 1.0)
    z[1, 50] = bad
    with pytest.raises(ValueError, match="row 1"):
        run(z, "threshold:4")


@pytest.mark.parametrize(
    "text", ["threshold", "threshold:0", "top-k:-3", "topk:8", "threshold:x", "threshold:--5", "threshold:²", ""]
)
def test_an_unknown_selection_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(ConfigError, match="type"):
        Selection.parse(text)


@pytest.mark.parametrize(
    ("vocab_size", "k"), [(1000, 16), (4099, 16), (49_152, 16), (4099, 1), (4099, 33), (4099, 300)]
)
def test_mlx_and_numpy_keep_the_same_entries(vocab_size: int, k: int) -> None:
    n, selection = 200, Selection.parse(f"threshold:{k}")
    zipf = -1.5 * np.log(np.arange(1, vocab_size + 1))  # falls as a language model's distribution does
    z = np.random.default_rng(5).permuted(np.tile(zipf, (n, 1)) + rows(n, vocab_size, 1.0), axis=1).astype(np.float32)
    random, labels = randomness(KEY, np.arange(n), selection, vocab_size, seed=0), np.arange(n)
    for temperature in (1.0, 1.5):
        ours = select(z, labels, selection, temperature, random)
        theirs = device_selection.select(mx.array(z), labels, selection, temperature, random)
        same = [len(np.intersect1d(a, b)) for a, b in zip(theirs.ids, ours.ids, strict=True)]
        assert (
            np.sum(same) >= 0.999 * n * k - 1
        )  # float32 sums against float64: a draw near an edge falls on its other side
        for name in ("head_probs", "tail_mass", "label_log_prob", "entropy"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=2e-4, atol=1e-6)


def test_mlx_and_numpy_keep_the_same_top_k() -> None:
    z, selection = rows(100, 4099, 2.0), Selection.parse("top-k:50")
    random = randomness(KEY, np.arange(100), selection, 4099, seed=0)
    theirs = device_selection.select(mx.array(z), np.zeros(100, np.int64), selection, 1.0, random)
    np.testing.assert_array_equal(theirs.ids, run(z, "top-k:50").ids)


def test_mlx_draws_no_id_beyond_the_vocabulary_where_the_last_block_is_empty() -> None:
    z = np.full((1, 640), -np.inf, np.float32)
    z[0, :630:10] = 0  # only blocks 0 of 10 have mass
    selection = Selection.parse("threshold:8")
    last = np.nextafter(1, 0)  # the latest start there is
    random = Randomness(np.arange(10)[None], np.array([last]), np.zeros((1, 9)))
    kept = device_selection.select(mx.array(z), np.zeros(1, np.int64), selection, 1.0, random)
    assert kept.ids.max() < 640 and len(set(kept.ids[0].tolist())) == 8


def test_mlx_refuses_a_broken_teacher_as_numpy_does() -> None:
    z, selection = rows(3, 100, 1.0), Selection.parse("threshold:4")
    z[1, 50] = np.nan
    random = randomness(KEY, np.arange(3), selection, 100, seed=0)
    with pytest.raises(ValueError, match="row 1"):
        device_selection.select(mx.array(z), np.zeros(3, np.int64), selection, 1.0, random)
