"""What `stats` collected, as JSON, as text for a terminal and as a page with plots: for `logitstore stats`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitstore import plots
from logitstore.figure import Figure, printable
from logitstore.html_page import Facts, Section, page
from logitstore.plots import Axis, Series
from logitstore.stats import Histogram, StoreStats, ratio, span

MEASURES = {
    "kl_floor": ("KL floor", "nats"),
    "head_l1": ("head L1", "mean over positions"),
    "kept_mass": ("kept mass", "of the teacher's probability"),
    "weight_sum_error": ("weight sums", "from 1 at most"),
    "positions": ("measured on", "positions"),
}
"""Names and units of what `logitstore.fidelity` measures."""
COLUMNS = 80  # of a histogram in a terminal, beside 12 for its axis
ROWS = 4


def to_json(stats: StoreStats) -> dict[str, Any]:
    """Everything as JSON values; what is not known is null, never NaN."""
    names = ("entropy", "tail_mass", "label_log_prob", "head_entries", "entries")
    planes = {
        plane: {"bytes": size, "bytes_per_token": stats.per_token(size)} for plane, size in stats.plane_bytes.items()
    }
    return {
        "store": stats.name,
        "about": dict(stats.about),
        "documents": stats.documents,
        "positions": stats.positions,
        "document_tokens": {
            "min": stats.shortest,
            "median_between": stats.median_between and list(stats.median_between),
            "max": stats.longest,
            "by_powers_of_two": list(stats.lengths),
        },
        "disk_bytes": stats.disk_bytes,
        "bytes_per_token": stats.per_token(stats.disk_bytes),
        "planes": planes,
        "teacher_perplexity": stats.teacher_perplexity,
        "label_in_head": stats.label_in_head,
        "label_in_tail": stats.label_in_tail,
        "histograms": {
            name: {"unit": h.unit, "mean": h.mean, "edges": list(h.edges), "counts": list(h.counts)}
            for name, h in zip(names, stats.histograms, strict=True)
        },
        "fidelity": stats.fidelity,
    }


def to_text(stats: StoreStats) -> str:
    """The same for a terminal, 100 columns wide at most."""
    lines = [printable(stats.name), *(f"{name}: {value}" for name, value in stats.about.items()), ""]
    lines += _aligned([fact for fact in _facts(stats) if fact[0] != "on disk"], left_from=2)
    rows = [
        (plane, f"{size:,}", _or_dash(per_token, ",.2f"), share) for plane, size, per_token, share in _planes(stats)
    ]
    lines += ["", *_aligned([("on disk", "bytes", "per token", "share"), *rows])]
    if stats.fidelity is not None:
        angles = [
            ("angle", f"{degrees:.3g}", f"degrees over {n:,g} positions") for n, degrees in _angles(stats.fidelity)
        ]
        lines += ["", "fidelity: stored against the teacher's full distribution"]
        lines += _aligned([*_measured(stats.fidelity), *angles], left_from=2)
    for histogram in stats.histograms:
        lines += ["", *_drawn(histogram)]
    return "\n".join(_cut(line.rstrip(), 100) for line in lines)


def to_html(stats: StoreStats) -> str:
    """The same as one page with plots, which needs nothing but itself."""
    sections = [Section("What it holds", [Facts(tuple(_facts(stats)))])]
    sizes = [
        (plane, float(size), _size(size) + ("" if per_token is None else f" · {per_token:,.2f} bytes per token"))
        for plane, size, per_token, _ in _planes(stats)[:-1]
    ]
    sections.append(
        Section(
            "Size",
            [
                plots.bars(sizes, "Bytes on disk by plane", "bytes"),
                plots.bars(_length_rows(stats), "Documents by length", "documents"),
            ],
            "Everything on disk counts. A token is a position: a document of L tokens has L − 1.",
        )
    )
    if stats.fidelity is not None:
        sections.append(_fidelity_section(stats.fidelity))
    figures = [plots.histogram(h.edges, h.counts, h.title, h.unit, mean=h.mean) for h in stats.histograms]
    remark = "Entropy and label log-prob are the teacher's at temperature 1. A bin holds its lower edge."
    sections.append(Section("Position by position", figures, remark))
    subtitle = " · ".join(f"{name}: {value}" for name, value in stats.about.items())
    return page(stats.name, subtitle, sections)


def _fidelity_section(fidelity: Mapping[str, Any]) -> Section:
    positions = fidelity.get("positions")
    sample = f"{positions:,} positions of a sample" if isinstance(positions, int) else "a sample"
    measured = _measured({name: value for name, value in fidelity.items() if name != "positions"})
    content: list[Figure | Facts] = [Facts(tuple(measured))] if measured else []
    if angles := _angles(fidelity):
        first, degrees = angles[0]
        series = [Series("measured", angles)]
        if len(angles) > 1:
            series.append(
                Series("1/√positions: no bias", [(n, degrees * math.sqrt(first / n)) for n, _ in angles], guide=True)
            )
        x, y = Axis("positions", log=True), Axis("angle", "degrees", log=True)
        content.append(plots.chart(series, "Angle to the gradient of the full distribution", x, y))
    return Section("Fidelity", content, f"What is stored, against the teacher's full distribution, on {sample}.")


def _facts(stats: StoreStats) -> list[tuple[str, str, str]]:
    """What matters most: (name, value, remark)."""
    lengths = "none yet"
    if stats.median_between is not None:
        low, high = stats.median_between
        median = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lengths = f"{stats.shortest:,} to {stats.longest:,} tokens, median {median}"
    stored = None
    if stats.label_in_head is not None and stats.label_in_tail is not None:
        stored = stats.label_in_head + stats.label_in_tail
    shares = f"in the head {_or_dash(stats.label_in_head, '.1%')}, in the tail {_or_dash(stats.label_in_tail, '.1%')}"
    kept = f"of them {_or_dash(stats.head_entries.mean, '.1f')} in the head"
    return [
        ("documents", f"{stats.documents:,}", lengths),
        ("positions", f"{stats.positions:,}", "one for each token but a document's first"),
        ("on disk", _size(stats.disk_bytes), f"{_or_dash(stats.per_token(stats.disk_bytes), '.2f')} bytes per token"),
        ("perplexity", _or_dash(stats.teacher_perplexity, ",.2f"), "of the teacher on the stored labels"),
        ("entropy", _or_dash(stats.entropy.mean, ".2f"), "nats on average"),
        ("label stored", _or_dash(stored, ".1%"), shares),
        ("entries", _or_dash(stats.entries.mean, ".1f"), kept),
        ("tail mass", _or_dash(stats.tail_mass.mean, ".3f"), "outside the head on average"),
    ]


def _planes(stats: StoreStats) -> list[tuple[str, int, float | None, str]]:
    """(plane, bytes, bytes per token, share), the sum last."""
    every = [*stats.plane_bytes.items(), ("total", stats.disk_bytes)]
    return [
        (plane, size, stats.per_token(size), _or_dash(ratio(size, stats.disk_bytes), ".1%")) for plane, size in every
    ]


def _length_rows(stats: StoreStats) -> list[tuple[str, float, str]]:
    """Documents by powers of two of their length, from the shortest on."""
    rows: list[tuple[str, float, str]] = []
    for bits, count in enumerate(stats.lengths):
        if count or rows:
            low, high = span(bits)
            tokens = f"{low:,} to {high:,} tokens" if low < high else f"{low} tokens"
            rows.append((tokens, float(count), f"{count:,} · {count / stats.documents:.1%}"))
    return rows


def _measured(fidelity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers of a measurement: (name, value, unit)."""
    rows: list[tuple[str, str, str]] = []
    for key, value in fidelity.items():
        name, unit = MEASURES.get(key, (key.replace("_", " "), ""))
        match value:
            case bool() | str():
                rows.append((name, str(value), unit))
            case int():
                rows.append((name, f"{value:,}", unit))
            case float():
                rows.append((name, f"{value:.3g}", unit))
    return rows


def _angles(fidelity: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The [positions, degrees] of a measurement, those that are such."""
    points: list[tuple[float, float]] = []
    angles = fidelity.get("angles")
    for point in angles if isinstance(angles, list) else ():
        match point:
            case [int() | float() as n, int() | float() as degrees] if 0 < n < 1e18 and 0 <= degrees <= 180:
                points.append((float(n), float(degrees)))
    return sorted(points)


def _drawn(histogram: Histogram) -> list[str]:
    """A histogram of block characters, its axis below."""
    mean = "" if histogram.mean is None else f" (mean {histogram.mean:.3g})"
    title = f"{histogram.title}, {histogram.unit}{mean}"
    total = sum(histogram.counts)
    if not total:
        return [title, "  no positions"]
    together = -(-len(histogram.counts) // COLUMNS)
    padded = np.pad(histogram.counts, (0, -len(histogram.counts) % together))
    counts = padded.reshape(-1, together).sum(axis=1)
    wide = max(1, min(3, 60 // len(counts)))
    levels = np.ceil(counts / counts.max() * ROWS * 8).astype(int)  # a bin that is not empty shows
    lines = [title]
    for row in reversed(range(ROWS)):
        blocks = "".join(" ▁▂▃▄▅▆▇█"[level] * wide for level in (levels - row * 8).clip(0, 8))
        lines.append(f"{f'{counts.max() / total:.1%}' if row == ROWS - 1 else '':>8} │{blocks}".rstrip())
    width = len(counts) * wide
    whole = histogram.edges[0] == -0.5
    low, high = (0, len(histogram.counts) - 1) if whole else (histogram.edges[0], histogram.edges[-1])
    ends = f"{low:g}{f'{high:g}':>{max(width - len(f'{low:g}'), 1)}}"
    return [*lines, f"{'':>8} └{'─' * width}", f"{'':>10}{ends}"]


def _aligned(rows: Sequence[tuple[str, ...]], left_from: int = 99) -> list[str]:
    """Columns as wide as they need: the first to the left, numbers to the right, remarks to the left again."""
    rows = [tuple(_cut(printable(cell), 60) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 or i >= left_from else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cut(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _size(size_bytes: int) -> str:
    for unit, suffix in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= unit:
            return (
                f"{size_bytes / unit:.3g} {suffix}"
                if size_bytes < 999.5 * unit
                else f"{size_bytes / unit:,.0f} {suffix}"
            )
    return f"{size_bytes} bytes"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
