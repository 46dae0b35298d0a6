"""The peers' layouts: held against bytes written by hand, Python integers and formulas in float64."""

import math
import re

import numpy as np
import numpy.typing as npt
import pytest

from tools.peer_layouts import (
    PEERS,
    DistillKit,
    Dwq,
    Layout,
    Payload,
    RsKd,
    TopK,
    from_bf16,
    id_bits,
    pack_bits,
    to_bf16,
    unpack_bits,
)

BUDGET, RECOMMENDED = (dict(PEERS)[f"DistillKit {name}"] for name in ("budget", "recommended"))


def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def zipf_logits(n: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """Rows as peaked as a small language model's (entropy 2 to 3 nats), largest ids anywhere, V - 1 among the top."""
    rng = np.random.default_rng(0)
    z = rng.permuted(-1.6 * np.log(np.arange(1.0, vocab_size + 1)) * np.ones((n, 1)), axis=1)
    z += rng.normal(size=z.shape) * 0.8
    z[:, -1] = z.max(axis=1) - 0.5
    return z.astype(np.float32)


def softmax(z: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    p = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def l1(layout: Layout, z: npt.NDArray[np.float32]) -> float:
    ids, probs = layout.stored_probs(layout.encode(z, generator()))
    return float((np.abs(probs - np.take_along_axis(softmax(z), ids.astype(int), axis=1)) * (probs > 0)).sum(1).mean())


@pytest.mark.parametrize(("vocab_size", "budget", "recommended"), [(49_152, 114, 312), (151_936, 127, 344)])
def test_bytes_per_position_are_the_documented_ones(vocab_size: int, budget: int, recommended: int) -> None:
    z = zipf_logits(2, vocab_size)
    sizes = {name: layout.encode(z, generator()).nbytes / 2 for name, layout in PEERS if name != "RS-KD, 50 draws"}
    assert sizes == {
        "top-16, bf16": 96,
        "DistillKit budget": budget,
        "top-50, bf16": 300,
        "DistillKit recommended": recommended,
        "mlx-lm DWQ": 6144,
    }


@pytest.mark.parametrize(("vocab_size", "entry_bytes"), [(131_072, 3), (131_073, 4), (151_936, 4)])
def test_rs_kd_takes_three_bytes_per_unique_id_while_ids_fit_17_bits(vocab_size: int, entry_bytes: int) -> None:
    payload = RsKd().encode(zipf_logits(20, vocab_size), generator())
    _, weights = RsKd().decode(payload)
    assert payload.nbytes == entry_bytes * np.count_nonzero(weights)
    assert 10 < np.count_nonzero(weights) / 20 < 25  # the paper's teachers give about 12


@pytest.mark.parametrize(("name", "layout"), PEERS)
def test_every_layout_gives_back_the_largest_id_and_distinct_ids(name: str, layout: Layout) -> None:
    z = zipf_logits(6, 151_936)
    ids, weights = layout.decode(layout.encode(z, generator()))
    assert ids.dtype == np.uint32 and weights.dtype == np.float32 and ids.shape == weights.shape
    for row, w, row_z in zip(ids, weights, z, strict=True):
        kept = row[w > 0].tolist()
        assert 151_935 in kept and len(set(kept)) == len(kept)
        if not name.startswith("RS-KD"):
            assert set(kept) == set(np.argsort(-row_z)[: len(kept)].tolist())


@pytest.mark.parametrize(("name", "layout"), PEERS)
def test_weights_sum_to_one_where_the_peer_renormalises(name: str, layout: Layout) -> None:
    z = zipf_logits(6, 5000)
    payload = layout.encode(z, generator())
    (ids, weights), (same_ids, probs) = layout.decode(payload), layout.stored_probs(payload)
    kept = np.take_along_axis(softmax(z), ids.astype(int), axis=1).sum(axis=1)
    np.testing.assert_array_equal(ids, same_ids)
    np.testing.assert_allclose(weights.sum(axis=1), kept if name.startswith("top") else 1, atol=0.01)
    ratio = weights.sum(axis=1, keepdims=True) / probs.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, probs * ratio, rtol=1e-5)


@pytest.mark.parametrize("bits", range(1, 26))
def test_bits_are_packed_most_significant_first(bits: int) -> None:
    k = 11
    ids = generator().integers(0, 1 << bits, (3, k), dtype=np.uint32)
    ids[0] = (1 << bits) - 1
    packed = pack_bits(ids, bits)
    for row, row_bytes in zip(ids.tolist(), packed, strict=True):
        number = 0
        for value in row:
            number = number << bits | value
        assert bytes(row_bytes) == (number << -k * bits % 8).to_bytes(math.ceil(k * bits / 8), "big")
    np.testing.assert_array_equal(unpack_bits(packed, k, bits), ids)


def test_ids_have_ceil_log2_bits() -> None:
    assert [id_bits(v) for v in (2, 3, 49_152, 65_536, 65_537, 131_072, 131_073, 151_936, 262_144)] == [
        *(1, 2, 16, 16, 17, 17, 18, 18, 18)
    ]
    with pytest.raises(ValueError, match="at most 25"):
        unpack_bits(np.zeros((1, 4), np.uint8), 1, 26)


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    # 1 + 1/128 is the next number after 1; halfway between two, the even one of them.
    values = np.array([[1, 1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 2**-20, -3.140625, 0, -(2.0**100)]], np.float32)
    expected = np.array([[1, 1, 1 + 2 / 128, 1 + 1 / 128, -3.140625, 0, -(2.0**100)]], np.float32)
    stored = to_bf16(values)
    assert stored[0, 0] == 0x3F80 and stored[0, 4] == 0xC049
    np.testing.assert_array_equal(from_bf16(stored.view(np.uint8)), expected)


def test_top_k_bytes_by_hand() -> None:
    # p = 1/2, 1/4, 1/8, 1/8: logs -0.693 and -1.386 are 0xBF31 and 0xBFB1 in bf16.
    z = np.log(np.array([[1, 4, 1, 2]], np.float32))
    payload = TopK(2).encode(z, generator())
    assert bytes(payload.data) == bytes.fromhex("01000000 03000000 31bf b1bf")
    ids, weights = TopK(2).decode(payload)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[0.5, 0.25]], rtol=0.004)


def test_rs_kd_bytes_by_hand() -> None:
    # Two rows of four draws: id 5 thrice and id 131,071 once; id 2 four times. An entry is id * 128 + count.
    data = np.frombuffer(bytes.fromhex("830200 81ffff 040100"), np.uint8)
    ids, weights = RsKd(draws=4).decode(Payload(data, positions=2, vocab_size=131_072))
    assert ids.tolist() == [[5, 131_071], [2, 0]]
    assert weights.tolist() == [[0.75, 0.25], [1, 0]]
    # The same with ids of 25 bits.
    data = np.frombuffer(bytes.fromhex("83020000 01ffff00 02000001"), np.uint8)
    ids, _ = RsKd(draws=6).decode(Payload(data, positions=1, vocab_size=151_936))
    assert ids.tolist() == [[5, 0x00FFFF01 >> 7, 0x01000002 >> 7]]


def test_rs_kd_bytes_written_are_those_read() -> None:
    z = np.full((2, 131_072), -200, np.float32)
    z[0, 131_071], z[1, 2] = 0, 0
    assert bytes(RsKd(draws=4).encode(z, generator()).data) == bytes.fromhex("84ffff 040100")


def test_rs_kd_draws_have_mean_p() -> None:
    n, draws = 4000, 50
    p = np.array([0.6, 0, 0.25, 0.1, 0.05])
    z = np.array([np.log(x) if x else -np.inf for x in p], np.float32)
    ids, weights = RsKd(draws).decode(RsKd(draws).encode(np.tile(z, (n, 1)), generator()))
    mean = np.bincount(ids.ravel(), weights.ravel(), minlength=5) / n
    assert (np.abs(mean - p) <= 4 * np.sqrt(p * (1 - p) / (n * draws))).all()
    with pytest.raises(ValueError, match="1 to 127"):
        RsKd(128)


def test_distillkit_bytes_by_hand() -> None:
    # V = 8: three bits an id. The log-probs after the first fall by 1 at each step, which 1 and t fit exactly.
    log_p = np.array([-0.5, -2, -3, -4]) - np.log(np.exp([-0.5, -2, -3, -4]).sum())
    z = np.full((1, 8), -100, np.float32)
    z[0, [6, 1, 7, 0]] = log_p
    layout = DistillKit(k=4, exact_k=1, terms=(0, 1))
    payload = layout.encode(z, generator())
    assert bytes(payload.data[:2]) == (0b110_001_111_000_0000).to_bytes(2, "big")
    np.testing.assert_array_equal(payload.data[2:4].view("<u2"), to_bf16(log_p[:1].astype(np.float32)))
    np.testing.assert_allclose(payload.data[4:].view("<f4"), [log_p[1], -1], rtol=1e-5)
    ids, probs = layout.stored_probs(payload)
    assert ids.tolist() == [[6, 1, 7, 0]]
    np.testing.assert_allclose(probs[0, 1:], np.exp(log_p[1:]), rtol=1e-5)


@pytest.mark.parametrize("layout", [BUDGET, RECOMMENDED, DistillKit(12, 2, (0, "exp", "sqrt"))])
def test_distillkit_curve_is_the_least_squares_fit(layout: DistillKit) -> None:
    z = zipf_logits(4, 3000)
    _, probs = layout.stored_probs(layout.encode(z, generator()))
    expected = np.log(-np.sort(-softmax(z), axis=1)[:, layout.exact_k : layout.k])
    t = np.arange(layout.k - layout.exact_k)
    columns = {"sqrt": np.sqrt(t), "exp": np.exp(t)}
    basis = np.stack([columns[i] if isinstance(i, str) else t**i for i in layout.terms], axis=1) / 1.0
    scaled = basis / np.linalg.norm(basis, axis=0)  # the same curves, better conditioned
    fit = scaled @ np.linalg.lstsq(scaled, expected.T, rcond=None)[0]
    np.testing.assert_allclose(np.log(probs[:, layout.exact_k :]), fit.T, atol=2e-3)


def test_errors_are_of_the_size_that_each_layout_must_have() -> None:
    z = zipf_logits(40, 49_152)
    error = {name: l1(layout, z) for name, layout in PEERS}
    assert error["top-50, bf16"] < 0.005  # 2^-9 of a log-prob
    assert error["DistillKit recommended"] < 0.02
    assert 0.05 < error["DistillKit budget"] < 0.25  # 0.136 on SmolLM2-135M; three terms cannot follow the second entry
    assert 0.2 < error["RS-KD, 50 draws"] < 0.5  # the noise of 50 draws
    assert error["mlx-lm DWQ"] < 0.01


def test_dwq_trains_on_the_softmax_of_what_it_kept() -> None:
    z = zipf_logits(3, 2000)
    ids, weights = Dwq().decode(Dwq().encode(z, generator()))
    kept = np.take_along_axis(z, ids.astype(int), axis=1)
    np.testing.assert_allclose(weights, softmax(kept), rtol=0.06)  # 2^-9 of a log-prob of about -12, and the sum's
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("layout", [layout for _, layout in PEERS])
def test_logits_that_no_layout_can_keep_are_refused(layout: Layout) -> None:
    z = zipf_logits(2, 2000)
    z[1, 5] = np.nan
    with pytest.raises(ValueError, match=re.escape("NaN or +inf")):
        layout.encode(z, generator())
    if not isinstance(layout, RsKd):
        few = np.full((1, 2000), -np.inf, np.float32)
        few[0, :3] = 0
        with pytest.raises(ValueError, match=r"fewer than \d+ finite"):
            layout.encode(few, generator())
        with pytest.raises(ValueError, match="but the vocabulary has 10"):
            layout.encode(np.zeros((1, 10), np.float32), generator())
