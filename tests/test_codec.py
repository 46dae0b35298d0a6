import numpy as np
import pytest

from logitstore.codec import PROBS, decode, encode, id_bytes, record_width, round_at_random, sum_to_one
from logitstore.selection import Selected, Selection

THRESHOLD, TOP_K = Selection("threshold", 3), Selection("top-k", 3)


def selected(ids: list[int], probs: list[float], tail: float, label: float = -1.0, entropy: float = 2.5) -> Selected:
    head = sum(p > 0 for p in probs)
    return Selected(
        ids=np.array([ids], np.uint32),
        head_probs=np.array([probs]),
        head_count=np.array([head], np.int32),
        tail_mass=np.array([tail]),
        label_log_prob=np.array([label]),
        entropy=np.array([entropy]),
    )


def half(k: int) -> np.ndarray:
    return np.full((1, k + 1), 0.5)


GOLDEN = [
    pytest.param(
        # ids 5, 300 | 700: low bytes, then high bytes; codes 4, 24 as 4, +20; 2 in the head; tail; label; entropy
        "05 2c bc  00 01 02  04 14 00  02  3c 10 28",
        1_000,
        selected([5, 300, 700], [np.exp(-4.4 / 16), np.exp(-24 / 16), 0], np.exp(-60 / 16)),
        id="2-byte ids",
    ),
    pytest.param(
        # 0x01116f | 2, 65537 = 2 + 0xffff: three planes; the one head entry is kept as it is
        "6f 02 ff  11 00 ff  01 00 00  10 00 00  01  07 10 28",
        70_000,
        selected([69_999, 2, 65_537], [np.exp(-16 / 16), 0, 0], np.exp(-7.4 / 16)),
        id="3-byte ids",
    ),
]


@pytest.mark.parametrize(("golden", "vocab_size", "row"), GOLDEN)
def test_a_record_is_the_golden_bytes(golden: str, vocab_size: int, row: Selected) -> None:
    record = encode(row, half(3), vocab_size)
    assert record.dtype == np.uint8 and record.tobytes() == bytes.fromhex(golden)
    assert record_width(3, vocab_size) == len(bytes.fromhex(golden))


def test_golden_bytes_read_as_the_specification_says() -> None:
    record = np.frombuffer(bytes.fromhex("05 2c bc  00 01 02  04 14 00  02  3c 10 28"), np.uint8)[None]
    targets = decode(record, THRESHOLD, 1_000)
    second, tail = np.exp(-1.5), np.exp(-3.75)
    assert targets.ids.tolist() == [[5, 300, 700]] and targets.head_count.tolist() == [2]
    assert targets.weights[0] == pytest.approx([1 - second - tail, second, tail])  # the largest takes what is left
    assert targets.log_tail_mass[0] == pytest.approx(-3.75)
    assert (targets.label_log_prob[0], targets.entropy[0], targets.positions[0]) == (-1.0, 2.5, 0)
    kept = decode(record, TOP_K, 1_000).weights[0]
    assert kept == pytest.approx([1 - second - tail, second, 0])


@pytest.mark.parametrize("vocab_size", [1_000, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("k", [1, 3, 255, 256, 300])
def test_ids_come_back_exactly_and_weights_within_one_step(vocab_size: int, k: int) -> None:
    rng = np.random.default_rng(vocab_size + k)
    n = 40
    probs = np.sort(rng.dirichlet(np.full(k + 1, 0.3), n))[:, ::-1]
    heads = rng.integers(0, k + 1, n)
    ids = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(n)])
    ids[0, -1] = vocab_size - 1
    for row, head in zip(ids, heads, strict=True):
        row[head:] = np.sort(row[head:])
    head_probs = np.where(np.arange(k) < heads[:, None], probs[:, :k], 0)
    zeros = np.zeros(n)
    rows = Selected(ids.astype(np.uint32), head_probs, heads.astype(np.int32), 1 - head_probs.sum(1), zeros, zeros)
    targets = decode(encode(rows, rng.random((n, k + 1)), vocab_size), Selection("top-k", k), vocab_size)
    assert (targets.ids == ids).all() and (targets.head_count == heads).all()
    cells = np.column_stack([targets.weights, np.exp(targets.log_tail_mass)])
    exact = np.column_stack([head_probs, 1 - head_probs.sum(1)])
    within = np.abs(cells - exact) <= exact * (np.exp(1 / 16) - 1) + PROBS[254]
    assert (within | (exact == exact.max(1, keepdims=True))).all()  # the largest cell takes what the others leave
    assert targets.weights.sum(1) + np.exp(targets.log_tail_mass) == pytest.approx(np.ones(n), abs=1e-6)


NEAR_TIES = [0.1698, 0.1696, 0.1694, 0.1692, 0.169]


@pytest.mark.parametrize(
    "probs", [[0.31, 0.17, 0.05, 0.013, 4e-4, 3e-7], NEAR_TIES, [0.42, 0.1], [0.5], [0.502], [1e-3] * 16], ids=str
)
def test_the_mean_of_2000_roundings_is_the_probability(probs: list[float]) -> None:
    n, k = 2_000, len(probs)
    row = selected(list(range(k)), probs, 1 - sum(probs))
    many = Selected(*(np.repeat(getattr(row, name), n, axis=0) for name in Selected.__annotations__))
    uniform = np.random.default_rng(0).random((n, k + 1))
    targets = decode(encode(many, uniform, 1_000), Selection("top-k", k), 1_000)
    cells = np.column_stack([targets.weights, np.exp(targets.log_tail_mass)]).astype(np.float64)
    error = np.abs(cells.mean(0) - [*probs, 1 - sum(probs)])
    assert (error <= 4.5 * cells.std(0) / np.sqrt(n) + 1e-7).all()


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-3, np.exp(-15.875), 1e-8, 0.0])
def test_rounding_goes_to_a_neighbouring_code_for_every_random_number(p: float) -> None:
    codes = round_at_random(np.full(9, p), np.array([0, 2**-32, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1 - 2**-32]))
    assert PROBS[codes].max() >= p * (1 - 1e-12) and PROBS[codes].min() <= p * (1 + 1e-12)
    assert codes.max() - codes.min() <= 1


def test_what_has_no_code_is_clipped_to_the_last() -> None:
    row = selected([1, 2, 3], [1.0, 0, 0], 0.0, label=-np.inf, entropy=99.0)
    targets = decode(encode(row, half(3), 1_000), THRESHOLD, 1_000)
    assert (targets.label_log_prob[0], targets.entropy[0]) == (-254 / 16, 255 / 16)
    assert targets.log_tail_mass[0] == -np.inf and targets.weights.tolist() == [[1, 0, 0]]


def test_a_uniform_row_with_k_of_the_whole_vocabulary_keeps_all_of_it() -> None:
    k = 5_000
    probs = np.full((1, k), 1 / k)
    one = np.ones(1)
    row = Selected(np.arange(k, dtype=np.uint32)[None], probs, np.array([k], np.int32), 0 * one, -one, one)
    targets = decode(encode(row, np.random.default_rng(0).random((1, k + 1)), k), Selection("top-k", k), k)
    assert (targets.ids[0] == np.arange(k)).all()
    assert targets.weights.sum() == pytest.approx(1)
    assert np.abs(targets.weights * k - 1)[0, 1:].max() < 0.07  # the first takes what the others leave


@pytest.mark.parametrize(
    "record",
    [
        "05 2c bc  00 01 02  04 14 00  04  3c 10 28",  # 4 head entries of 3
        "05 2c e8  00 01 03  04 14 00  02  3c 10 28",  # id 1,000 of 1,000 in the tail
        "e8 2c bc  03 01 02  04 14 00  02  3c 10 28",  # and in the head
        "05 2c ff  00 01 ff  04 14 00  00  3c 10 28",  # differences that add up to it
        "ff" * 13,  # what a lost chunk reads as
    ],
)
def test_a_record_that_no_encoder_writes_is_refused(record: str) -> None:
    hostile = np.frombuffer(bytes.fromhex(record), np.uint8)[None]
    with pytest.raises(ValueError, match="a record holds"):
        decode(hostile, THRESHOLD, 1_000)


@pytest.mark.parametrize(("k", "vocab_size"), [(1, 300), (16, 49_152), (16, 65_536), (255, 151_936), (300, 2**24)])
def test_any_bytes_at_all_give_finite_weights_that_sum_to_one_or_are_refused(k: int, vocab_size: int) -> None:
    rng = np.random.default_rng(k)
    for record in rng.integers(0, 256, (300, 1, record_width(k, vocab_size)), np.uint8):
        try:
            targets = decode(record, Selection("top-k", k), vocab_size)
        except ValueError:
            continue
        assert np.isfinite(targets.weights).all() and (targets.weights >= 0).all()
        assert targets.weights.sum() + np.exp(targets.log_tail_mass) == pytest.approx(1, abs=1e-5)


def test_ids_take_two_three_or_four_bytes() -> None:
    assert [id_bytes(v) for v in (2, 65_536, 65_537, 2**24, 2**24 + 1)] == [2, 2, 3, 3, 4]


def test_the_largest_cell_takes_the_rest_unless_that_would_halve_it() -> None:
    cells = sum_to_one(np.array([[0.6, 0.3, 0.2], [0.36, 0.36, 0.36], [0.7, 0.7, 0.7], [0.0, 0.0, 0.0]]))
    assert cells[0] == pytest.approx([0.5, 0.3, 0.2])
    assert cells[1] == pytest.approx([0.28, 0.36, 0.36])
    assert cells[2] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert cells[3] == pytest.approx([1, 0, 0])
