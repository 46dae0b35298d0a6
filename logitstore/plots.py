"""Plots as inline SVG and a page to hold them: pure functions, numbers to text, for `logitstore stats` and `tools/`.

A figure carries its numbers as a table for those who cannot see it. A page is one file: no script, no other host, light
or dark as the reader's system is. Every text passes `escape`, because names come from other people's stores.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

WIDTH = 392  # in user units; near a phone's width in CSS pixels, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 42
CHARACTER = 6.5  # mean width of a letter of the 12 px text, rather too much than too little
SERIES = 6
STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #16191f; --muted: #5c6570; --grid: #e4e7ec; --axis: #b4bbc6;
  --c0: #2f6bd8; --c1: #d0602a; --c2: #17895d; --c3: #8450c4; --c4: #bd3558; --c5: #64707f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1216; --card: #171b21; --ink: #e8ebf0; --muted: #9aa4b1; --grid: #272d36; --axis: #4a5462;
    --c0: #6ca2f8; --c1: #ef9560; --c2: #4cc496; --c3: #b48ef0; --c4: #ee7d98; --c5: #a2adbb; } }
svg { display: block; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
svg text { fill: var(--muted); }
svg .ink { fill: var(--ink); }
svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--axis); stroke-width: 1; }
svg .mean { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
svg .track { fill: var(--grid); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .guide { fill: none; stroke: var(--muted); stroke-width: 1.25; stroke-dasharray: 2 4; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
"""
STYLE += "".join(f"svg .f{i} {{ fill: var(--c{i}); }} svg .l{i} {{ stroke: var(--c{i}); }}\n" for i in range(SERIES))
PAGE_STYLE = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3rem) clamp(1rem, 4vw, 2rem) 4rem; }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.8vw, 2.25rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0;
  text-wrap: balance; }
.subtitle { color: var(--muted); margin: 0.5rem 0 0; max-width: 46rem; }
section { margin-top: 2.5rem; }
h2 { font-size: 1.125rem; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 0.75rem; }
h2 + p { color: var(--muted); margin: -0.5rem 0 1rem; max-width: 46rem; font-size: 0.9375rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
figure, .table, dl { margin: 0 0 1rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: 0.625rem; }
.plots figure { margin: 0; }
figure { padding: 0.875rem; max-width: 36rem; min-width: 0; }
figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; font-size: 0.9375rem; line-height: 1.35; margin: 0 0 0.5rem; }
details { margin-top: 0.5rem; font-size: 0.8125rem; }
summary { color: var(--muted); cursor: pointer; width: fit-content; }
summary:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; border-radius: 2px; }
.scroll { overflow: auto; max-height: 22rem; margin-top: 0.5rem; }
.table { overflow-x: auto; padding: 0.375rem 0.875rem; font-size: 0.9375rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: 0.3125rem 0 0.3125rem 1rem; border-top: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0;
  overflow-wrap: anywhere; min-width: 7rem; }
td { white-space: nowrap; }
thead th { border-top: 0; color: var(--muted); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 400; }
.words th, .words td { text-align: left; white-space: normal; vertical-align: top; }
.words td:last-child { overflow-wrap: anywhere; min-width: 7.5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(9.5rem, 24%), 1fr)); padding: 0.25rem 0; }
dl div { padding: 0.625rem 0.875rem; }
dt { color: var(--muted); font-size: 0.8125rem; }
dd { margin: 0; font-size: 1.375rem; line-height: 1.25; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.texts { grid-template-columns: 1fr; }
.texts dd { font-size: 0.9375rem; line-height: 1.45; letter-spacing: 0; white-space: pre-wrap; }
dd small { display: block; color: var(--muted); font-size: 0.8125rem; line-height: 1.4; letter-spacing: 0; }
@media print { body { background: none; } figure, .table, dl { break-inside: avoid; } }
"""


def printable(text: object) -> str:
    """The text with what is no printable character (control, bidirectional override, lone surrogate) as U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def escape(text: object) -> str:
    """The text as it may stand in HTML or XML, between tags or in a quoted attribute."""
    return html.escape(printable(text), quote=True)


def number(value: float) -> str:
    """A number as an axis shows it: 0.25, 1,000, 20k, 5M, 2×10⁻⁶."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        digits, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return (power if digits == "1" else f"{digits}×{power}").replace("-", "−")
    for unit, suffix, since in ((1e12, "T", 1e12), (1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= since:
            return f"{value / unit:.5g}{suffix}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 1e3 and value == round(value) else f"{value:.5g}").replace("-", "−")


@dataclass(frozen=True)
class Table:
    """Rows of numbers, or of words, under a header; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    """Cells are texts: to the left, and over several lines where they are long."""

    def html(self) -> str:
        """As a <table>."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        rows = "".join(
            f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
            for first, *rest in self.rows
        )
        kind = ' class="words"' if self.words else ""
        return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True)
class Facts:
    """A few numbers that matter most: (name, value, remark)."""

    items: tuple[tuple[str, str, str], ...]

    def html(self) -> str:
        """As a <dl>."""
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
            for name, value, remark in self.items
        )
        return f"<dl>{items}</dl>"


@dataclass(frozen=True)
class Texts:
    """Passages to read, each under its name; lines stay lines."""

    items: tuple[tuple[str, str], ...]

    def html(self) -> str:
        """As a <dl>."""
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{chr(10).join(map(escape, text.splitlines()))}</dd></div>"
            for name, text in self.items
        )
        return f'<dl class="texts">{items}</dl>'


@dataclass(frozen=True)
class Figure:
    """A plot: SVG elements (`body`, already escaped) in a box of WIDTH x height, and the same in words and numbers."""

    title: str
    description: str
    height: float
    body: str
    table: Table

    def svg(self) -> str:
        """As an <svg> for a page, which brings the style."""
        return f'<svg viewBox="0 0 {WIDTH} {self.height:g}" {self._spoken()}>{self.body}</svg>'

    def html(self) -> str:
        """As a <figure> with its title, the plot and the numbers."""
        numbers = f'<details><summary>Numbers</summary><div class="scroll">{self.table.html()}</div></details>'
        return f"<figure><figcaption>{escape(self.title)}</figcaption>{self.svg()}{numbers}</figure>"

    def document(self) -> str:
        """As an SVG file of its own, for a README: title and style inside."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * self.height + 72:g}" '
            f'viewBox="0 -30 {WIDTH} {self.height + 36:g}" {self._spoken()}><style>{STYLE}</style>'
            f'<rect x="0" y="-30" width="{WIDTH}" height="{self.height + 36:g}" style="fill: var(--card)"/>'
            f"{_text(10, -10, self.title, 'title')}{self.body}</svg>\n"
        )

    def _spoken(self) -> str:
        return f'role="img" aria-label="{escape(f"{self.title}. {self.description}")}"'


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a sentence under it or none, and what it shows."""

    title: str
    content: Sequence[Figure | Table | Facts | Texts]
    remark: str = ""

    def html(self) -> str:
        """As a <section>; figures stand side by side where there is room."""
        other = "".join(
            f'<div class="table">{part.html()}</div>' if isinstance(part, Table) else part.html()
            for part in self.content
            if not isinstance(part, Figure)
        )
        plots = "".join(part.html() for part in self.content if isinstance(part, Figure))
        remark = f"<p>{escape(self.remark)}</p>" if self.remark else ""
        plots = f'<div class="plots">{plots}</div>' if plots else ""
        return f"<section><h2>{escape(self.title)}</h2>{remark}{other}{plots}</section>"


def page(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """One self-contained HTML file. Its own policy forbids scripts and whatever lies elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head>\n"
        f'<body><main><header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>\n'
        + "\n".join(section.html() for section in sections)
        + "\n</main></body></html>\n"
    )


@dataclass(frozen=True)
class Axis:
    """What an axis says: the quantity, its unit, and whether it is logarithmic."""

    title: str
    unit: str = ""
    log: bool = False

    @property
    def label(self) -> str:
        """The quantity with its unit."""
        return ", ".join(filter(None, (self.title, self.unit)))

    def shows(self, value: float) -> bool:
        """Whether the value has a place on this axis."""
        return -1e300 < value < 1e300 and (not self.log or value > 1e-300)


@dataclass(frozen=True)
class Series:
    """Points of one kind: a line, or dots alone, or a guide for the eye that is no measurement."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = field(default=())
    """Written beside the points; as many as points, or none."""
    joined: bool = True
    guide: bool = False


@dataclass(frozen=True)
class _Scale:
    """From values to user units between two ends, with ticks at round values."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, stop: float, *, log: bool = False, least_step: float = 0.0
    ) -> Self:
        """A scale between round values that hold these; a linear one holds 0 too."""
        if log:
            return cls._logarithmic(min(values, default=1.0), max(values, default=10.0), start, stop)
        low, high = min(0.0, *values, 0.0), max(values, default=1.0)
        high = high if high - low > 1e-300 else low + 1.0
        step = max(round_step(low, high), least_step)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, start, stop, round_ticks(low, high, step))

    @classmethod
    def _logarithmic(cls, low: float, high: float, start: float, stop: float) -> Self:
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        steps = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
        low = max(step for step in steps if step < low * (1 - 1e-9))
        high = min(step for step in steps if step > high * (1 + 1e-9))
        ticks = [step for step in steps if low <= step <= high]
        powers = [tick for tick in ticks if tick in map(float, (f"1e{exponent}" for exponent in exponents))]
        if len(ticks) > 7 and len(powers) > 2:
            ticks = powers[:: math.ceil(len(powers) / 7)]
        return cls(low, high, start, stop, tuple(ticks), log=True)


def round_step(low: float, high: float, most: int = 5) -> float:
    """The least 1, 2 or 5 times a power of ten that goes at most `most` times into the span."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))


def round_ticks(low: float, high: float, step: float) -> tuple[float, ...]:
    """The multiples of the step from low to high."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    title: str,
    unit: str,
    *,
    of: str = "positions",
    mean: float | None = None,
) -> Figure:
    """Bars between neighbouring edges.

    Args:
        edges: [n + 1], ascending, equally far apart. Bars of whole numbers reach from i - 1/2 to i + 1/2.
        counts: [n]; how many fell into each.
        unit: of the edges.
        of: what is counted.
        mean: marked by a line if given.
    """
    height, total = 236, sum(counts)
    low, high, width = edges[0], edges[-1], edges[1] - edges[0]
    step = max(round_step(low, high), width)
    x = _Scale(low, high, LEFT, WIDTH - RIGHT, round_ticks(low, high, step))
    y = _Scale.around([1.0, max(counts)], height - BOTTOM, TOP, least_step=1.0)
    whole = width == 1 and low % 1 == 0.5
    gap = min(1.0, (x(edges[1]) - x(low)) * 0.15)
    body, rows = [_axes(x, y, Axis(unit), Axis(of), height, vertical_lines=False)], []
    for i, count in enumerate(counts):
        if not count:
            continue
        name = f"{edges[i] + 0.5:,.0f}" if whole else f"{number(edges[i])} to {number(edges[i + 1])}"
        share = f"{count / total:.2%}"
        left, top = x(edges[i]) + gap / 2, min(y(count), y(0) - 1)  # a bar that is there is seen
        box = f'x="{left:.2f}" y="{top:.2f}" width="{x(edges[i + 1]) - left - gap / 2:.2f}" height="{y(0) - top:.2f}"'
        said = escape(f"{name} {unit}: {count:,} {of}, {share}")
        body.append(f'<rect class="f0" {box}><title>{said}</title></rect>')
        rows.append((name, f"{count:,}", share))
    if mean is not None and low <= mean <= high:
        side = "start" if mean < (low + high) / 2 else "end"
        body.append(_line(x(mean), TOP - 8, x(mean), y(0), "mean"))
        body.append(
            _text(
                x(mean) + (5 if side == "start" else -5),
                TOP - 2,
                f"mean {mean:.3g}".replace("-", "−"),
                "ink halo",
                side,
            )
        )
    if total:
        peak = max(zip(counts, range(len(counts)), strict=True), key=lambda pair: pair[0])[1]
        where = f"{number(edges[peak])} to {number(edges[peak + 1])}" if not whole else f"{edges[peak] + 0.5:,.0f}"
        description = f"Histogram of {total:,} {of}; most lie at {where} {unit}".strip()
    else:
        description = f"Histogram of no {of}"
        body.append(_text((LEFT + WIDTH - RIGHT) / 2, (TOP + height - BOTTOM) / 2, f"no {of}", "", "middle"))
    return Figure(title, description, height, "".join(body), Table((unit or "value", of, "share"), tuple(rows)))


def bars(rows: Sequence[tuple[str, float, str]], title: str, unit: str) -> Figure:
    """Horizontal bars, one under the other, in the order given.

    Args:
        rows: (name, value >= 0, the value in words as the bar shows it).
        unit: of the values, for the table.
    """
    pitch, left, right = 36, 2, WIDTH - 2
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    body = []
    for i, (name, value, words) in enumerate(rows):
        top, room = i * pitch, int((right - left) / CHARACTER) - len(words) - 2
        shown = printable(name)
        shown = shown if len(shown) <= room else shown[: max(room - 1, 1)] + "…"
        length = max((right - left) * value / most, 2.0 if value else 0.0)
        body.append(
            f"<g><title>{escape(f'{name}: {words}')}</title>{_text(left, top + 13, shown, 'ink')}"
            f"{_text(right, top + 13, words, '', 'end')}{_box(left, top + 19, right - left, 'track')}"
            f"{_box(left, top + 19, length, 'f0') if length else ''}</g>"
        )
    if not rows:
        body.append(_text(WIDTH / 2, 22, "nothing to show", "", "middle"))
    named = "; ".join(f"{name}: {words}" for name, _, words in rows)
    table = Table(("", unit, "in words"), tuple((name, f"{value:,.12g}", words) for name, value, words in rows))
    return Figure(title, named or "No bars", max(len(rows), 1) * pitch, "".join(body), table)


def chart(series: Sequence[Series], title: str, x: Axis, y: Axis) -> Figure:
    """Lines or dots over two axes, each linear or logarithmic. Points that have no place on an axis are left out."""
    shown = [
        [
            (*point, label)
            for point, label in zip(s.points, s.labels or [""] * len(s.points), strict=True)
            if x.shows(point[0]) and y.shows(point[1])
        ]
        for s in series
    ]
    every = [point for points in shown for point in points]
    legend, top = _legend(series) if len(series) > 1 else ("", 0.0)
    height = 276 + top
    across = _Scale.around([point[0] for point in every], LEFT, WIDTH - RIGHT, log=x.log)
    up = _Scale.around([point[1] for point in every], height - BOTTOM, top + TOP, log=y.log)
    body = [legend, _axes(across, up, x, y, height)]
    taken = [(across(a) - 4, up(b) - 4, across(a) + 4, up(b) + 4) for a, b, _ in every]
    for i, (s, points) in enumerate(zip(series, shown, strict=True)):
        places = [(across(a), up(b)) for a, b, _ in points]
        if (s.joined or s.guide) and len(places) > 1:
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            body.append(f'<path class="{"guide" if s.guide else f"line l{i % SERIES}"}" d="{path}"/>')
        if s.guide:
            continue
        radius = 4.5 if not s.joined else 3 if len(places) <= 20 else 2
        for (a, b), (left, high, label) in zip(places, points, strict=True):
            said = escape(
                f"{label or s.name}: {number(high)} {y.unit or y.title} at {number(left)} {x.unit or x.title}"
            )
            dot = f'<circle class="f{i % SERIES}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}">'
            body.append(f"{dot}<title>{said}</title></circle>")
    for points in shown:
        body += [_beside(across(a), up(b), label, taken) for a, b, label in points if label]
    if not every:
        body.append(
            _text((LEFT + WIDTH - RIGHT) / 2, (top + TOP + height - BOTTOM) / 2, "nothing measured", "", "middle")
        )
    measured = [(s, points) for s, points in zip(series, shown, strict=True) if not s.guide]
    rows = tuple((label or s.name, f"{a:,.6g}", f"{b:,.6g}") for s, points in measured for a, b, label in points)
    named = "; ".join(f"{s.name}: {_course(points)}" for s, points in measured)
    description = f"{y.label} against {x.label}. {named}"
    return Figure(title, description, height, "".join(body), Table(("", x.label, y.label), rows))


def _course(points: Sequence[tuple[float, float, str]]) -> str:
    """Points in words: how many, the first and the last."""
    if not points:
        return "no points"
    (first_x, first_y, _), (last_x, last_y, _) = points[0], points[-1]
    ends = f"{first_y:.4g} at {first_x:,.4g}"
    return ends if len(points) == 1 else f"{len(points)} points, from {ends} to {last_y:.4g} at {last_x:,.4g}"


def _legend(series: Sequence[Series]) -> tuple[str, float]:
    """Swatches and names above the axes, in as many rows as they need; and the height of that."""
    parts, x, row = [], 4.0, 0
    for i, s in enumerate(series):
        width = 26 + CHARACTER * len(printable(s.name))
        if x > 4 and x + width > WIDTH:
            x, row = 4.0, row + 1
        y = 10.0 + 17 * row
        if s.guide:
            parts.append(_line(x, y, x + 14, y, "guide"))
        elif s.joined:
            parts.append(_line(x, y, x + 14, y, f"line l{i % SERIES}"))
        else:
            parts.append(f'<circle class="f{i % SERIES}" cx="{x + 7:.1f}" cy="{y:g}" r="4.5"/>')
        parts.append(_text(x + 19, y + 4, s.name, "ink"))
        x += width + 10
    return "".join(parts), 17.0 * (row + 1) + 4


def _beside(x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]) -> str:
    """The label at the first side of the point where it covers nothing; notes the place as taken."""
    width = CHARACTER * len(printable(label))
    places = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle")]
    places += [(x + 8, y + 4 + shift, "start") for shift in (-12, 12)] + [(x - 8, y + 4 - 12, "end")]

    def box(place: tuple[float, float, str]) -> tuple[float, float, float, float]:
        left = place[0] - {"start": 0.0, "middle": width / 2, "end": width}[place[2]]
        return left, place[1] - 9, left + width, place[1] + 2

    def is_free(place: tuple[float, float, str]) -> bool:
        left, top, right, bottom = box(place)
        crossed = any(left < r and right > a and top < d and bottom > b for a, b, r, d in taken)
        return left > LEFT and right < WIDTH and not crossed

    inside = [place for place in places if box(place)[0] > LEFT and box(place)[2] < WIDTH]
    place = next(filter(is_free, places), (inside or places)[0])
    taken.append(box(place))
    return _text(place[0], place[1], label, "ink halo", place[2])


def _axes(x: _Scale, y: _Scale, across: Axis, up: Axis, height: float, *, vertical_lines: bool = True) -> str:
    """Gridlines, ticks and what the axes say: y's above it, lying, so that nobody tilts the head."""
    top, bottom = y.stop, y.start
    parts = [_text(4, top - 14, up.label), _text(WIDTH - RIGHT, height - 6, across.label, "", "end")]
    for tick in y.ticks:
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_text(LEFT - 7, y(tick) + 4, number(tick), "", "end"))
    for tick in x.ticks:
        if vertical_lines:
            parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(_text(x(tick), bottom + 17, number(tick), "", "middle"))
    return "".join((*parts, _line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")))


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _box(x: float, y: float, width: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="7" rx="2"/>'
