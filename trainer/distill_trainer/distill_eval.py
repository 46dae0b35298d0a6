"""Hold a finished student against its teacher, live or as a store keeps it: numbers, and one page to look at."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np

from distill_trainer.answers import Answer, answers
from distill_trainer.comparison import expected_calibration_error, reliability
from distill_trainer.config_file import config_of, read_config
from distill_trainer.evaluate import evaluate
from distill_trainer.output import CONFIG
from distill_trainer.stored_evaluation import Stated, evaluate_stored
from distill_trainer.target_source import require_same_tokenizer
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, first_line
from logitstore.model import LoadedModel, load_model
from logitstore.prompts import prompted
from logitstore.replaced import replaced
from logitstore.sequences import TokenizeReport, TokenSequence, read_sequences, require_ids_below, require_places
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.vocabulary import vocabulary_of

FIGURES = {
    "kl": "KL(teacher || student), nats",
    "reverse_kl": "KL(student || teacher), nats",
    "agreement": "likeliest token is the teacher's",
    "top5_agreement": "of the teacher's five likeliest",
    "acceptance": "expected acceptance of drafts",
    "perplexity": "perplexity of the text",
    "ece": "expected calibration error",
    "similarity": "likeness of answers (ROUGE-L)",
}
"""What is measured, by the names of `Evaluation`'s fields, and how it is called."""


@dataclass(frozen=True)
class EvalConfig:
    """What `distill-eval` takes; the names are its flags."""

    student: str
    dataset: str
    adapter_path: str | None = None
    teacher: str | None = None
    teacher_adapter_path: str | None = None
    store: str | None = None
    split: str | None = None
    """None: "test" of a folder or a hub dataset, all of one file."""
    max_seq_length: int = 2048
    samples: int = 0
    """How many prompts are answered."""
    run: Path | None = None
    """The --out of a run: documents are read as its student read them."""
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ConfigError: naming the flag.
        """
        if (self.teacher is None) == (self.store is None):
            raise ConfigError("a student is held against one thing; type --teacher T, or --store STORE")
        if self.teacher_adapter_path is not None and self.teacher is None:
            raise ConfigError("--teacher-adapter-path is given, and no teacher; type --teacher T with it")
        if self.samples < 0:
            raise ConfigError(f"samples is {self.samples}, expected at least 0; type --samples 5")


@dataclass(frozen=True)
class Held:
    """A student held against its teacher."""

    student: str
    against: str
    positions: int
    unanswered: int
    figures: dict[str, Stated]
    """By the names of `FIGURES`."""
    bins: tuple[tuple[int, float, float], ...]
    """`comparison.reliability`."""
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "student": self.student,
            "against": self.against,
            "positions": self.positions,
            "unanswered_positions": self.unanswered,
            "figures": {
                name: {"value": _finite(stated.value), "what": stated.what} for name, stated in self.figures.items()
            },
            "reliability": [{"positions": n, "confidence": c, "accuracy": a} for n, c, a in self.bins],
            "answers": [vars(answer) for answer in self.answers],
        }

    def to_text(self) -> str:
        """As lines of a table."""
        lines = [f"{self.student} against {self.against}: {self.positions:,} positions"]
        if self.unanswered:
            lines[0] += f" ({self.unanswered:,} more are not in the store)"
        for name, stated in self.figures.items():
            lines.append(f"{FIGURES[name]:<34} {shown(name, stated.value):>9}  {stated.what}")
        return "\n".join(lines)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: null stands for it, as for a figure that there is none of."""
    return value if value is not None and math.isfinite(value) else None


def student_of_run(run: Path) -> tuple[str, str | None]:
    """The model that a run has saved, and its adapter where it is one.

    Raises:
        ConfigError: the folder holds neither.
    """
    try:
        if (run / "adapter_config.json").exists():
            return str(json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))["model"]), str(run)
        if not (run / "config.json").exists():
            raise ValueError("it has neither a model nor an adapter")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{run} has saved no student to measure ({first_line(error)}); type --student S, and --adapter-path A"
        ) from error
    return str(run), None


def shown(name: str, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return "-"
    if name in ("agreement", "top5_agreement", "acceptance"):
        return f"{value:.1%}"
    return f"{value:,.1f}" if name == "perplexity" else f"{value:.4f}"


def distill_eval(config: EvalConfig, say: Callable[[str], object] = lambda _: None) -> Held:
    """Measure a student on the trained positions of a dataset.

    Raises:
        LogitstoreError: see `logitstore.errors`.
    """
    store = None if config.store is None else open_store(config.store)
    one_file = Path(config.dataset).expanduser().is_file()
    rows = read_documents(config.dataset, split=config.split or ("train" if one_file else "test"))
    student = load_model(config.student, adapter_path=config.adapter_path)
    report = TokenizeReport()
    template, mask_prompt = None, True
    if config.run is not None:
        told = config_of(read_config(config.run / CONFIG))
        template, mask_prompt = told.student_template, told.mask_prompt
        if told.teacher_template != template:
            say("the run's teacher was asked in other words; here it is held against the student after the student's")
    sequences = read_sequences(
        prompted(rows, template),
        student.tokenizer,
        config.max_seq_length,
        report,
        quiet=config.quiet,
        mask_prompt=mask_prompt,
    )
    say(report.describe())
    require_ids_below(student.model(mx.array([[0]])).shape[-1], sequences, f"student {student.name}")
    longest = max(len(sequence.trained) for sequence in sequences)
    require_places(student.places, longest, f"student {student.name}")
    if store is not None:
        require_same_tokenizer(store, vocabulary_of(student.tokenizer).fingerprint(), config.student)
        found = evaluate_stored(student, store, sequences, config.quiet)
        figures = found.figures | {"ece": Stated(expected_calibration_error(found.bins), "exact")}
        held = Held(
            student.name, str(store.path), found.positions, found.unanswered, figures, reliability(found.bins), ()
        )
        return _with_answers(held, student, None, sequences, config)
    assert config.teacher is not None
    teacher = Teacher(config.teacher, config.teacher_adapter_path, quiet=config.quiet)
    require_ids_below(teacher.vocab_size, sequences, "the teacher")
    require_places(teacher.places, longest, "the teacher")
    measured = evaluate({"student": student}, teacher, sequences, config.quiet)["student"]
    figures = {name: Stated(getattr(measured, name), "exact") for name in FIGURES if name != "similarity"}
    held = Held(student.name, teacher.loaded.name, measured.positions, 0, figures, measured.bins, ())
    return _with_answers(held, student, teacher.loaded, sequences, config)


def _with_answers(
    held: Held,
    student: LoadedModel,
    teacher: LoadedModel | None,
    sequences: Sequence[TokenSequence],
    config: EvalConfig,
) -> Held:
    """The same, and what is answered to some prompts where the run asks for that."""
    if not config.samples:
        return held
    given = answers(student, teacher, sequences, config.samples, quiet=config.quiet)
    likeness = [answer.similarity for answer in given if answer.similarity is not None]
    mean = float(np.mean(likeness)) if likeness else None
    stated = Stated(mean, "needs --teacher" if mean is None else f"mean of {len(likeness)} prompts")
    return replace(held, figures=held.figures | {"similarity": stated}, answers=tuple(given))


def save_json(held: Held, path: Path) -> None:
    """Write the numbers; a file that is there is replaced."""
    with replaced(path) as file:
        file.write((json.dumps(held.to_json(), indent=1) + "\n").encode())
