"""A figure or table for people: SVG and HTML that stand by themselves. `plots` draws figures, `html_page` shows them.

A figure carries its numbers as a table for those who cannot see it. Every text passes `escape`, because names come from
other people's stores.
"""

import html
from dataclasses import dataclass

WIDTH = 392  # in user units; near a phone's width in CSS pixels, so that text keeps its size there
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
            f"{svg_text(10, -10, self.title, 'title')}{self.body}</svg>\n"
        )

    def _spoken(self) -> str:
        return f'role="img" aria-label="{escape(f"{self.title}. {self.description}")}"'


def svg_text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    """A text at a place, anchored at its start, middle or end."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
