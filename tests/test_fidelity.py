"""Fidelity against the formulas written out over whole [N, V] arrays, and against numbers worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.fidelity import Fidelity, FidelityMeter, agreement
from logitstore.targets import SparseTargets

Floats = npt.NDArray[np.float64]
NEVER = -np.inf


def softmax(z: npt.NDArray[np.floating]) -> Floats:
    e = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def targets(
    ids: npt.ArrayLike, weights: npt.ArrayLike, head_count: npt.ArrayLike, tail_mass: npt.ArrayLike
) -> SparseTargets:
    n = len(np.asarray(ids))
    with np.errstate(divide="ignore"):
        log_tail_mass = np.log(np.asarray(tail_mass, np.float64)).astype(np.float32)
    return SparseTargets(
        positions=np.arange(n, dtype=np.int32),
        ids=np.asarray(ids, np.uint32),
        weights=np.asarray(weights, np.float32),
        head_count=np.asarray(head_count, np.int32),
        log_tail_mass=log_tail_mass,
        label_log_prob=np.zeros(n, np.float32),
        entropy=np.zeros(n, np.float32),
    )


def top_k(p: Floats, k: int) -> SparseTargets:
    """The k largest of p [N, V]; an id whose probability is zero leaves its entry empty."""
    ids = np.argsort(-p, axis=1, kind="stable")
    sorted_p = np.take_along_axis(p, ids, axis=1)
    weights = sorted_p[:, :k]
    return targets(
        np.where(weights > 0, ids[:, :k], 0), weights, (weights > 0).sum(axis=1), sorted_p[:, k:].sum(axis=1)
    )


def threshold(p: Floats, k: int, rng: np.random.Generator) -> SparseTargets:
    """threshold:k of p [N, V] by sorting; the tail's ids drawn at equal steps along a random order of them."""
    n = len(p)
    all_ids, all_weights, heads, tails = np.zeros((n, k)), np.zeros((n, k)), np.zeros(n), np.zeros(n)
    for row in range(n):
        ids = np.argsort(-p[row])
        tau = [p[row, ids[h:]].sum() / (k - h) for h in range(k)]
        h = next((h for h in range(k) if p[row, ids[h]] <= tau[h]), k)
        tail = rng.permutation(ids[h:])
        points = (rng.random() + np.arange(k - h)) * tau[min(h, k - 1)]
        drawn = np.sort(tail[np.searchsorted(p[row, tail].cumsum(), points)])
        all_ids[row], heads[row], tails[row] = [*ids[:h], *drawn], h, p[row, ids[h:]].sum()
        all_weights[row] = [*p[row, ids[:h]], *[tau[min(h, k - 1)]] * (k - h)]
    return targets(all_ids, all_weights, heads, tails)


def dense(kept: SparseTargets, vocab_size: int) -> Floats:
    p = np.zeros((len(kept), vocab_size))
    np.add.at(p, (np.arange(len(kept))[:, None], kept.ids), kept.weights)
    return p


def cut(kept: SparseTargets, rows: slice) -> SparseTargets:
    return replace(kept, **{name: value[rows] for name, value in vars(kept).items() if value is not None})


def angles(logits: npt.NDArray[np.float32], kept: SparseTargets, temperature: float) -> tuple[tuple[int, float], ...]:
    """The gradients over all of [N, V], position by position."""
    z = logits.astype(np.float64) / temperature
    p, p_hat = softmax(z), dense(kept, z.shape[1])
    q = 0.6 * softmax(z / 1.3) + 0.4 * p.mean(axis=0)
    full = (q - p).cumsum(axis=0)
    sparse = (p_hat.sum(axis=1, keepdims=True) * q - p_hat).cumsum(axis=0)
    along = (full * sparse).sum(axis=1, keepdims=True) / (full**2).sum(axis=1, keepdims=True) * full
    across, sign = np.linalg.norm(sparse - along, axis=1), np.sign((along * full).sum(axis=1))
    degrees = np.degrees(np.arctan2(across, sign * np.linalg.norm(along, axis=1)))
    at = sorted({n for n in (4, 16, 64, 256, 1024) if n <= len(z)} | {len(z)})
    return tuple((n, float(degrees[n - 1])) for n in at)


def measure(logits: npt.NDArray[np.float32], kept: SparseTargets, temperature: float = 1.0) -> Fidelity:
    meter = FidelityMeter(logits.shape[1], temperature)
    meter.add(logits, kept)
    return meter.result()


def language(n: int, vocab_size: int, seed: int) -> npt.NDArray[np.float32]:
    """Logits [n, vocab_size] with frequent and rare tokens."""
    z = np.random.default_rng(seed).normal(0, 1.5, (n, vocab_size)) - np.log(np.arange(1, vocab_size + 1))
    return z.astype(np.float32)


def test_the_scalars_are_those_worked_out_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], np.float32))
    top = measure(logits[:1], targets([[1, 0]], [[0.125, 0]], [1], [0.875]))  # the second entry is empty
    assert top.kl_floor == pytest.approx(0.125 * np.log(0.5) + 0.875 * np.log(0.875 / 0.75))
    assert (top.head_l1, top.kept_mass, top.weight_sum_error) == pytest.approx((0.125, 0.25, 0), abs=1e-6)
    zero = measure(logits[:1], targets([[0, 1]], [[0.5, 0]], [2], [0.25]))  # the second was rounded to zero
    wanted = pytest.approx((0, 0.25, 0.75, 0.25), abs=1e-6)
    assert (zero.kl_floor, zero.head_l1, zero.kept_mass, zero.weight_sum_error) == wanted

    both = measure(logits, targets([[0, 2], [0, 1]], [[0.5, 0.5], [0.375, 0.5]], [1, 1], [0.5, 0.5]))
    by_row = 0.5 * np.log(2), 0.375 * np.log(0.75) + 0.5 * np.log(2)
    assert both.kl_floor == pytest.approx(sum(by_row) / 2)
    assert (both.head_l1, both.kept_mass, both.weight_sum_error) == pytest.approx((0.0625, 0.75, 0.125), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("selection", ["threshold", "top-k"])
def test_it_equals_the_formulas_over_all_of_the_vocabulary(selection: str, temperature: float) -> None:
    logits = language(70, 23, seed=1)
    p = softmax(logits / temperature)
    rng = np.random.default_rng(2)
    kept = threshold(p, 5, rng) if selection == "threshold" else top_k(p, 5)
    kept = replace(kept, weights=(kept.weights * rng.uniform(0.97, 1.03, kept.weights.shape)).astype(np.float32))
    found = measure(logits, kept, temperature)

    kl, l1, mass, error = [], [], [], []
    for row in range(70):
        w, true, h = kept.weights[row].astype(np.float64), p[row, kept.ids[row]], kept.head_count[row]
        if selection == "top-k":
            tail = np.delete(p[row], kept.ids[row]).sum()
            w, true = np.append(w, np.exp(np.float64(kept.log_tail_mass[row]))), np.append(true, tail)
        kl.append((w * np.log(w / true)).sum())
        l1.append(np.abs(w - true)[:h].sum())
        mass.append(true[:5].sum())
        error.append(abs(w.sum() - 1))
    wanted = np.mean(kl), np.mean(l1), np.mean(mass), np.max(error)
    assert (found.kl_floor, found.head_l1, found.kept_mass, found.weight_sum_error) == pytest.approx(wanted)
    assert found.positions == 70 and [n for n, _ in found.angles] == [4, 16, 64, 70]
    assert np.array(found.angles) == pytest.approx(np.array(angles(logits, kept, temperature)), rel=1e-6)


def test_a_store_that_keeps_everything_exactly_has_no_error() -> None:
    logits = language(20, 12, seed=3)
    kept = top_k(softmax(logits), 12)
    found = measure(logits, kept)
    assert np.array(found.angles) == pytest.approx(np.array(angles(logits, kept, 1.0)), rel=1e-4)  # float32 weights
    assert max(degrees for _, degrees in found.angles) < 1e-4
    assert abs(found.kl_floor) < 1e-6 and found.head_l1 < 1e-6 and found.weight_sum_error < 1e-6
    assert found.kept_mass == pytest.approx(1)


def test_impossible_tokens_one_hot_rows_and_distant_logits_give_finite_numbers() -> None:
    logits = np.array([[0, NEVER, NEVER, NEVER], [NEVER, 2, 1, NEVER], [9e3, 0, -9e3, 1], [1, 1, 1, 1]], np.float32)
    p = softmax(logits)
    for kept in (top_k(p, 3), top_k(p, 1), threshold(p, 3, np.random.default_rng(0))):
        found = measure(logits, kept)
        assert np.isfinite([found.kl_floor, found.head_l1, found.kept_mass, *np.ravel(found.angles)]).all()
        assert found.head_l1 < 1e-6 and found.weight_sum_error < 1e-6
    one_hot = measure(logits[[0, 0]], top_k(p[[0, 0]], 3))  # neither gradient has a direction
    assert one_hot == Fidelity(2, 0, 0, 1, 0, ((2, 0.0),))
    flat = measure(logits[[3]], top_k(p[[3]], 1))  # only one of them has
    assert flat.angles == ((1, 90.0),)


def test_how_positions_are_cut_into_calls_changes_nothing() -> None:
    logits = language(50, 300, seed=4)
    kept = threshold(softmax(logits), 4, np.random.default_rng(5))
    whole = measure(logits, kept)
    for size in (1, 3, 16):
        meter = FidelityMeter(300)
        for at in range(0, 50, size):
            rows = slice(at, at + size)
            meter.add(logits[rows], cut(kept, rows))
        assert meter.result() == whole


def test_the_angle_of_an_unbiased_sample_falls_as_one_over_root_n_and_that_of_top_k_stays() -> None:
    # Four contexts in turn: after every four positions the full gradient points the same way.
    logits = np.tile(language(4, 64, seed=6), (1024, 1))
    p = softmax(logits)
    sample = [measure(logits, threshold(p, 8, np.random.default_rng(seed))).angles for seed in range(3)]
    assert [n for n, _ in sample[0]] == [4, 16, 64, 256, 1024, 4096]
    mean = np.mean([[degrees for _, degrees in one] for one in sample], axis=0)
    assert mean[2] / mean[-1] == pytest.approx(8, rel=0.35)  # from 64 positions to 64 times as many
    top = [degrees for _, degrees in measure(logits, top_k(p, 8)).angles]
    assert top == pytest.approx([top[0]] * 6, rel=1e-6) and top[0] > 3 * mean[-1]


def test_json_and_text_say_what_was_measured() -> None:
    fidelity = Fidelity(1234, 0.0123456, 0.0144, 0.772, 2.5e-7, ((4, 31.25), (1234, 4.56)))
    data = json.loads(json.dumps(fidelity.to_json()))
    assert data == fidelity.to_json()
    assert Fidelity.from_json(data | {"of_a_later_version": 1}) == fidelity
    with pytest.raises(KeyError, match="head_l1"):
        Fidelity.from_json({name: value for name, value in data.items() if name != "head_l1"})
    lines = fidelity.to_text().splitlines()
    assert lines[0] == "measured on 1,234 positions, live against stored"
    assert lines[-1] == "angle       31.2° over 4, 4.6° over 1,234 positions"


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no position"):
        FidelityMeter(3).result()
    row = targets([[0, 1]], [[0.5, 0.5]], [2], [0])
    with pytest.raises(ValueError, match="do not fit 1 positions of 4 ids"):
        FidelityMeter(4).add(np.zeros((1, 3), np.float32), row)
    for bad in ([np.nan, 0, 0], [np.inf, 0, 0], [NEVER] * 3):
        with pytest.raises(ValueError, match="at position 0"):
            measure(np.array([bad], np.float32), row)
    with pytest.raises(ValueError, match="position 0 of the sample: weight is stored where p is zero"):
        measure(np.array([[0, NEVER, 0]], np.float32), row)
    with pytest.raises(ValueError, match="weight is stored where p is zero"):  # the tail's cell
        measure(np.array([[0, 0, NEVER]], np.float32), targets([[0, 1]], [[0.5, 0.4]], [2], [0.1]))


def test_agreement_counts_entries_by_id_and_positions_by_everything() -> None:
    weights: list[list[float]] = [[0.6, 0.4, 0], [0.5, 0.25, 0.25], [1, 0, 0]]
    stored = targets([[5, 3, 0], [1, 2, 9], [7, 0, 4]], weights, [2, 1, 3], [0, 0.5, 0])
    assert agreement(stored, stored) == (8, 8, 3)  # one entry of nine is empty; a zero in the head is not
    assert agreement(stored, replace(stored, entropy=np.array([0, 1, 0], np.float32))) == (8, 8, 2)
    swapped = replace(stored, ids=stored.ids[:, [1, 0, 2]], weights=stored.weights[:, [1, 0, 2]])
    assert agreement(stored, swapped) == (8, 8, 0)
    other_id, other_weight = stored.ids.copy(), stored.weights.copy()
    other_id[1, 2], other_weight[0, 1] = 8, 0.375
    assert agreement(stored, replace(stored, ids=other_id, weights=other_weight)) == (8, 6, 1)
    upside_down = {name: getattr(stored, name)[::-1] for name in ("ids", "weights", "head_count", "log_tail_mass")}
    assert agreement(stored, replace(stored, **upside_down)) == (8, 3, 1)
    shifted = replace(stored, positions=stored.positions + 1)
    for live in (shifted, targets([[5]] * 3, [[1]] * 3, [1] * 3, [0] * 3)):
        with pytest.raises(ValueError, match="not of the same positions"):
            agreement(stored, live)


def test_agreement_covers_the_optional_planes() -> None:
    plain = targets([[5, 3], [1, 2]], [[0.75, 0.25], [0.5, 0.5]], [2, 1], [0, 0.5])
    log_z = np.array([[0.5, 1.0], [0.25, 2.0]], np.float32)
    stored = replace(plain, log_probs=np.log(plain.weights), log_z=log_z)
    assert agreement(stored, stored) == (4, 4, 2)
    assert agreement(stored, replace(stored, log_z=log_z + np.array([[0], [1]], np.float32))) == (4, 4, 1)
    assert agreement(stored, replace(stored, log_z=log_z[:, :1])) == (4, 4, 0)
    assert agreement(stored, plain) == (4, 4, 0)
    none = cut(stored, slice(0))
    assert agreement(none, none) == (0, 0, 0)
