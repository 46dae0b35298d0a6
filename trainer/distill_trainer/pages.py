"""Pages to look at: what a run did, from what lies in its folder, and what a student is worth. One HTML file each."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_trainer.answers import Answer, answers
from distill_trainer.config import TrainConfig
from distill_trainer.distill_eval import FIGURES, Held, shown
from distill_trainer.output import CONFIG, METRICS, REPORT, SUMMARY
from logitstore.errors import ConfigError, first_line
from logitstore.figure import Figure, Table
from logitstore.html_page import Facts, Section, Texts, page
from logitstore.model import LoadedModel
from logitstore.plots import Axis, Series, chart
from logitstore.replaced import replaced
from logitstore.sequences import TokenSequence

CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "nats", (("loss", "total"), ("kd_loss", "distillation"), ("ce_loss", "cross-entropy"))),
    (
        "Loss on held-out documents",
        "nats",
        (("valid_loss", "total"), ("valid_kd_loss", "distillation"), ("valid_ce_loss", "cross-entropy")),
    ),
    ("Hidden states and attention", "", (("hidden_loss", "hidden states"), ("attention_loss", "attention maps"))),
    ("Learning rate", "", (("learning_rate", "learning rate"),)),
    ("Weight of distillation", "", (("alpha", "alpha"),)),
    ("Temperature", "", (("temperature", "temperature"),)),
    ("TAID's interpolation", "", (("taid_t", "t"),)),
    ("Norm of the gradient", "", (("grad_norm", "norm"),)),
    ("Speed", "tokens/s", (("tokens_per_second", "speed"),)),
    ("Peak memory", "GB", (("peak_memory_gb", "memory"),)),
)
"""Title, unit, and keys of metrics.jsonl with what they are called."""
MOST_POINTS = 400
"""Of a curve; of a longer one, means over equal stretches of steps."""


def save_run_page(
    config: TrainConfig,
    student: LoadedModel,
    sequences: Sequence[TokenSequence],
    say: Callable[[str], object],
    count: int,
) -> None:
    """Write the page of a run that has just been saved, with some of its student's answers; if that fails, say so.

    Args:
        sequences: whose prompts are answered.
        count: how many.
    """
    place = Path(config.out) / REPORT
    try:
        student.model.eval()
        given = answers(student, None, sequences, count, quiet=config.quiet) if count else []
        save_page(run_page(Path(config.out), given=given), place)
        say(f"the run is shown in {place}")
    except (Exception, KeyboardInterrupt) as error:  # the run is saved, and nothing here may lose it
        say(f"{place} was not written: {first_line(error)}; type distill-eval --run {config.out} --html PAGE")


def run_page(run: Path, held: Held | None = None, given: Sequence[Answer] = ()) -> str:
    """The page of a run's folder, finished or not; with what its student is worth where that was measured.

    Raises:
        ConfigError: it is no run's folder, or a file in it is broken.
    """
    try:
        config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        whole = [line for line in (run / METRICS).read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]
        lines = [json.loads(line) for line in whole]  # a killed run may leave a part of a line after them
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8")) if (run / SUMMARY).exists() else {}
        return _run_page(config, lines, summary, held, given)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{run} holds no run that can be shown ({first_line(error)}); type the --out of a distill-train run"
        ) from error


def _run_page(
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    held: Held | None,
    given: Sequence[Answer],
) -> str:
    sections = [Section("What it did", [_run_facts(lines, summary)])]
    if held is not None:
        sections += evaluation_sections(held)
    sections += answer_sections(given)
    figures = [figure for title, unit, keys in CURVES for figure in _curve(lines, title, unit, keys)]
    sections.append(Section("Step by step", [*figures, *_hit_rate(lines)], f"After {len(lines):,} steps."))
    values = _held_out(lines)
    domains = sorted(key for key in values if "/" in key)
    if domains:
        rows = tuple((key.partition("/")[2], key.partition("/")[0], f"{values[key]:.4f}") for key in domains)
        sections.append(Section("Held-out loss by domain", [Table(("domain", "what", "last"), rows)]))
    settings = tuple((key, _said(value)) for key, value in config.items() if value not in (None, [], {}, False))
    sections.append(Section("Settings", [Table(("key", "value"), settings, words=True)]))
    student, step = Path(str(config["student"])).name, lines[-1]["step"] if lines else 0
    return page(f"{student} distilled", f"{step:,} of {config['iters']:,} steps", sections)


def evaluation_page(held: Held) -> str:
    """The page of a student that was held against its teacher."""
    return page(held.student, f"against {held.against}", evaluation_sections(held))


def evaluation_sections(held: Held) -> list[Section]:
    """The numbers, the reliability plot and the answers."""
    rows = tuple((FIGURES[name], shown(name, stated.value), stated.what) for name, stated in held.figures.items())
    remark = f"Over {held.positions:,} held-out positions, against {held.against}."
    if held.unanswered:
        remark += f" {held.unanswered:,} more are not in the store."
    sections = [
        Section("What it is worth", [Table(("measure", "value", "what it is"), rows, words=True)], remark),
        Section("Calibration", [reliability_figure(held.bins)], "How often it is right, by how sure it is."),
    ]
    return [*sections, *answer_sections(held.answers)]


def reliability_figure(bins: Sequence[tuple[int, float, float]]) -> Figure:
    """Confidence against accuracy, and the line on which both are equal."""
    points = [(confidence, accuracy) for n, confidence, accuracy in bins if n]
    counts = [f"{n:,}" for n, _, _ in bins if n]
    return chart(
        [Series("positions", points, counts), Series("calibrated", [(0.0, 0.0), (1.0, 1.0)], guide=True)],
        "Reliability",
        Axis("confidence"),
        Axis("accuracy"),
    )


def answer_sections(given: Sequence[Answer]) -> list[Section]:
    """A section for each prompt."""
    sections = []
    for number, answer in enumerate(given, 1):
        rows = [("prompt", answer.prompt), ("dataset", answer.expected), ("student", answer.student)]
        if answer.teacher is not None:
            rows.append(("teacher", answer.teacher))
        likeness = "" if answer.similarity is None else f"Student and teacher: ROUGE-L {answer.similarity:.2f}."
        sections.append(Section(f"Answer {number}", [Texts(tuple(rows))], likeness))
    return sections


def _run_facts(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Facts:
    hits, misses, failed = (sum(line.get(name, 0) for line in lines) for name in ("hits", "misses", "failed"))
    trained = sum(line["trained_tokens"] for line in lines)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    items = [
        ("steps", f"{len(lines):,}", "stopped early" if summary.get("interrupted") else "" if summary else "not ended"),
        ("trained positions", f"{trained:,}", ""),
        ("hits", f"{hits:,}", "positions that a store answered"),
        ("misses", f"{misses:,}", "positions that none did"),
        *([("not answered", f"{failed:,}", "misses on which the teacher was silent too")] if failed else []),
    ]
    if any("taught" in line for line in lines):
        share = sum(line.get("taught", 0) for line in lines) / max(trained, 1)
        items.append(("taught", f"{100 * share:.1f} %", "of trained positions, by a teacher with another tokenizer"))
    if summary.get("across"):
        items.append(("across tokenizers", summary["across"]["method"], summary["across"]["teaches"]))
    if losses:
        items.append(("last loss", f"{losses[-1]:.4f}", f"first {losses[0]:.4f}"))
    held_out = _held_out(lines).get("valid_loss")
    if held_out is not None:
        items.append(("held-out loss", f"{held_out:.4f}", "the last that was measured"))
    if lines:
        speed = summary.get("tokens_per_second") or lines[-1]["tokens_per_second"]
        items.append(("speed", f"{speed:,.0f}", "positions a second"))
        items.append(("peak memory", f"{max(line['peak_memory_gb'] for line in lines):.3g} GB", ""))
    return Facts(tuple(items))


def _held_out(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last held-out figures."""
    found: dict[str, float] = {}
    for line in lines:
        found |= {key: value for key, value in line.items() if key.startswith("valid_") and value is not None}
    return found


def _curve(lines: Sequence[Mapping[str, Any]], title: str, unit: str, keys: Sequence[tuple[str, str]]) -> list[Figure]:
    """One figure, or none where the run has no such numbers."""
    series = [
        Series(name, _thinned([(line["step"], line[key]) for line in lines if line.get(key) is not None]))
        for key, name in keys
    ]
    series = [one for one in series if one.points]
    return [chart(series, title, Axis("step"), Axis(title.lower(), unit))] if series else []


def _hit_rate(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    shares = {
        "hits": [(line["step"], line["hits"], line["hits"] + line["misses"]) for line in lines],
        "taught": [(line["step"], line["taught"], line["trained_tokens"]) for line in lines if "taught" in line],
    }
    series = [
        Series(name, _thinned([(step, 100 * part / whole) for step, part, whole in found if whole]))
        for name, found in shares.items()
    ]
    series = [one for one in series if one.points]
    return [chart(series, "Hit rate", Axis("step"), Axis("positions", "%"))] if series else []


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of them."""
    every = -(-len(points) // MOST_POINTS) if points else 1
    groups = [points[at : at + every] for at in range(0, len(points), every)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def save_page(text: str, path: Path) -> None:
    """Write a page; one that is there is replaced.

    Raises:
        StoreWriteError: full disk or no permission.
    """
    with replaced(path.expanduser()) as file:
        file.write(text.encode())
