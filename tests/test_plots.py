"""Plots held against the rules of XML and HTML, and against places worked out by hand."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from logitstore.figure import STYLE, Figure, escape
from logitstore.plots import Axis, Series, bars, chart, histogram

HOSTILE = "</title></svg><script>alert(1)</script>\" onload='x' \x00\x1b[2J\u202e\ud800&amp;"
VOID = {"meta"}


class Parsed(HTMLParser):
    """A page's tags, each closed by its own end, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def assert_harmless(self) -> None:
        """No script, no handler, and nothing that lies elsewhere."""
        for tag, attributes in self.tags:
            assert tag not in {"script", "link", "img", "iframe", "object", "a", "base", "form", "foreignobject"}
            assert not any(name.startswith("on") or name in {"href", "src", "xlink:href"} for name in attributes)


def svgs(text: str) -> list[ET.Element]:
    """Every plot of a page, read as XML."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]


def assert_good(text: str) -> None:
    """What holds for every page and plot."""
    Parsed(text).assert_harmless()
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert re.search(r"\b(nan|NaN|inf|Infinity|None)\b", text) is None
    for svg in svgs(text):
        assert svg.get("role") == "img" and svg.get("aria-label")
        _, _, width, height = map(float, str(svg.get("viewBox")).split())
        for element in svg.iter():
            for name in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy", "width", "height"):
                most = width if name in {"x", "x1", "x2", "cx", "width"} else height
                assert 0 <= float(element.get(name, 0)) <= most, ET.tostring(element)


def every_figure(text: str = "name") -> list[Figure]:
    log = Axis(text, text, log=True)
    points = [(1.0, 2.0), (10.0, 0.3), (1000.0, 0.004)]
    return [
        histogram([0, 0.5, 1, 1.5], [3, 0, 900], text, text, of=text, mean=1.2),
        bars([(text, 3.0, text), ("none", 0.0, "0")], text, text),
        chart([Series(text, points, [text] * 3), Series(text, points, guide=True)], text, log, log),
    ]


def test_escaped_text_reads_back_as_it_was() -> None:
    text = "a<b> & \"c\" 'd' &lt; é 語"
    assert ET.fromstring(f'<p t="{escape(text)}">{escape(text)}</p>').attrib["t"] == text
    assert escape("a\nb\x7f") == "a\ufffdb\ufffd"


@pytest.mark.parametrize("which", range(3))
def test_a_figure_of_its_own_is_xml_with_title_and_style(which: int) -> None:
    figure = every_figure()[which]
    root = ET.fromstring(figure.document())
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and root.findtext(f"{space}style") == STYLE
    assert figure.title in [text.text for text in root.iter(f"{space}text")]


def test_bars_of_a_histogram_are_as_high_as_their_counts_and_lie_between_their_edges() -> None:
    (svg,) = svgs(histogram([0, 1, 2, 3, 4], [10, 0, 20, 5], "t", "u").svg())
    rects = list(svg.iter("rect"))
    heights, lefts = ([float(rect.attrib[name]) for rect in rects] for name in ("height", "x"))
    assert heights == pytest.approx([heights[1] / 2, heights[1], heights[1] / 4])
    assert lefts[1] - lefts[0] == pytest.approx(2 * (lefts[2] - lefts[1]), abs=0.02)  # bin 1 is empty
    assert [rect.findtext("title") for rect in rects][1] == "2 to 3 u: 20 positions, 57.14%"


def test_a_bar_that_is_there_is_seen() -> None:
    (svg,) = svgs(histogram([0, 1, 2], [1, 10**9], "t", "u").svg())
    assert min(float(rect.attrib["height"]) for rect in svg.iter("rect")) == 1


def test_a_histogram_of_whole_numbers_names_them() -> None:
    figure = histogram([-0.5, 0.5, 1.5, 2.5], [1, 0, 3], "t", "entries")
    assert figure.table.rows == (("0", "1", "25.00%"), ("2", "3", "75.00%"))
    ticks = [text.text for text in next(iter(svgs(figure.svg()))).iter("text")]
    assert {"0", "1", "2"} <= set(ticks) and "0.5" not in ticks


def test_equal_factors_are_equally_far_on_a_logarithmic_axis() -> None:
    log = Axis("n", log=True)
    (svg,) = svgs(chart([Series("s", [(10, 100), (100, 10), (1000, 1)])], "t", log, log).svg())
    xs, ys = ([float(dot.attrib[name]) for dot in svg.iter("circle")] for name in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.15)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.15) and ys[0] < ys[1]


def test_points_without_a_place_on_an_axis_are_left_out() -> None:
    log = Axis("n", log=True)
    points = [(0.0, 1.0), (-1.0, 1.0), (1.0, math.nan), (1.0, math.inf), (2.0, 3.0)]
    figure = chart([Series("s", points)], "t", log, Axis("y"))
    assert figure.table.rows == (("s", "2", "3"),) and "s: 3 at 2" in figure.description
    assert_good(figure.html())


def test_labels_do_not_lie_on_each_other() -> None:
    points = [(20.0 + i, 1.0) for i in range(3)]
    labels = ["threshold:8", "threshold:12", "threshold:16"]
    series = [Series("s", [*points, (90.0, 1.0)], [*labels, "far"], joined=False)]
    (svg,) = svgs(chart(series, "t", Axis("x"), Axis("y")).svg())
    placed = [t for t in svg.iter("text") if t.text in labels]
    assert len({(t.attrib["y"], t.attrib["text-anchor"]) for t in placed}) == 3


def test_a_bar_is_as_long_as_its_value_and_a_long_name_is_cut_but_told() -> None:
    figure = bars([("a" * 200, 4.0, "4 bytes"), ("b", 1.0, "1 byte"), ("c", 0.0, "0 bytes")], "t", "bytes")
    (svg,) = svgs(figure.svg())
    filled = [float(rect.attrib["width"]) for rect in svg.iter("rect") if rect.attrib["class"] == "f0"]
    assert filled == pytest.approx([filled[0], filled[0] / 4], abs=0.1)
    assert next(svg.iter("text")).text == "a" * 49 + "…" and figure.table.rows[0][0] == "a" * 200


EXTREMES: list[Callable[[], Figure]] = [
    lambda: histogram([0, 1], [0], "t", "u"),
    lambda: histogram([0, 0.02], [1], "t", "u", mean=0.0),
    lambda: histogram([-16, -15.75, -15.5], [10**15, 1], "t", "u", mean=-15.9),
    lambda: histogram([i - 0.5 for i in range(1001)], [0] * 999 + [1], "t", "u"),
    lambda: histogram([0, 1], [1], "t", "u", mean=math.nan),
    lambda: bars([], "t", "u"),
    lambda: bars([("a", 0.0, "nothing")], "t", "u"),
    lambda: chart([], "t", Axis("x"), Axis("y", log=True)),
    lambda: chart([Series("s", [])], "t", Axis("x", log=True), Axis("y")),
    lambda: chart([Series("s", [(0.0, 0.0)])], "t", Axis("x"), Axis("y")),
    lambda: chart([Series("s", [(1.0, 1.0)])], "t", Axis("x", log=True), Axis("y", log=True)),
    lambda: chart([Series("s", [(-3.0, -5.0), (-3.0, -5.0)])], "t", Axis("x"), Axis("y")),
    lambda: chart([Series("s", [(1e-299, 1e-200), (1e299, 1e200)])], "t", Axis("x", log=True), Axis("y", log=True)),
    lambda: chart([Series("s", [(1e-299, 1e299), (1e-290, -1e299)])], "t", Axis("x"), Axis("y")),
    lambda: chart([Series(f"series {i}", [(i, i)], ["label"]) for i in range(12)], "t", Axis("x"), Axis("y")),
]


@pytest.mark.parametrize("made", EXTREMES, ids=range(len(EXTREMES)))
def test_extreme_data_gives_a_plot(made: Callable[[], Figure]) -> None:
    assert_good(made().html())
