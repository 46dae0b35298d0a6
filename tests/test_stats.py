"""Stats of targets made by hand, held against `numpy.histogram` and plain loops over all of them at once."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.fidelity import Fidelity
from logitstore.stats import (
    ENTROPY_EDGES,
    LABEL_LOG_PROB_EDGES,
    TAIL_MASS_EDGES,
    StoreStats,
    collect,
    to_html,
    to_json,
    to_text,
)
from logitstore.targets import SparseTargets
from tests.test_plots import HOSTILE, Parsed, assert_good, svgs

Document = tuple[npt.NDArray[np.int32], SparseTargets]
PLANES = {"records": 600, "token_ids": 150, "index": 50}
FIDELITY = Fidelity(336, 0.0018, 0.0131, 0.8125, 2e-4, ((4, 60.0), (16, 30.0), (64, 15.0), (336, 6.5))).to_json()


def document(length: int, k: int = 5, seed: int = 0) -> Document:
    """A document of random targets, on and between the edges of bins."""
    rng = np.random.default_rng(seed)
    n = length - 1
    head = rng.integers(0, k + 1, n)
    weights = np.where(np.arange(k) < rng.integers(head, k + 1)[:, None], 0.125, 0)
    with np.errstate(divide="ignore"):
        log_tail_mass = np.log(rng.integers(0, 51, n) / 50)
    targets = SparseTargets(
        positions=np.arange(n, dtype=np.int32),
        ids=rng.random((n, 20)).argsort(axis=1)[:, :k].astype(np.uint32),
        weights=weights.astype(np.float32),
        head_count=head.astype(np.int32),
        log_tail_mass=log_tail_mass.astype(np.float32),
        label_log_prob=(-rng.integers(0, 255, n) / 16).astype(np.float32),
        entropy=(rng.integers(0, 256, n) / 16).astype(np.float32),
    )
    return rng.integers(0, 20, length).astype(np.int32), targets


DOCUMENTS = [document(length, seed=length) for length in (2, 3, 9, 40, 100, 188)]


def stats(documents: list[Document] = DOCUMENTS, **options: Any) -> StoreStats:
    return collect(iter(documents), PLANES, **options)


def joined(name: str) -> npt.NDArray[Any]:
    return np.concatenate([getattr(targets, name) for _, targets in DOCUMENTS])


def test_counts_are_those_of_numpy_histogram() -> None:
    found = stats()
    entries = (joined("weights") > 0).sum(axis=1)
    for histogram, values, edges in (
        (found.entropy, joined("entropy"), ENTROPY_EDGES),
        (found.tail_mass, np.exp(joined("log_tail_mass").astype(np.float64)), TAIL_MASS_EDGES),
        (found.label_log_prob, joined("label_log_prob"), LABEL_LOG_PROB_EDGES),
        (found.head_entries, joined("head_count"), np.arange(7) - 0.5),
        (found.entries, entries, np.arange(7) - 0.5),
    ):
        assert histogram.edges == tuple(edges)
        assert histogram.counts == tuple(np.histogram(values, edges)[0])
        assert histogram.mean == pytest.approx(values.mean(dtype=np.float64))


def test_edges_are_the_documented_ones() -> None:
    assert (ENTROPY_EDGES[0], ENTROPY_EDGES[-1], set(np.diff(ENTROPY_EDGES))) == (0, 16, {0.25})
    assert (LABEL_LOG_PROB_EDGES[0], LABEL_LOG_PROB_EDGES[-1], set(np.diff(LABEL_LOG_PROB_EDGES))) == (-16, 0, {0.25})
    assert TAIL_MASS_EDGES.tolist() == [float(f"{i * 0.02:.2f}") for i in range(51)]


def test_perplexity_and_stored_labels_are_those_of_a_loop_over_all_positions() -> None:
    found, in_head, in_tail = stats(), 0, 0
    for token_ids, targets in DOCUMENTS:
        for t in range(len(targets)):
            slots = [s for s in range(5) if targets.ids[t, s] == token_ids[t + 1] and targets.weights[t, s] > 0]
            in_head += any(s < targets.head_count[t] for s in slots)
            in_tail += any(s >= targets.head_count[t] for s in slots)
    assert in_head > 10 and in_tail > 10
    assert (found.label_in_head, found.label_in_tail) == (in_head / found.positions, in_tail / found.positions)
    assert found.teacher_perplexity == pytest.approx(np.exp(-joined("label_log_prob").mean(dtype=np.float64)))


def test_a_label_belongs_to_the_position_that_the_targets_name() -> None:
    token_ids, targets = np.array([1, 2, 3, 4], np.int32), document(2)[1]
    targets.positions[:], targets.ids[:], targets.weights[:], targets.head_count[:] = 2, [[4, 0, 0, 0, 0]], 0.2, 1
    assert stats([(token_ids, targets)]).label_in_head == 1
    targets.ids[0, 0] = 2  # what follows another position
    assert stats([(token_ids, targets)]).label_in_head == 0
    targets.ids[0, 0], targets.weights[0, 0] = 4, 0  # an empty entry stores nothing
    assert stats([(token_ids, targets)]).label_in_head == 0


def test_documents_positions_and_lengths() -> None:
    found = stats()
    assert (found.documents, found.positions, found.shortest, found.longest) == (6, 336, 2, 188)
    assert found.lengths == (0, 0, 2, 0, 1, 0, 1, 1, 1)  # 2 and 3, 9, 40, 100, 188
    assert found.median_between == (8, 63)  # true: between 9 and 40


@pytest.mark.parametrize("lengths", [[7], [2, 2, 300], [5, 6], [2, 1000], [3, 4, 4, 1023], [64, 65, 127]])
def test_the_median_lies_where_it_is_said_to_lie(lengths: list[int]) -> None:
    low, high = stats([document(n) for n in lengths]).median_between or (0, 0)
    assert low <= np.median(lengths) <= high and min(lengths) <= low and high <= max(lengths)


def test_values_beyond_the_edges_count_in_the_nearest_bin() -> None:
    token_ids, targets = document(4)
    targets.entropy[:] = [-0.5, 16.0, 99.0]
    found = stats([(token_ids, targets)])
    assert (found.entropy.counts[0], found.entropy.counts[-1]) == (1, 2)


def test_a_document_with_more_entries_widens_the_histogram() -> None:
    found = stats([document(30, k=3), document(30, k=8, seed=1)])
    heads = np.concatenate([document(30, k=3)[1].head_count, document(30, k=8, seed=1)[1].head_count])
    assert found.head_entries.counts == tuple(np.histogram(heads, np.arange(10) - 0.5)[0])


def test_documents_are_gone_through_once_and_not_kept() -> None:
    alive: list[int] = []

    def watched() -> Any:
        for number in range(50):
            token_ids, targets = document(20, seed=number)
            alive.append(number)
            yield token_ids, targets

    assert collect(watched(), PLANES).documents == 50 and alive == list(range(50))


def test_json_has_no_nan_and_says_bytes_per_token() -> None:
    found = json.loads(json.dumps(to_json(stats(fidelity=FIDELITY, about={"teacher": "tiny"})), allow_nan=False))
    assert found["disk_bytes"] == 800 and found["bytes_per_token"] == 800 / 336
    assert found["planes"]["token_ids"] == {"bytes": 150, "bytes_per_token": 150 / 336}
    assert found["fidelity"] == json.loads(json.dumps(FIDELITY)) and found["about"] == {"teacher": "tiny"}
    assert sum(found["histograms"]["entropy"]["counts"]) == 336


def test_text_is_a_table_and_histograms_no_wider_than_100_columns() -> None:
    text = to_text(stats([*DOCUMENTS, document(9, k=500 % 20), document(9, k=19)], fidelity=FIDELITY))
    assert max(map(len, text.splitlines())) <= 100
    assert "token_ids    150       0.43   18.8%" in text and "angle           6.5  degrees over 336 positions" in text
    assert "Entropy, nats (mean " in text and "█" in text


def test_a_histogram_of_blocks_is_as_high_as_its_counts() -> None:
    token_ids, targets = document(13)
    targets.entropy[:] = [0] * 8 + [8.0] * 3 + [15.9]
    lines = to_text(stats([(token_ids, targets)])).splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("Entropy, nats")) + 1
    columns = [
        "".join(line.partition("│")[2].ljust(64)[column] for line in lines[top : top + 4]) for column in (0, 32, 63)
    ]
    assert columns == ["████", "  ▄█", "   ▄"]  # 8, 3 and 1 of 8: 32, 12 and 4 eighths of a line
    assert "66.7%" in lines[top]


def test_a_bin_that_is_not_empty_shows_in_text() -> None:
    token_ids, targets = document(1001)
    targets.entropy[:] = [0] * 999 + [8.0]
    lines = to_text(stats([(token_ids, targets)])).splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("Entropy, nats")) + 1
    assert lines[top + 3].partition("│")[2] == "█" + " " * 31 + "▁"


def test_the_page_shows_every_plot_and_asks_nobody_for_anything() -> None:
    text = to_html(stats(fidelity=FIDELITY, name="demo.zarr", about={"teacher": "tiny", "selection": "threshold:5"}))
    assert_good(text)
    assert len(svgs(text)) == 8  # sizes, lengths, angle and five histograms
    said = Parsed(text).text
    assert "demo.zarr" in said and "teacher: tiny · selection: threshold:5" in said and "0.0131" in said


def test_a_hostile_store_stays_text() -> None:
    nested: dict[str, Any] = {HOSTILE: HOSTILE, "angles": [[1, HOSTILE], 3, [0, 1], [9, 1e999], [10**400, 5], [4, 8.0]]}
    found = collect(DOCUMENTS, {HOSTILE: 3}, nested, name=HOSTILE, about={HOSTILE: HOSTILE})
    assert_good(to_html(found))
    assert not any(c in to_text(found) for c in "\x00\x1b\u202e\ud800")
    json.dumps(to_json(found), allow_nan=False)


def zeros(length: int) -> Document:
    token_ids, t = document(length)
    flat = {name: np.zeros_like(getattr(t, name)) for name in ("ids", "weights", "head_count", "entropy")}
    return np.zeros_like(token_ids), SparseTargets(
        t.positions, log_tail_mass=np.full(length - 1, -np.inf, np.float32), label_log_prob=flat["entropy"], **flat
    )


def not_finite() -> Document:
    token_ids, targets = document(4)
    targets.entropy[0], targets.label_log_prob[:] = np.nan, -np.inf
    return token_ids, targets


EXTREMES = {
    "not finite": ([not_finite()], PLANES, None),
    "empty store": ([], {}, None),
    "empty store with files": ([], PLANES, {}),
    "one position": ([document(2)], PLANES, FIDELITY),
    "one document": ([document(60)], PLANES, {"angles": [[60, 0.0]], "kl_floor": math.nan}),
    "no position": ([document(1)], PLANES, {"angles": "none", "kl_floor": math.inf}),
    "all zeros": ([zeros(30), zeros(2)], {"records": 0}, {"angles": [[1, 0.0], [2, 0.0]], "kl_floor": 0.0}),
    "many entries": ([document(9, k=19), document(3, k=1)], PLANES, None),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_stores_have_a_page_without_nan(name: str) -> None:
    documents, planes, fidelity = EXTREMES[name]
    found = collect(documents, planes, fidelity)
    assert_good(to_html(found))
    text = to_text(found)
    assert max(map(len, text.splitlines())) <= 100 and "nan" not in text and "inf" not in text
    json.dumps(to_json(found), allow_nan=False)


def test_more_bins_than_columns_are_drawn_together() -> None:
    token_ids, targets = document(3)
    wide = np.zeros((2, 1000))
    targets = SparseTargets(
        targets.positions,
        (wide + np.arange(1000)).astype(np.uint32),
        (wide + 1e-3).astype(np.float32),
        np.array([0, 1000], np.int32),
        targets.log_tail_mass,
        targets.label_log_prob,
        targets.entropy,
    )
    lines = to_text(stats([(token_ids, targets)])).splitlines()
    assert max(map(len, lines)) <= 100
    row = lines[lines.index("Head entries, entries kept exactly (mean 500)") + 1].partition("│")[2]
    assert row[0] == row[-1] == "█" and set(row[1:-1]) == {" "}
