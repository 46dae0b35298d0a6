"""A page that holds figures, tables and texts, and knows nothing of stores or runs.

One file: no script, no other host, light or dark as the reader's system is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from logitstore.figure import STYLE, Figure, Table, escape

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
