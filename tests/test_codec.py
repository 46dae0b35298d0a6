"""Codes and records: bytes by hand, roundings right in the mean, ids exact, and hostile records."""

from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.codec import (
    PROBS,
    Codes,
    Form,
    encode_position,
    from_record,
    position_width,
    quantize,
    round_at_random,
    targets,
    to_record,
    weights,
)
from logitstore.selection import Selected, Selection
from logitstore.targets import SparseTargets

Bytes = npt.NDArray[np.uint8]

# Ids 5, 300 | 700: low bytes of 5, 295, 700, then high bytes; codes: largest 0, 24; 2 in the head; tail 60.
THRESHOLD_RECORD = "05 27 bc  00 01 02  00 18 00  02  3c"


def selected(
    ids: list[int], values: list[float], head_count: int, tail: float, label: float = -1.0, entropy: float = 2.5
) -> Selected:
    return Selected(
        ids=np.array([ids], np.uint32),
        values=np.array([values]),
        head_count=np.array([head_count], np.int32),
        tail_mass=np.array([tail]),
        label_log_prob=np.array([label]),
        entropy=np.array([entropy]),
    )


def repeated(row: Selected, n: int) -> Selected:
    return Selected(*(np.repeat(getattr(row, field.name), n, axis=0) for field in fields(Selected)))


def half(k: int) -> npt.NDArray[np.float64]:
    return np.full((1, k + 1), 0.5)


def e(code: float) -> float:
    """The probability that a code stands for."""
    return float(np.exp(-code / 16))


def form_of(text: str, vocab_size: int = 1_000, own: bool = False) -> Form:
    return Form(Selection.parse(text), vocab_size, own)


def row_of(text: str) -> Bytes:
    return np.frombuffer(bytes.fromhex(text), np.uint8)[None]


def read(record: Bytes, form: Form) -> SparseTargets:
    return targets(from_record(record, form), np.tile(row_of("10 28"), (len(record), 1)), form)


GOLDEN = [
    # 24.4 lies 0.6 of the way up to the probability of 24, so that 0.5 rounds it up; the largest head entry has code 0
    pytest.param(THRESHOLD_RECORD, form_of("threshold:3"),
                 selected([5, 300, 700], [1 - e(24.4) - e(60), e(24.4), 0.01], 2, e(60)), id="threshold"),
    # the tail is the largest: its code is 0; the tail entries have their own codes, nearest; the impossible one 255
    pytest.param("03 02 c9  00 00 02  20 1e ff  01  00", form_of("threshold:3", own=True),
                 selected([3, 2, 715], [e(32), e(30.4), 0.0], 1, 1 - e(32)), id="tail log-probs"),
    # falling by value, stored by rising id: 2, 0x01116f - 2 in three planes; then nothing; tail e(16), largest 2
    pytest.param("02 6d 00  00 11 00  00 01 00  00 20 00  02  10", form_of("top-k:3", 70_000),
                 selected([2, 69_999, 0], [1 - e(16) - e(32), e(32), 0], 2, e(16)), id="top-k, 3-byte ids"),
    pytest.param("02 fd  00 ff  00 ff  00 7f  00 20  02  ff", form_of("top-p:0.5:2", 2**31),
                 selected([2, 2**31 - 1], [1 - e(32), e(32)], 2, 0), id="top-p, 4-byte ids"),
    # counts of 4 draws: 3 and 1; there is no tail
    pytest.param("01 08 00 00  00 00 00 00  01 03 00 00  02  ff", form_of("random:4"),
                 selected([9, 1, 0, 0], [0.75, 0.25, 0, 0], 2, 0), id="random"),
    # weights 1, e and less than e^4: 64, 48, 4 + 1 steps below e^4
    pytest.param("01 01 07  00 00 00  30 05 40  03  ff", form_of("random:3:0.8"),
                 selected([2, 1, 9], [np.exp(4 - 5 / 16), np.e, 1.0], 3, 0), id="random with an exponent"),
]  # fmt: skip


@pytest.mark.parametrize(("golden", "form", "row"), GOLDEN)
def test_a_record_is_the_golden_bytes(golden: str, form: Form, row: Selected) -> None:
    record = to_record(quantize(row, half(form.selection.k), form), form)
    assert record.dtype == np.uint8 and record.tobytes().hex() == golden.replace(" ", "")
    assert form.entries_width == record.shape[1]


@pytest.mark.parametrize(("golden", "form", "row"), GOLDEN)
def test_golden_bytes_are_read_as_the_entries_that_they_stand_for(golden: str, form: Form, row: Selected) -> None:
    found, k = read(row_of(golden), form), form.selection.k
    expected = {int(i): v for i, v in zip(row.ids[0, : row.head_count[0]], row.values[0], strict=False)}
    head = found.head_count[0]
    assert head == row.head_count[0] and set(found.ids[0, :head].tolist()) == set(expected)
    assert found.weights[0, :head] == pytest.approx([expected[int(i)] for i in found.ids[0, :head]], rel=0.03)
    tail = 1 - sum(expected.values()) if form.sampled_tail else 0
    assert found.weights[0, head:] == pytest.approx(np.full(k - head, tail / max(k - head, 1)), rel=0.02)
    assert found.log_tail_mass[0] == pytest.approx(np.log(row.tail_mass[0]) if row.tail_mass[0] else -np.inf)


def test_the_largest_cell_takes_what_the_others_leave() -> None:
    found = read(row_of(THRESHOLD_RECORD), form_of("threshold:3"))
    assert found.ids.tolist() == [[5, 300, 700]]
    assert found.weights[0] == pytest.approx([1 - e(24) - e(60), e(24), e(60)])
    assert found.log_tail_mass[0] == pytest.approx(-60 / 16)
    tail_largest = read(row_of("03 02 c9  00 00 02  20 1e ff  01  00"), form_of("threshold:3"))
    assert tail_largest.weights[0] == pytest.approx([e(32), (1 - e(32)) / 2, (1 - e(32)) / 2])


def test_an_entry_has_a_log_prob_of_its_own_where_these_are_kept() -> None:
    found = read(row_of("03 02 c9  00 00 02  20 1e ff  01  00"), form_of("threshold:3", own=True))
    assert found.log_probs is not None and found.log_probs[0] == pytest.approx([-2, -30 / 16, -np.inf])
    assert read(row_of(THRESHOLD_RECORD), form_of("threshold:3")).log_probs is None


def test_every_cell_is_rounded_by_a_random_number_of_its_own_the_tail_by_the_last() -> None:
    form, row = form_of("top-k:3"), selected([2, 1, 3], [1 - e(20.5) - 2 * e(40.5), e(20.5), e(40.5)], 3, e(40.5))
    for high in range(4):  # a number near 1 rounds down, to the next code
        rounding = np.where(np.arange(4) == high, 0.99, 0.0)[None]
        codes = quantize(row, rounding, form)
        assert codes.codes[0].tolist() == [20 + (high == 1), 0, 40 + (high == 2)]  # ids 1, 2, 3
        assert codes.tail[0] == 40 + (high == 3)


def test_a_number_of_head_entries_takes_two_bytes_where_k_is_256_or_more() -> None:
    form = form_of("top-k:300", 65_536)
    row = selected([*range(300)], [1 / 300] * 300, 300, 0.0)
    record = to_record(quantize(row, half(300), form), form)
    assert record[0, -3:].tobytes().hex() == "2c01ff" and form.entries_width == 300 * 3 + 2 + 1
    assert [form_of(f"top-k:{k}").count_bytes for k in (1, 255, 256, 65_535, 65_536)] == [1, 1, 2, 2, 4]


def test_ids_take_two_three_or_four_bytes() -> None:
    assert [form_of("top-k:1", v).id_bytes for v in (2, 1 << 16, (1 << 16) + 1, 1 << 24, (1 << 24) + 1, 1 << 31)] == [
        2, 2, 3, 3, 4, 4
    ]  # fmt: skip


def test_what_is_kept_beside_the_entries_is_the_golden_bytes() -> None:
    row = selected([1], [1.0], 1, 0.0, label=-15.6 / 16, entropy=40.4 / 16)
    log_z = np.array([[0.0, 0x0201 / 4096, 0x03F0 / 4096 + 0.0001]])
    found = encode_position(row, log_z)
    assert found.tobytes().hex(" ") == "10 28 00 01 f0 00 02 03"  # all low bytes of log Z, then all high ones
    assert found.shape[1] == position_width(3)
    kept = targets(from_record(row_of("01 00  00  01  ff"), form_of("top-k:1")), found, form_of("top-k:1"))
    assert (kept.label_log_prob[0], kept.entropy[0], kept.positions[0]) == (-1.0, 2.5, 0)
    assert kept.log_z is not None and kept.log_z[0].tolist() == [0.0, 0x0201 / 4096, 0x03F0 / 4096]


def test_what_has_no_code_is_clipped_to_the_last() -> None:
    row = selected([1, 2, 3], [1.0, 0, 0], 1, 0.0, label=-np.inf, entropy=99.0)
    assert encode_position(row, np.array([[-0.1, 99.0]])).tobytes().hex(" ") == "fe ff 00 ff 00 ff"
    codes = quantize(row, half(3), form_of("threshold:3"))
    values, tail = weights(codes, form_of("threshold:3"))
    assert values.tolist() == [[1, 0, 0]] and tail.tolist() == [0]


def any_codes(form: Form, n: int, seed: int) -> Codes:
    """Sets of ids with codes that add up, among them the first and the last id of the vocabulary."""
    rng, k = np.random.default_rng(seed), form.selection.k
    heads = rng.integers(1, k + 1, n) if form.sampled_tail else np.full(n, k)
    ids = np.stack([rng.choice(min(form.vocab_size, 20 * k), k, replace=False) for _ in range(n)]).astype(np.uint32)
    ids[0, np.argmax(ids[0])] = form.vocab_size - 1
    ids[-1, np.argmin(ids[-1])] = 0
    probs = -np.sort(-rng.dirichlet(np.full(k + 1, 0.3), n), axis=1)
    probs[:, :k][np.arange(k) >= heads[:, None]] = 0
    tail, zeros = np.maximum(1 - probs[:, :k].sum(axis=1), 0), np.zeros(n)
    row = Selected(ids, probs[:, :k], heads.astype(np.int32), tail, zeros, zeros)
    return quantize(row, rng.random((n, k + 1)), form)


@pytest.mark.parametrize("vocab_size", [5_000, 65_536, 65_537, 151_936, 2**24 + 1, 2**31])
@pytest.mark.parametrize("k", [1, 255, 256, 300, 5000])
@pytest.mark.parametrize("kind", ["threshold", "top-k"])
def test_ids_and_codes_come_back_exactly(kind: str, k: int, vocab_size: int) -> None:
    form = form_of(f"{kind}:{k}", vocab_size)
    codes = any_codes(form, 5, seed=k)
    found = from_record(to_record(codes, form), form)
    for field in fields(Codes):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(codes, field.name))
    assert vocab_size - 1 in found.ids[0] and 0 in found.ids[-1]
    for ids, head in zip(found.ids.astype(np.int64), found.head_count, strict=True):
        assert (np.diff(ids[:head]) > 0).all() and (np.diff(ids[head:]) > 0).all()


@pytest.mark.parametrize("k", [1, 2, 255, 256, 300])
def test_weights_are_within_a_step_and_sum_to_one(k: int) -> None:
    rng, n, form = np.random.default_rng(k), 40, form_of(f"top-k:{k}")
    cells = rng.dirichlet(np.full(k + 1, 0.3), n)
    ids, zeros = np.tile(np.arange(k, dtype=np.uint32), (n, 1)), np.zeros(n)
    row = Selected(ids, cells[:, 1:], np.full(n, k, np.int32), cells[:, 0], zeros, zeros)
    values, tail = weights(quantize(row, rng.random((n, k + 1)), form), form)
    found = np.column_stack([tail, values])
    assert found.sum(axis=1) == pytest.approx(np.ones(n), abs=2e-6)
    within = np.abs(found - cells) <= cells * (np.exp(1 / 16) - 1) + PROBS[254]
    assert (within | (cells == cells.max(axis=1, keepdims=True))).all()  # the largest takes what the others leave


NEAR_TIES = [0.1698, 0.1696, 0.1694, 0.1692, 0.169]


@pytest.mark.parametrize(
    "probs",
    [[0.31, 0.17, 0.05, 0.013, 4e-4, 3e-7], NEAR_TIES, [0.42, 0.1], [0.5], [0.502], [0.4999, 0.5], [1e-3] * 16],
    ids=str,
)
@pytest.mark.parametrize("kind", ["top-k", "threshold"])
def test_the_mean_of_2000_roundings_is_the_probability(kind: str, probs: list[float]) -> None:
    n, k, tail = 2_000, len(probs), 1 - sum(probs)
    form = form_of(f"{kind}:{k + 2}" if kind == "threshold" else f"top-k:{k}")
    row = repeated(selected([*range(form.selection.k)], [*probs, 0, 0][: form.selection.k], k, tail), n)
    uniform = np.random.default_rng(k).random((n, form.selection.k + 1))
    values, tails = weights(quantize(row, uniform, form), form)
    cells = np.column_stack([values, tails]).astype(np.float64)
    expected = [*probs, *([tail / 2] * 2 if kind == "threshold" else []), tail]
    assert (np.abs(cells.mean(0) - expected) <= 4.5 * cells.std(0) / np.sqrt(n) + 1e-7).all()


@pytest.mark.parametrize("weight", [50.0, 3.3, 1.02, 0.07, 2e-4])
def test_the_mean_of_2000_roundings_of_a_weight_of_random_draws_is_the_weight(weight: float) -> None:
    form = form_of("random:1:0.8")
    row = repeated(selected([7], [weight], 1, 0.0), 2_000)
    values, tail = weights(quantize(row, np.random.default_rng(0).random((2_000, 2)), form), form)
    assert abs(values.mean(dtype=np.float64) - weight) <= 4.5 * values.std() / np.sqrt(2_000) + 1e-6 * weight
    assert values.std() > 0.01 * weight and not tail.any()


def test_counts_of_draws_are_kept_exactly() -> None:
    form, counts = form_of("random:255"), np.array([200, 54, 1])
    row = selected([*range(255)], [*(counts / 255), *[0] * 252], 3, 0.0)
    values, _ = weights(quantize(row, half(255), form), form)
    assert (values[0, :3] * np.float32(255) == counts).all() and not values[0, 3:].any()


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-3, np.exp(-15.875), 1e-8, 1e-300, 0.0])
def test_rounding_goes_to_a_neighbouring_code_for_every_random_number(p: float) -> None:
    codes = round_at_random(np.full(9, p), np.array([0, 2**-32, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1 - 2**-32]))
    assert PROBS[codes].max() >= p * (1 - 1e-12) and PROBS[codes].min() <= p * (1 + 1e-12)
    assert codes.min() >= 0 and codes.max() <= 255 and codes.max() - codes.min() <= 1


@pytest.mark.parametrize("k", [100, 1_000, 5_000])
def test_a_uniform_row_with_k_of_the_whole_vocabulary_keeps_all_of_it(k: int) -> None:
    form, ids = form_of(f"top-k:{k}", k), np.arange(k, dtype=np.uint32)
    row = selected(ids.tolist(), [1 / k] * k, k, 0.0)
    codes = from_record(to_record(quantize(row, np.random.default_rng(0).random((1, k + 1)), form), form), form)
    values, tail = weights(codes, form)
    np.testing.assert_array_equal(codes.ids[0], ids)
    assert values.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5) and tail[0] == 0
    assert np.abs(values * k - 1)[0, 1:].max() < 0.08  # the first takes what the others leave


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("00 0b 1a", [1 - e(11) - e(26), e(11), e(26)]),
        ("00 0b 0c", [e(11) / (2 * e(11) + e(12)), e(11) / (2 * e(11) + e(12)), e(12) / (2 * e(11) + e(12))]),
        ("00 01 01", [1 / 3, 1 / 3, 1 / 3]),
        ("00 ff ff", [1, 0, 0]),
    ],
)
def test_the_largest_takes_the_rest_unless_that_would_halve_it(codes: str, expected: list[float]) -> None:
    found = read(row_of(f"01 01 01  00 00 00  {codes}  03  ff"), form_of("top-k:3"))
    assert found.weights[0] == pytest.approx(expected, rel=1e-5)


HOSTILE = [
    "05 27 bb  00 01 02  00 18 00  04  3c",  # 4 head entries of 3
    "05 27 e8  00 01 03  00 18 00  02  3c",  # id 1,000 of 1,000 in the tail
    "e8 2c bc  03 01 02  00 18 00  02  3c",  # and in the head
    "05 2c ff  00 01 ff  00 18 00  00  3c",  # differences that add up to it
    "ff" * 11,  # what a lost chunk reads as
]


@pytest.mark.parametrize("record", HOSTILE)
def test_a_record_that_no_encoder_writes_is_refused(record: str) -> None:
    with pytest.raises(ValueError, match="a record holds"):
        from_record(row_of(record), form_of("threshold:3"))


FORMS = [("top-k:1", 300), ("threshold:16", 49_152), ("threshold:16", 65_536), ("random:255", 151_936),
         ("random:20:0.8", 2**24), ("top-p:0.9:300", 2**24), ("threshold:300", 2**31)]  # fmt: skip


@pytest.mark.parametrize(("text", "vocab_size"), FORMS)
@pytest.mark.parametrize("own", [False, True])
def test_any_bytes_at_all_are_refused_or_give_finite_weights(text: str, vocab_size: int, own: bool) -> None:
    form = form_of(text, vocab_size, own)
    rng = np.random.default_rng(vocab_size)
    records = rng.integers(0, 256, (300, 1, form.entries_width), np.uint8)
    records[::2, :, : form.selection.k * form.id_bytes] = 0  # so that not every one holds an id too large
    records[::4, :, -1 - form.count_bytes : -1] = 0
    read_at_all = 0
    for record in records:
        try:
            found = read(record, form)
        except ValueError:
            continue
        read_at_all += 1
        assert np.isfinite(found.weights).all() and (found.weights >= 0).all()
        assert found.ids.max() < vocab_size and not np.isnan(found.log_tail_mass).any()
    assert read_at_all > 50
