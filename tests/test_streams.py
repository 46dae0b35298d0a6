"""A chunk of entries: its bytes spelled out by hand, any entries back as they were, and hostile bytes."""

import tracemalloc
from dataclasses import astuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.codec import Codes, Form, by_id, from_record
from logitstore.selection import Selection
from logitstore.streams import Chunk, Ranks, chunk_positions, from_parts, most_chunk_bytes, to_streams
from tests.distributions import Case, cases

Bytes = npt.NDArray[np.uint8]

RANKS = Ranks(np.array([700, 5], np.uint32), 1_000)  # ids 0..4 have ranks 2..6, 6..699 ranks 7..700, 701.. their own


def codes(ids: list[list[int]], values: list[list[int]], head_count: list[int], tail: list[int]) -> Codes:
    return Codes(np.array(ids, np.uint32), np.array(values, np.uint8), np.array(head_count, np.uint32),
                 np.array(tail, np.uint8))  # fmt: skip


THRESHOLD_3 = codes([[5, 300, 700], [2, 299, 999], [4, 700, 999]], [[0, 24, 0], [0, 0, 0], [0, 30, 40]],
                    [2, 0, 3], [60, 0, 240])  # fmt: skip
WITH_OWN = codes([[5, 300, 700], [2, 299, 999], [4, 700, 999]], [[0, 24, 62], [15, 18, 255], [0, 30, 40]],
                 [2, 0, 3], [60, 0, 240])  # fmt: skip
TOP_3 = codes([[5, 300, 700], [2, 0, 0]], [[20, 0, 24], [16, 0, 0]], [3, 1], [60, 0])
COUNTS = codes([[5, 300, 0], [2, 0, 0]], [[1, 2, 0], [3, 0, 0]], [2, 1], [255, 255])
EXPONENT = codes([[5, 300, 0], [2, 0, 0]], [[64, 80, 0], [60, 0, 0]], [2, 1], [255, 255])

HEAD_IDS = "01 80 00 06 83 / ac 61"  # ranks 1, 301 | 0, 6, 999: 1, 128 + ac | 0, 6, 128 + 3 * 256 + 61
TAIL_IDS = "00 04 80 82 / a8 3b"  # ranks 0 | 4, 300, 999: 0 | 4, 128 + a8, 128 + 2 * 256 + 3b
GOLDEN = [
    # head; largest; codes of the tails that are not; anchor - code: 60 - 24 | 240 - 30, 240 - 40; ids
    pytest.param("threshold:3", False, THRESHOLD_3, f"02 00 03 / 01 00 02 / 3c f0 / 24 d2 c8 / {HEAD_IDS} / {TAIL_IDS}",
                 id="threshold"),
    # own codes minus anchor: 62 - 60 | 15, 18, 255 - 18, as round(16 log 3) = 18
    pytest.param("threshold:3", True, WITH_OWN,
                 f"02 00 03 / 01 00 02 / 3c f0 / 24 d2 c8 / {HEAD_IDS} / 02 fd 00 ed / {TAIL_IDS}", id="own"),
    # anchors 24 and 16; by rank 700 (24), 5 (20), 300 (the largest) | 2 (16): ranks 0, 1, 301 | 4
    pytest.param("top-k:3", False, TOP_3, "03 01 / 03 00 / 3c / 18 10 / 00 04 00 / 00 01 80 04 / ac", id="top-k"),
    # no largest, no tail: anchors 2 and 3; ranks 1, 301 | 4
    pytest.param("random:3", False, COUNTS, "02 01 / 02 03 / 01 00 00 / 01 80 04 / ac", id="random"),
    pytest.param("random:3:0.8", False, EXPONENT, "02 01 / 50 3c / 10 00 00 / 01 80 04 / ac", id="exponent"),
]  # fmt: skip


def form_of(text: str, vocab_size: int = 1_000, own: bool = False) -> Form:
    return Form(Selection.parse(text), vocab_size, own)


def spelled(streams: list[Bytes]) -> str:
    return " / ".join(stream.tobytes().hex(" ") for stream in streams if len(stream))


def raw_bytes(text: str) -> Bytes:
    return np.frombuffer(bytes.fromhex(text.replace("/", "")), np.uint8)


def joined(streams: list[Bytes]) -> Bytes:
    return np.concatenate([*streams, np.zeros(3, np.uint8)])  # as in a store, zeros follow


def read(raw: Bytes, rows: int, form: Form, ranks: Ranks) -> Codes:
    return from_parts([Chunk(raw, rows, form).part(0, rows)], form, ranks)


def require_equal(found: Codes, expected: Codes) -> None:
    for a, b in zip(astuple(found), astuple(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def ranks_of(kept: Codes, vocab_size: int, common: int) -> Ranks:
    """Ranks fitted to some entries, all but `common` of them left without one of their own."""
    fitted = Ranks.fit(np.bincount(kept.ids.ravel(), minlength=vocab_size))
    return Ranks(fitted.common[:common], vocab_size)


@pytest.mark.parametrize(("selection", "own", "kept", "golden"), GOLDEN)
def test_a_chunk_is_the_golden_bytes(selection: str, own: bool, kept: Codes, golden: str) -> None:
    assert spelled(to_streams(kept, form_of(selection, own=own), RANKS.table())) == golden


@pytest.mark.parametrize(("selection", "own", "kept", "golden"), GOLDEN)
def test_golden_bytes_are_read_as_the_entries_that_they_stand_for(
    selection: str, own: bool, kept: Codes, golden: str
) -> None:
    require_equal(read(raw_bytes(golden), len(kept.tail), form_of(selection, own=own), RANKS), kept)


def test_numbers_of_entries_take_two_byte_planes_where_k_is_256_or_more() -> None:
    head_count, form = np.array([1, 258], np.uint32), form_of("top-k:258")
    in_head = np.arange(258) < head_count[:, None]
    ids = np.where(in_head, np.arange(258, dtype=np.uint32), np.uint32(0))
    values = np.where(in_head, 80, 0).astype(np.uint8)
    values[1, 257] = 0
    kept = Codes(ids, values, head_count, np.array([0, 90], np.uint8))
    streams = to_streams(kept, form, np.arange(1_000, dtype=np.uint32))
    assert spelled(streams[:4]) == "01 02 00 01 / 00 02 00 01 / 5a / 50 50"  # 1, 258 | 0, 258 | 90 | 80, 80
    require_equal(read(joined(streams), 2, form, Ranks(np.empty(0, np.uint32), 1_000)), kept)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_any_rows_of_any_entries_come_back_as_they_were(case: Case, data: st.DataObject) -> None:
    form, n = case.recipe.form, len(case.logits)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    for number in range(case.recipe.sets):
        kept = from_record(case.records[:, case.recipe.columns(number)], form)
        ranks = ranks_of(kept, form.vocab_size, data.draw(st.integers(0, 50)))
        streams = to_streams(kept, form, ranks.table())
        assert sum(map(len, streams)) <= most_chunk_bytes(n, form)
        chunk = Chunk(joined(streams), n, form)
        ranges = list(zip([0, *cuts], [*cuts, n], strict=True))
        require_equal(from_parts([chunk.part(*rows) for rows in ranges], form, ranks), kept)
        for start, stop in ranges:
            require_equal(from_parts([chunk.part(start, stop)], form, ranks), kept.rows(slice(start, stop)))


@pytest.mark.parametrize("vocab_size", [128, 129, 30_848, 30_849, 489_600, 489_601, 2_000_000])
def test_ids_of_any_vocabulary_come_back_and_take_no_more_than_the_most(vocab_size: int) -> None:
    form, n, rng = form_of("threshold:7", vocab_size), 50, np.random.default_rng(vocab_size)
    ids = rng.integers(0, vocab_size, (n, 7), np.uint32)
    ids[:, 3] = vocab_size - 1
    head_count = rng.integers(0, 8, n).astype(np.uint32)
    largest = np.arange(7) == head_count[:, None] - 1  # the last of the head; the tail where there is no head
    values = np.where(largest, 0, np.where(np.arange(7) < head_count[:, None], 50, 0)).astype(np.uint8)
    kept = Codes(*by_id(ids, values, head_count), head_count, np.where(head_count > 0, 90, 0).astype(np.uint8))
    ranks = Ranks(np.empty(0, np.uint32), vocab_size)
    streams = to_streams(kept, form, ranks.table())
    assert sum(map(len, streams)) <= most_chunk_bytes(n, form)
    require_equal(read(joined(streams), n, form, ranks), kept)


def damage(raw: Bytes, rng: np.random.Generator) -> Bytes:
    """The bytes with some cut off or some changed."""
    if rng.random() < 0.3:
        return raw[: rng.integers(0, len(raw) + 1)]
    damaged = raw.copy()
    at = rng.integers(0, len(raw), rng.integers(1, 4))
    damaged[at] = rng.integers(0, 256, len(at))
    return damaged


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_damaged_streams_are_refused_or_read_as_ids_of_the_vocabulary(case: Case, seed: int) -> None:
    form, rng = case.recipe.form, np.random.default_rng(seed)
    kept = from_record(case.records[:, case.recipe.columns(0)], form)
    ranks, n = ranks_of(kept, form.vocab_size, 20), len(case.logits)
    raw = joined(to_streams(kept, form, ranks.table()))
    for _ in range(20):
        try:
            found = read(damage(raw, rng), n, form, ranks)
        except ValueError:
            continue
        assert found.ids.shape == kept.ids.shape and found.ids.max() < form.vocab_size
        assert found.head_count.max() <= form.selection.k


@pytest.mark.parametrize(
    "hostile",
    [
        "04 00 03" + "/ 00" * 60,  # a head of 4 among 3
        "02 00 03 / 01 01 02 / 3c 00 f0 / 24 d2 c8",  # the largest cell of a head without entries
        f"02 00 03 / 03 00 02 / 3c f0 / 24 d2 c8 / {HEAD_IDS} / {TAIL_IDS}",  # the third of two
        f"02 00 03 / 01 00 02 / 3c f0 / 24 d2 c8 / {HEAD_IDS} / 00 04 80 82 / a8 3c",  # rank 1,000 of 1,000
        f"02 00 03 / 01 00 02 / 3c f0 / 24 d2 c8 / {HEAD_IDS} / 00 04 80 82 / a8",  # one byte too few
        "02 00 03 / 01 00 02 / 3c f0 / 24 d2 c8 / ff ff ff ff ff / ff",  # escapes without their bytes
        "",
    ],
)
def test_a_chunk_that_no_encoder_writes_is_refused(hostile: str) -> None:
    with pytest.raises(ValueError, match=r"head entries|largest cell|ends too early|holds id"):
        read(raw_bytes(hostile), 3, form_of("threshold:3"), RANKS)


@pytest.mark.parametrize("byte", [0x00, 0x10, 0x7F, 0xFF])
def test_reading_takes_memory_by_rows_and_k_whatever_the_bytes_say(byte: int) -> None:
    form, rows = form_of("threshold:16", 49_152), 2_048
    raw, ranks = np.full(most_chunk_bytes(rows, form), byte, np.uint8), Ranks(np.empty(0, np.uint32), 49_152)
    tracemalloc.start()
    try:
        read(raw, rows, form, ranks)
    except ValueError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 100 * rows * 16


def test_ranks_number_the_commonest_ids_first_and_the_others_by_rising_id() -> None:
    ranks = Ranks.fit(np.array([0, 7, 0, 9, 7]))  # ids 3, 1, 4, then those that are never stored
    assert ranks.common.tolist() == [3, 1, 4]
    assert ranks.table().tolist() == [3, 1, 4, 0, 2] and ranks.ids(np.arange(5)).tolist() == [3, 1, 4, 0, 2]
    with pytest.raises(ValueError, match="id 5 of 5"):
        ranks.ids(np.array([[0, 5]], np.uint32))


def test_no_more_than_8192_ids_have_a_rank_of_their_own() -> None:
    ranks = Ranks.fit(np.arange(10_000)[::-1] + 1)
    np.testing.assert_array_equal(ranks.common, np.arange(8_192))


@pytest.mark.parametrize("common", [[1, 1], [5], [2**32 - 1], [0, 5], [0, 1, 2, 3, 4, 4]])
def test_a_table_of_ranks_with_an_id_twice_or_beyond_the_vocabulary_is_refused(common: list[int]) -> None:
    with pytest.raises(ValueError, match="table of ranks"):
        Ranks(np.array(common, np.uint32), 5)


def test_a_chunk_has_2048_positions_or_as_many_as_four_mebibytes_hold() -> None:
    assert chunk_positions(100_000, form_of("threshold:16", 49_152)) == 2_048  # 16 * 4 + 4 bytes each
    assert chunk_positions(5, form_of("threshold:16", 49_152)) == 5
    assert most_chunk_bytes(1, form_of("top-k:1000", 2**31)) == 1_000 * 6 + 2 * 2 + 2
    assert chunk_positions(100_000, form_of("top-k:1000", 2**31)) == (4 << 20) // 6_006
    assert chunk_positions(100_000, form_of("top-k:1000000", 2**31)) == 1
