"""Selection: held against the definition in float64, against its own expectation, and NumPy against MLX."""

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from logitstore import device_selection
from logitstore.cpu_selection import log_z, select
from logitstore.errors import ConfigError
from logitstore.selection import Randomness, Selected, Selection, randomness
from tests.distributions import softmax, threshold

KEY = bytes(range(16))


def rows(n: int, vocab_size: int, scale: float, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, vocab_size)) * scale).astype(np.float32)


def run(z: npt.NDArray[np.float32], text: str, temperature: float = 1, seed: int = 0) -> Selected:
    selection = Selection.parse(text)
    random = randomness(KEY, np.arange(len(z)), selection, z.shape[1], seed=seed)
    return select(z, np.zeros(len(z), np.int64), selection, temperature, random)


def weights(s: Selected) -> npt.NDArray[np.float64]:
    k = s.ids.shape[1]
    tau = s.tail_mass / np.maximum(k - s.head_count, 1)
    return np.where(np.arange(k) < s.head_count[:, None], s.values, tau[:, None])


def require_mean(
    ids: npt.NDArray[np.uint32], values: npt.NDArray[np.float64], p: npt.NDArray[np.float64], most: float = 4.5
) -> None:
    """The mean weight of every id drawn often enough, over draws [draws, k], is its probability."""
    draws, w = len(ids), np.zeros((len(ids), len(p)))
    np.add.at(w, (np.arange(draws)[:, None], ids), values)
    error = w.std(axis=0) / np.sqrt(draws) + 1e-7
    often = p * draws > 20
    assert often.sum() > 1 and np.abs((w.mean(axis=0) - p) / error)[often].max() < most


def falling(n: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """Rows that fall as a language model's distribution does, ids shuffled."""
    zipf = -1.5 * np.log(np.arange(1, vocab_size + 1))
    z = np.tile(zipf, (n, 1)) + rows(n, vocab_size, 1.0)
    return np.random.default_rng(5).permuted(z, axis=1).astype(np.float32)


def on_both(z: npt.NDArray[np.float32], text: str, temperature: float = 1, seed: int = 0) -> tuple[Selected, Selected]:
    """MLX's and NumPy's choice, given the same random numbers."""
    selection, labels = Selection.parse(text), np.arange(len(z)) % z.shape[1]
    random = randomness(KEY, np.arange(len(z)), selection, z.shape[1], seed=seed)
    theirs = device_selection.select(mx.array(z), labels, selection, temperature, random)
    return theirs, select(z, labels, selection, temperature, random)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size", [7, 64, 1000, 4099])
def test_threshold_keeps_the_head_and_tau_of_its_definition(vocab_size: int, scale: float) -> None:
    k = 5
    z = rows(20, vocab_size, scale)
    kept = run(z, f"threshold:{k}")
    for p, ids, probs, h, tail in zip(softmax(z), kept.ids, kept.values, kept.head_count, kept.tail_mass, strict=True):
        tau = threshold(p, k)
        assert set(ids[:h]) == set(np.flatnonzero(p > tau * (1 - 1e-6))) or h == (p > tau * (1 + 1e-6)).sum()
        np.testing.assert_allclose(probs[:h], p[ids[:h]], rtol=2e-6)
        np.testing.assert_allclose(probs[h:], p[ids[h:]], rtol=2e-6)
        np.testing.assert_allclose(tail / max(k - h, 1), tau, rtol=1e-5)
        assert len(set(ids)) == k


@pytest.mark.parametrize(("scale", "temperature"), [(0.5, 1.0), (2.0, 1.0), (6.0, 1.0), (3.0, 2.0)])
def test_the_mean_weight_of_every_id_is_its_probability(scale: float, temperature: float) -> None:
    draws, z = 20_000, rows(1, 300, scale, seed=3)
    kept = run(np.repeat(z, draws, axis=0), "threshold:16", temperature, seed=7)
    require_mean(kept.ids, weights(kept), softmax(z, temperature)[0])
    np.testing.assert_allclose(weights(kept).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("text", ["random:16", "random:16:0.8", "random:5:1.5", "random:1:0.5"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_weight_of_random_draws_is_the_probability(text: str, temperature: float) -> None:
    draws, z = 20_000, rows(1, 300, 2.0, seed=3)
    kept = run(np.repeat(z, draws, axis=0), text, temperature, seed=7)
    require_mean(kept.ids, kept.values, softmax(z, temperature)[0])


@pytest.mark.parametrize("text", ["random:1", "random:50", "random:255", "random:50:0.8", "random:50:1.5"])
@pytest.mark.parametrize("vocab_size", [7, 1000, 4099])
def test_random_weights_are_counts_that_sum_to_the_draws(vocab_size: int, text: str) -> None:
    selection, z = Selection.parse(text), rows(30, vocab_size, 2.0)
    kept, p = run(z, text), softmax(z)
    proposal = p**selection.exponent / (p**selection.exponent).sum(axis=1, keepdims=True)
    for ids, values, count, p_, w in zip(kept.ids, kept.values, kept.head_count, p, proposal, strict=True):
        draws = values[:count] * selection.k / (p_ / w)[ids[:count]]  # a weight is (c / N) (p / w)
        np.testing.assert_allclose(draws, np.rint(draws), rtol=1e-5)
        assert np.rint(draws).min() >= 1 and np.rint(draws).sum() == selection.k
        assert len(set(ids[:count])) == count and not ids[count:].any() and not values[count:].any()
        assert (np.diff(values) <= 1e-12).all()
    assert not kept.tail_mass.any()


def test_random_draws_never_take_an_impossible_token() -> None:
    z = np.full((200, 500), -np.inf, np.float32)
    z[:, [3, 400]] = [1.0, 0.0]
    for text in ("random:20", "random:20:0.5"):
        kept = run(z, text)
        assert set(kept.ids[kept.values > 0].tolist()) == {3, 400}


def test_top_k_keeps_the_largest_in_order_and_sums_the_rest() -> None:
    z = rows(30, 1000, 2.0)
    kept, p = run(z, "top-k:10"), softmax(z)
    order = np.argsort(-p, axis=1)[:, :10]
    np.testing.assert_array_equal(kept.ids, order)
    np.testing.assert_allclose(kept.values, np.take_along_axis(p, order, 1), rtol=2e-6)
    np.testing.assert_allclose(kept.tail_mass, 1 - np.take_along_axis(p, order, 1).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("mass", [1e-9, 0.3, 0.8, 0.95, 1])
def test_top_p_keeps_the_shortest_prefix_that_holds_the_mass(mass: float, temperature: float) -> None:
    z, most = rows(60, 1000, 3.0), 20
    kept, p = run(z, f"top-p:{mass:.9f}:{most}", temperature), softmax(z, temperature)
    order = np.argsort(-p, axis=1)[:, :most]
    before = np.cumsum(np.take_along_axis(p, order, 1), axis=1) - np.take_along_axis(p, order, 1)
    expected = (before < mass).sum(axis=1)
    np.testing.assert_array_equal(kept.head_count, expected)
    assert expected.min() >= 1 and (mass < 0.9 or expected.max() == most)
    for ids, values, tail, count, p_, largest in zip(
        kept.ids, kept.values, kept.tail_mass, expected, p, order, strict=True
    ):
        np.testing.assert_array_equal(ids, np.where(np.arange(most) < count, largest, 0))
        np.testing.assert_allclose(values, np.where(np.arange(most) < count, p_[largest], 0), rtol=2e-6)
        assert tail == pytest.approx(np.delete(p_, largest[:count]).sum(), rel=1e-5)


@pytest.mark.parametrize("text", ["top-k:1", "top-p:0.5:8", "top-p:0.999999:1", "threshold:1"])
def test_a_tiny_tail_mass_is_summed_and_not_cancelled(text: str) -> None:
    z = np.full((1, 1000), -30.0, np.float32)
    z[0, 0] = 0
    expected = 999 * np.exp(-30.0)  # 9e-11, far below float32's 1 - sum
    for kept in on_both(z, text):
        np.testing.assert_allclose(kept.tail_mass, [expected], rtol=1e-4)


def test_equal_logits_are_ordered_by_id() -> None:
    kept = run(np.zeros((2, 1000), np.float32), "top-k:4")
    np.testing.assert_array_equal(kept.ids, [[0, 1, 2, 3]] * 2)


def test_a_teacher_with_fewer_possible_tokens_than_k_is_kept_whole() -> None:
    z = np.full((1, 500), -np.inf, np.float32)
    z[0, [3, 400]] = [1.0, 0.0]
    for text in ("threshold:8", "top-k:8", "top-p:1:8"):
        kept = run(z, text)
        assert kept.head_count[0] == 2 and kept.tail_mass[0] == 0
        np.testing.assert_array_equal(kept.ids[0], [3, 400, 0, 0, 0, 0, 0, 0])
        np.testing.assert_allclose(kept.values[0, :2], softmax(z)[0, [3, 400]], rtol=1e-6)


def test_k_may_be_one_and_may_be_the_whole_vocabulary() -> None:
    z = rows(50, 7, 1.0)
    assert (weights(run(z, "threshold:1")) == 1).all()
    whole = run(z, "threshold:7")
    np.testing.assert_allclose(np.take_along_axis(softmax(z), whole.ids.astype(int), 1), weights(whole), rtol=1e-5)
    np.testing.assert_array_equal(np.sort(whole.ids, axis=1), [range(7)] * 50)


def test_label_log_prob_and_entropy_are_those_of_temperature_one() -> None:
    z = rows(20, 3000, 2.0)
    p = softmax(z)
    for temperature, text in ((1.0, "threshold:4"), (3.0, "threshold:4"), (3.0, "random:4"), (0.5, "top-p:0.5:4")):
        kept = run(z, text, temperature)
        np.testing.assert_allclose(kept.label_log_prob, np.log(p[:, 0]), rtol=1e-5)
        np.testing.assert_allclose(kept.entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-4)


TEMPERATURES = (1.0, 1.5, 2.0, 4.0, 100.0)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_log_z_is_that_of_its_definition(scale: float) -> None:
    z = rows(20, 5000, scale)
    z[:, 100:200] = -np.inf
    z[0, 1:] = -np.inf  # one-hot: log 1 at every temperature
    p = softmax(z)
    expected = np.stack([np.log((p ** (1 / t)).sum(axis=1)) for t in TEMPERATURES], axis=1)
    for found in (log_z(z, TEMPERATURES), device_selection.log_z(mx.array(z), TEMPERATURES)):
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert found.shape == (20, 5)


@pytest.mark.parametrize("text", ["threshold:16", "random:16", "random:16:0.8", "top-p:0.9:16"])
def test_a_row_is_the_same_whatever_else_is_in_the_batch(text: str) -> None:
    z = rows(40, 4099, 2.0)
    selection = Selection.parse(text)
    whole = run(z, text)
    for first, stop in ((0, 1), (3, 20), (39, 40)):
        random = randomness(KEY, np.arange(first, stop), selection, 4099, seed=0)
        part = select(z[first:stop], np.zeros(stop - first, np.int64), selection, 1, random)
        for name in Selected.__annotations__:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[first:stop])


@pytest.mark.parametrize("text", ["threshold:4", "random:4", "top-k:4", "top-p:0.5:4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_teacher_is_refused(bad: float, text: str) -> None:
    z = rows(3, 100, 1.0)
    z[1, 50 if bad != -np.inf else slice(None)] = bad
    selection = Selection.parse(text)
    random = randomness(KEY, np.arange(3), selection, 100, seed=0)
    with pytest.raises(ValueError, match="row 1"):
        run(z, text)
    with pytest.raises(ValueError, match="row 1"):
        device_selection.select(mx.array(z), np.zeros(3, np.int64), selection, 1.0, random)


@pytest.mark.parametrize("kind", ["threshold", "threshold:0", "threshold:x", "threshold:--5", "threshold:²",
                                  "threshold:4:1", "top-k:-3", "topk:8", "top-k:3.5", "random:50:0", "random:50:-1",
                                  "random:50:2.1", "random:0:1", "random:1.5", "random:5:1:1", "top-p:50", "top-p:0:50",
                                  "top-p:1.01:50", "top-p:-0.5:50", "top-p:0.9:0", "top-p:0.9:1.5", "top-p:nan:5",
                                  "top-p:0.9:5:1", "random:256", "random:1000:0.8", "top-k: 8", "top-k:8\n", ":8",
                                  ""])  # fmt: skip
def test_an_unknown_selection_is_refused_with_what_to_type(kind: str) -> None:
    with pytest.raises(ConfigError, match="type"):
        Selection.parse(kind)


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("threshold:16", Selection("threshold", 16)),
        ("random:255", Selection("random", 255)),
        ("random:50:0.8", Selection("random", 50, exponent=0.8)),
        ("random:5:0.00001", Selection("random", 5, exponent=1e-5)),
        ("top-k:100000", Selection("top-k", 100_000)),
        ("top-p:0.95:50", Selection("top-p", 50, mass=0.95)),
        ("top-p:0.123456789:5", Selection("top-p", 5, mass=0.123456789)),
        ("top-p:1:5", Selection("top-p", 5)),
    ],
)
def test_a_selection_is_typed_as_it_is_shown(text: str, selection: Selection) -> None:
    assert Selection.parse(text) == selection and str(selection) == text


def test_more_entries_than_tokens_are_refused_unless_they_are_draws() -> None:
    Selection.parse("random:11").require_vocab(10)
    for text in ("threshold:11", "top-k:11", "top-p:0.5:11"):
        with pytest.raises(ConfigError, match="at most 10"):
            Selection.parse(text).require_vocab(10)


@pytest.mark.parametrize(("text", "order", "draws"), [("threshold:3", 8, 1), ("random:3", 0, 3), ("top-k:3", 0, 0)])
def test_temperatures_and_replicas_draw_numbers_of_their_own(text: str, order: int, draws: int) -> None:
    def drawn(**changed: int) -> Randomness:
        return randomness(KEY, np.arange(5), Selection.parse(text), 500, seed=0, **changed)

    first = drawn()
    assert (first.block_order.shape, first.draws.shape, first.rounding.shape) == ((5, order), (5, draws), (5, 4))
    assert (np.sort(first.block_order, axis=1) == np.arange(order)).all()
    for other in (drawn(replica=1), drawn(temperature_index=1)):
        assert not np.isin(other.rounding, first.rounding).any() and not np.isin(other.draws, first.draws).any()


BESIDE = ("tail_mass", "label_log_prob", "entropy")


@pytest.mark.parametrize("vocab_size, k", [(1000, 16), (4099, 16), (49_152, 16), (4099, 1), (4099, 33), (4099, 300)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_mlx_and_numpy_keep_the_same_entries(vocab_size: int, k: int, temperature: float) -> None:
    n = 200 if vocab_size < 40_000 else 100
    theirs, ours = on_both(falling(n, vocab_size), f"threshold:{k}", temperature)
    # float32 sums against float64: a draw near an edge falls on its other side
    same = [len(np.intersect1d(a, b)) for a, b in zip(theirs.ids, ours.ids, strict=True)]
    assert np.sum(same) >= 0.999 * n * k - 1
    equal = theirs.ids == ours.ids
    np.testing.assert_allclose(theirs.values[equal], ours.values[equal], rtol=2e-4, atol=1e-9)
    for name in BESIDE:
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["top-k:50", "top-p:0.9:50", "top-p:0.3:7", "top-p:1:5", "random:20", "random:20:0.8"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_mlx_and_numpy_keep_the_same_entries_of_other_selections(text: str, temperature: float) -> None:
    theirs, ours = on_both(falling(100, 4099), text, temperature)
    np.testing.assert_array_equal(theirs.head_count, ours.head_count)
    np.testing.assert_array_equal(theirs.ids, ours.ids)
    for name in ("values", *BESIDE):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=2e-4, atol=1e-6)


def test_mlx_takes_logits_of_half_precision() -> None:
    z = mx.array(falling(20, 1000)).astype(mx.bfloat16)
    for text in ("threshold:8", "top-p:0.9:8", "random:8"):
        selection = Selection.parse(text)
        random = randomness(KEY, np.arange(20), selection, 1000, seed=0)
        theirs = device_selection.select(z, np.zeros(20, np.int64), selection, 1.0, random)
        ours = select(np.array(z.astype(mx.float32)), np.zeros(20, np.int64), selection, 1.0, random)
        np.testing.assert_allclose(theirs.tail_mass, ours.tail_mass, rtol=2e-4)
        np.testing.assert_allclose(theirs.entropy, ours.entropy, rtol=2e-4)


def test_mlx_draws_no_id_beyond_the_vocabulary_where_the_last_block_is_empty() -> None:
    z = np.full((1, 640), -np.inf, np.float32)
    z[0, :630:10] = 0  # only blocks 0 of 10 have mass
    last = np.nextafter(1, 0)  # the latest start there is
    random = Randomness(np.arange(10)[None], np.array([[last]]), np.zeros((1, 9)))
    kept = device_selection.select(mx.array(z), np.zeros(1, np.int64), Selection.parse("threshold:8"), 1.0, random)
    assert kept.ids.max() < 640 and len(set(kept.ids[0].tolist())) == 8
