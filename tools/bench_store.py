"""How small, true and fast a store is, beside what others keep: the numbers and the figure of the README.

    .venv/bin/python tools/bench_store.py OUT_DIR [--tokens 113000] [--only layouts,read,build,synthetic,scale]

Runs the demo's teacher once over real text (`bench_text`), then each part in processes of their own, and writes
OUT_DIR/bench_store.{txt,json,svg,html}. Every speed stands beside a baseline of the same run. Without `--only` it takes
about 20 minutes on two idle cores, half of them the teacher's; its answers stay in OUT_DIR for the next run, 1 GB of
them.
"""

import argparse
import json
import os
import platform
from importlib import import_module
from pathlib import Path

from logitstore.figure import Figure, Table
from logitstore.html_page import Section, page
from tools.bench_parts import Found, Measured, Target, Titled, on_one_core
from tools.bench_text import teach

ONE_CORE = ("layouts", "read", "synthetic", "scale")
PARTS = ("layouts", "read", "build", "synthetic", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=113_000)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; expected some of {','.join(PARTS)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    taught = teach(out, arguments.tokens)
    subtitle = (
        f"SmolLM2-135M-Instruct on {len(taught.documents):,} documents of CPython's text, {taught.positions:,} "
        f"positions; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    measured: dict[str, Measured] = {}
    every: list[Found] = []
    print(f"{subtitle}\n")
    for part in parts:
        measured[part] = measure(part, out, arguments.tokens)
        every.append(import_module(f"tools.bench_{part}").found(measured[part]))
        print("\n".join(titled.text() for titled in every[-1].tables), flush=True)
    verdict = target_table([target for found in every for target in found.targets])
    print(verdict.text())
    write(out, subtitle, measured, every, verdict)


def measure(part: str, out: Path, tokens: int) -> Measured:
    """A part's numbers."""
    if part in ONE_CORE:
        return on_one_core(part, out, tokens)
    return import_module(f"tools.bench_{part}").measure(out, tokens)


def target_table(targets: list[Target]) -> Titled:
    """What had to be reached, and what was."""
    rows = tuple((t.what, t.target, t.reached, "met" if t.met else "MISSED") for t in targets)
    missed = sum(not target.met for target in targets)
    said = f"{missed} of {len(targets)} missed." if missed else f"All {len(targets)} met."
    return Titled("Targets", said, Table(("what", "target", "reached", ""), rows))


def write(out: Path, subtitle: str, measured: dict[str, Measured], every: list[Found], verdict: Titled) -> None:
    """The same as files; the first figure is the README's."""
    tables = [verdict, *(titled for found in every for titled in found.tables)]
    figures: list[Figure] = [figure for found in every for figure in found.figures]
    text = "\n".join(titled.text() for titled in tables)
    (out / "bench_store.txt").write_text(f"{subtitle}\n\n{text}", encoding="utf-8")
    targets = [vars(target) for found in every for target in found.targets]
    (out / "bench_store.json").write_text(
        json.dumps({"run": subtitle, "targets": targets, **measured}, indent=1, ensure_ascii=False) + "\n"
    )
    if figures:
        (out / "bench_store.svg").write_text(figures[0].document(), encoding="utf-8")
    sections = [Section(titled.title, [titled.table], titled.remark) for titled in tables]
    plots = Section("Plots", figures)
    (out / "bench_store.html").write_text(
        page("What a store costs", subtitle, [plots, *sections] if figures else sections), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
