"""Plots as inline SVG: pure functions, numbers to text, for `logitstore stats` and `tools/`.

A figure carries its numbers as a table for those who cannot see it; `html_page` brings figures together. Every text
passes `escape`, because names come from other people's stores.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from logitstore.scale import Scale, number, round_step, round_ticks

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


def printable(text: object) -> str:
    """The text with what is no printable character (control, bidirectional override, lone surrogate) as U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def escape(text: object) -> str:
    """The text as it may stand in HTML or XML, between tags or in a quoted attribute."""
    return html.escape(printable(text), quote=True)


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
    x = Scale(low, high, LEFT, WIDTH - RIGHT, round_ticks(low, high, step))
    y = Scale.around([1.0, max(counts)], height - BOTTOM, TOP, least_step=1.0)
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
    across = Scale.around([point[0] for point in every], LEFT, WIDTH - RIGHT, log=x.log)
    up = Scale.around([point[1] for point in every], height - BOTTOM, top + TOP, log=y.log)
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


def _axes(x: Scale, y: Scale, across: Axis, up: Axis, height: float, *, vertical_lines: bool = True) -> str:
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
