"""What `stats` found, shown: JSON without NaN, text within its columns, pages that ask nobody for anything."""

import json
from typing import Any

import numpy as np
import pytest

from logitstore.stats import collect
from logitstore.stats_report import to_html, to_json, to_text
from logitstore.targets import SparseTargets
from tests.test_plots import HOSTILE, Parsed, assert_good, svgs
from tests.test_stats import DOCUMENTS, EXTREMES, FIDELITY, document, stats


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
