"""A chunk of what is kept beside the entries: its bytes by hand, any labels back as they were, and hostile bytes."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.codec import Codes, Form, from_record
from logitstore.position_streams import PositionChunk, from_streams, most_chunk_bytes, to_streams
from logitstore.selection import Selection
from logitstore.streams import Ranks
from tests.distributions import Case, cases

Bytes = npt.NDArray[np.uint8]

RANKS = Ranks(np.array([700, 5], np.uint32), 1_000)  # ids 0..4 have ranks 2..6, 6..699 ranks 7..700, 701.. their own
THRESHOLD = Codes(
    np.array([[5, 300, 700], [2, 299, 999], [4, 8, 999], [5, 300, 700]], np.uint32),
    np.array([[0, 24, 0], [0, 0, 0], [40, 30, 0], [0, 24, 0]], np.uint8),
    np.array([2, 0, 3, 2], np.uint32),
    np.array([60, 0, 240, 60], np.uint8),
)
COUNTS = Codes(
    np.array([[5, 300, 700], [2, 0, 0], [2, 0, 0], [5, 300, 0]], np.uint32),
    np.array([[1, 1, 1], [3, 0, 0], [3, 0, 0], [1, 2, 0]], np.uint8),
    np.array([3, 1, 1, 2], np.uint32),
    np.full(4, 255, np.uint8),
)
POSITION = np.array(
    [[26, 40, 0x34, 0x12], [50, 41, 0, 1], [3, 42, 0, 0], [1, 43, 0xFF, 0xFF]], np.uint8
)  # label, entropy, log Z
BESIDE = "28 29 2a 2b / 34 00 00 ff 12 01 00 ff"
GOLDEN = [
    # the second of two, 26 - 24 | the second of the tail | no entry: rank 9 | the largest, which has no code
    pytest.param("threshold:3", THRESHOLD, [300, 299, 300, 5], f"{BESIDE} / 02 02 00 01 / 02 / 32 03 01 / 80 / ad",
                 id="no entry: rank 301 = 128 + ad"),
    # the last of the tail's | ... | the third by weight: 3 - 40 | the tail's
    pytest.param("threshold:3", THRESHOLD, [700, 2, 4, 6], f"{BESIDE} / 03 01 03 00 / db / 1a 32 01 / 07", id="tail"),
    # equal counts by rising id | its first | id 0 is no entry, though zeros follow: rank 2 | 2 of 3 draws come first
    pytest.param("random:3", COUNTS, [700, 2, 0, 300], f"{BESIDE} / 03 01 00 01 / 1a 32 03 01 / 02", id="random"),
]  # fmt: skip


def form_of(text: str, vocab_size: int = 1_000) -> Form:
    return Form(Selection.parse(text), vocab_size)


def spelled(streams: list[Bytes]) -> str:
    return " / ".join(stream.tobytes().hex(" ") for stream in streams if len(stream))


def raw_bytes(text: str) -> Bytes:
    return np.frombuffer(bytes.fromhex(text.replace("/", "")), np.uint8)


@pytest.mark.parametrize(("selection", "codes", "labels", "golden"), GOLDEN)
def test_a_chunk_is_the_golden_bytes(selection: str, codes: Codes, labels: list[int], golden: str) -> None:
    streams = to_streams(POSITION, np.array(labels), codes, form_of(selection), RANKS.table())
    assert spelled(streams) == golden


@pytest.mark.parametrize(("selection", "codes", "labels", "golden"), GOLDEN)
def test_golden_bytes_are_read_as_what_they_stand_for(
    selection: str, codes: Codes, labels: list[int], golden: str
) -> None:
    position, found = from_streams(raw_bytes(golden), codes, form_of(selection), 1, RANKS)
    np.testing.assert_array_equal(position, POSITION)
    assert found.dtype == np.int32 and found.tolist() == labels


def encoded(case: Case) -> tuple[Codes, Bytes, npt.NDArray[np.int32], Ranks, list[Bytes]]:
    """First set of entries, what is kept beside it, labels (every second one an entry), ranks and streams."""
    recipe, labels = case.recipe, case.token_ids[1:].copy()
    kept = from_record(case.records[:, recipe.columns(0)], recipe.form)
    some = np.arange(0, len(labels), 2)
    labels[some] = kept.ids[some, case.token_ids[some] % recipe.selection.k]
    position = case.records[:, recipe.columns(recipe.sets)]
    ranks = Ranks.fit(np.bincount(kept.ids.ravel(), minlength=recipe.vocab_size))
    return kept, position, labels, ranks, to_streams(position, labels, kept, recipe.form, ranks.table())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_labels_and_what_is_kept_beside_any_entries_come_back_as_they_were(case: Case) -> None:
    form, log_z = case.recipe.form, len(case.recipe.log_z)
    kept, position, labels, ranks, streams = encoded(case)
    assert sum(map(len, streams)) <= most_chunk_bytes(len(labels), form, log_z)
    found, found_labels = from_streams(np.concatenate([*streams, np.zeros(3, np.uint8)]), kept, form, log_z, ranks)
    np.testing.assert_array_equal(found, position)
    np.testing.assert_array_equal(found_labels, labels)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_any_rows_of_a_chunk_are_decoded_alone(case: Case, data: st.DataObject) -> None:
    kept, position, labels, ranks, streams = encoded(case)
    form, log_z = case.recipe.form, len(case.recipe.log_z)
    head = np.arange(form.selection.k) < kept.head_count[:, None]
    largest_in_head = (head & (kept.codes == 0)).any(axis=1)
    chunk = PositionChunk(np.concatenate(streams), kept.head_count, largest_in_head, form, log_z)
    start = data.draw(st.integers(0, len(labels) - 1))
    rows = slice(start, data.draw(st.integers(start + 1, len(labels))))
    found, found_labels = chunk.part(start, kept.rows(rows), ranks)
    np.testing.assert_array_equal(found, position[rows])
    np.testing.assert_array_equal(found_labels, labels[rows])


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_damaged_streams_are_refused_or_read_as_labels_of_the_vocabulary(case: Case, seed: int) -> None:
    kept, _, _, ranks, streams = encoded(case)
    raw, rng = np.concatenate(streams), np.random.default_rng(seed)
    for _ in range(20):
        damaged = raw[: rng.integers(0, len(raw) + 1)].copy() if rng.random() < 0.3 else raw.copy()
        damaged[rng.random(len(damaged)) < 0.1] ^= 0xFF
        try:
            found, labels = from_streams(damaged, kept, case.recipe.form, len(case.recipe.log_z), ranks)
        except ValueError:
            continue
        assert found.shape == (len(kept.tail), 2 + 2 * len(case.recipe.log_z))
        assert labels.min() >= 0 and labels.max() < case.recipe.vocab_size


@pytest.mark.parametrize(
    "hostile",
    [
        f"{BESIDE} / 04 02 00 01 / 02 / 32 03 01 / 09",  # the fourth of three entries
        f"{BESIDE} / 02 02 00 01 / 02 / 32 03 01 / 83 / 68",  # rank 1,000 of 1,000
        f"{BESIDE} / 02 02 00 01 / 02 / 32 03 01",  # a rank too few
        f"{BESIDE} / 02 02",
        "28 29 2a 2b / 34 00 00 ff 12 01",
        "28 29",
        "",
    ],
)
def test_a_chunk_that_no_encoder_writes_is_refused(hostile: str) -> None:
    with pytest.raises(ValueError, match=r"a label is entry 4 of 3|ends too early|id 1000 of 1,000"):
        from_streams(raw_bytes(hostile), THRESHOLD, form_of("threshold:3"), 1, RANKS)
