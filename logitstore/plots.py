"""Plots as inline SVG: pure functions, numbers to a `figure.Figure`, for `logitstore stats` and `tools/`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from logitstore.figure import SERIES, WIDTH, Figure, Table, escape, printable, svg_text
from logitstore.scale import Scale, number, round_step, round_ticks

LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 42
CHARACTER = 6.5  # mean width of a letter of the 12 px text, rather too much than too little


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
            svg_text(
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
        body.append(svg_text((LEFT + WIDTH - RIGHT) / 2, (TOP + height - BOTTOM) / 2, f"no {of}", "", "middle"))
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
            f"<g><title>{escape(f'{name}: {words}')}</title>{svg_text(left, top + 13, shown, 'ink')}"
            f"{svg_text(right, top + 13, words, '', 'end')}{_box(left, top + 19, right - left, 'track')}"
            f"{_box(left, top + 19, length, 'f0') if length else ''}</g>"
        )
    if not rows:
        body.append(svg_text(WIDTH / 2, 22, "nothing to show", "", "middle"))
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
            svg_text((LEFT + WIDTH - RIGHT) / 2, (top + TOP + height - BOTTOM) / 2, "nothing measured", "", "middle")
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
        parts.append(svg_text(x + 19, y + 4, s.name, "ink"))
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
    return svg_text(place[0], place[1], label, "ink halo", place[2])


def _axes(x: Scale, y: Scale, across: Axis, up: Axis, height: float, *, vertical_lines: bool = True) -> str:
    """Gridlines, ticks and what the axes say: y's above it, lying, so that nobody tilts the head."""
    top, bottom = y.stop, y.start
    parts = [svg_text(4, top - 14, up.label), svg_text(WIDTH - RIGHT, height - 6, across.label, "", "end")]
    for tick in y.ticks:
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(svg_text(LEFT - 7, y(tick) + 4, number(tick), "", "end"))
    for tick in x.ticks:
        if vertical_lines:
            parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(svg_text(x(tick), bottom + 17, number(tick), "", "middle"))
    return "".join((*parts, _line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")))


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _box(x: float, y: float, width: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="7" rx="2"/>'
