"""Every loss on the demo's models: its gradient through the whole student, and that students learn by it.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python tools/every_loss.py OUT_DIR [--only NAME,...]

The teacher is SmolLM2-135M-Instruct, the student 20 of its 30 layers in float32, trained in full, the text CPython's
documentation. For each loss and each way of keeping the teacher that serves it:

- the slope along its gradient and as much noise, in all weights at once, as the trainer has it in float32, beside
  differences of a student and a formula in float64 NumPy;
- a run of `distill-train` from a store, and one with the live teacher: the loss on held-out documents before and after.

`tests/test_every_loss.py` asks the same of tiny models. A finished case is a line of OUT_DIR/cases.jsonl, is not run
again, and is shown. Writes OUT_DIR/every_loss.{txt,json}; ends with 1 where one is missed. About 11 minutes of a core.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import distill_kernels

from tqdm import tqdm

from distill_trainer.batches import Weighing, collate
from distill_trainer.config import TrainConfig
from distill_trainer.held_out import hold_out, read_held_out
from distill_trainer.losses import NAMES
from distill_trainer.objective import Objective
from distill_trainer.student import load_student, make_trainable
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.targets import TargetSource
from distill_trainer.train import train
from distill_trainer.two_prompts import read_both
from logitstore.build import BuildConfig, build
from logitstore.figure import Table
from logitstore.model import LoadedModel
from logitstore.sequences import TokenizeReport
from tests.every_loss import CASES, LEARNT, TOLERANCE, Case, slopes
from tools.bench_parts import Target, Titled, scratch
from tools.bench_store import target_table
from tools.bench_text import teacher_path
from tools.demo_data import splits, write


@dataclass(frozen=True)
class Settings:
    """What a finished case was run with."""

    trained: int = 8
    held_out: int = 4
    """Documents."""
    tokens: int = 64
    """Of a document, at most."""
    steps: int = 6
    batch_size: int = 2
    learning_rate: float = 2e-4
    keep_layers: int = 20
    differentiated: int = 2
    differentiated_tokens: int = 40


SETTINGS = Settings()
GRADIENT, FROM_STORE, LIVE = "gradient", "store", "live"

Key = tuple[str, str, str]
"""Loss, what is kept of the teacher, and GRADIENT or where a run has its targets from."""


class World:
    """Text, stores and the untrained student, each made once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.teacher = str(teacher_path())
        self._sources: dict[tuple[str, bool], TargetSource] = {}
        self._open = ExitStack()
        texts = splits()
        trained, held_out = texts["train"][: SETTINGS.trained], texts["heldout"][: SETTINGS.held_out]
        for name, documents in (("train", trained), ("valid", held_out), ("all", trained + held_out)):
            write(out / f"{name}.jsonl", documents)
        for select in dict.fromkeys(case.store for case in CASES):
            tails = select.startswith("threshold")
            build(
                BuildConfig(
                    self.teacher, str(out / "all.jsonl"), self.store(select), select=select, tail_log_probs=tails,
                    max_seq_length=SETTINGS.tokens, quiet=True,
                )
            )  # fmt: skip

    def store(self, select: str) -> Path:
        return self.out / f"{select.replace(':', '-')}.zarr"

    def config(self, case: Case, live: bool = False, out: Path = Path("none"), **options: Any) -> TrainConfig:
        """A run that learns from the teacher alone."""
        source = {"teacher": self.teacher, "select": case.store} if live else {"store": (str(self.store(case.store)),)}
        shown = {"valid_split": "valid", "steps_per_eval": SETTINGS.steps, "val_batches": -1, "quiet": True}
        usual = {
            "student": self.teacher, "keep_layers": SETTINGS.keep_layers, "fine_tune_type": "full",
            "dataset": str(self.out), "max_seq_length": SETTINGS.tokens, "batch_size": SETTINGS.batch_size,
            "iters": SETTINGS.steps, "learning_rate": SETTINGS.learning_rate, "alpha": 1.0, "loss": (case.name,),
        }  # fmt: skip
        return TrainConfig(**usual | source | shown | {"out": str(out)} | options)

    @cached_property
    def student(self) -> LoadedModel:
        """All of it trainable; nobody trains this one."""
        config = self.config(CASES[0])
        student = load_student(config)
        make_trainable(student, config)
        return student

    def source(self, case: Case, live: bool) -> TargetSource:
        """What answers a run, asked before it."""
        if (case.store, live) not in self._sources:
            config = self.config(case, live)
            source = target_source(config, open_stores(config), self.student.tokenizer)
            self._sources[case.store, live] = self._open.enter_context(source)
        return self._sources[case.store, live]

    def close(self) -> None:
        self._open.close()


def differentiate(world: World, case: Case) -> dict[str, Any]:
    """The loss's slope, both ways."""
    config = world.config(case, max_seq_length=SETTINGS.differentiated_tokens)
    read = read_both(config, config.dataset, "train", (), world.student.tokenizer, TokenizeReport())
    chosen = read[: SETTINGS.differentiated]
    source = world.source(case, live=False)
    batch = collate(chosen, source.answer(chosen)[0], Weighing(1.0, "error"))
    assert batch is not None
    found, expected = slopes(case, world.student, Objective(config, source.recipe).at(1), batch)
    return {"found": found, "expected": expected}


def learn(world: World, case: Case, live: bool) -> dict[str, Any]:
    """The loss on held-out documents before and after a run."""
    config = world.config(case, live)
    source = world.source(case, live)
    documents = read_held_out(config, world.student.tokenizer, [], lambda _: None)
    watched = hold_out(config, documents, source, Objective(config, source.recipe))
    assert watched is not None
    before = watched.measure(distill_kernels.split_head(world.student.model))
    with scratch(world.out) as folder:
        after = train(world.config(case, live, folder / "student")).valid
    assert before["valid_hits"] == after["valid_hits"] and before["valid_misses"] == after["valid_misses"]
    return {name: float(each["valid_kd_loss"]) for name, each in (("before", before), ("after", after))}


def works(names: Sequence[str]) -> dict[Key, Callable[[World], dict[str, Any]]]:
    """What is to be done for these losses."""
    gradients = {(c.name, c.store, GRADIENT): partial(differentiate, case=c) for c in CASES}
    runs = {(c.name, c.store, LIVE if live else FROM_STORE): partial(learn, case=c, live=live) for c, live in LEARNT}
    return {key: work for key, work in (gradients | runs).items() if key[0] in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(NAMES), help="losses, separated by commas")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such loss: {', '.join(sorted(unknown))}; expected some of {','.join(NAMES)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    finished = out / "cases.jsonl"
    wanted = works(names)
    done = read(finished)
    if left := [key for key in wanted if key not in done]:
        world = World(out)
        for key in tqdm(left, unit="case"):
            done[key] = wanted[key](world)
            with finished.open("a") as file:
                file.write(json.dumps({"case": key, "settings": asdict(SETTINGS), **done[key]}) + "\n")
        world.close()
    sys.exit(not show({key: done[key] for key in wanted}, out))


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The cases that are finished with these settings."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(line["case"]): line for line in lines if line["settings"] == asdict(SETTINGS)}


def show(done: dict[Key, dict[str, Any]], out: Path) -> bool:
    """Print and write everything; return whether all is met."""
    targets = [target_of(key, figures) for key, figures in done.items()]
    met = all(target.met for target in targets)
    verdict = target_table(targets)
    text = f"{table_of(done).text()}\n{verdict.remark if met else verdict.text()}\n"
    print(text, end="")
    (out / "every_loss.txt").write_text(text, encoding="utf-8")
    cases = [{"case": key, **figures} for key, figures in done.items()]
    written = {"settings": asdict(SETTINGS), "targets": [vars(target) for target in targets], "cases": cases}
    (out / "every_loss.json").write_text(json.dumps(written, indent=1) + "\n")
    return met


def target_of(key: Key, figures: dict[str, Any]) -> Target:
    """What a case must reach: a slope as the formula has it, or less of the loss than before."""
    what = ", ".join(key)
    if key[-1] == GRADIENT:
        return Target.at_most(f"{what} off by", TOLERANCE, off(figures), ".1e")
    before, after = figures["before"], figures["after"]
    return Target(what, f"< {before:.4f}", f"{after:.4f}", after < before)


def off(slope: dict[str, Any]) -> float:
    """How far a slope is from what was expected, relatively."""
    return abs(float(slope["found"]) / float(slope["expected"]) - 1)


def table_of(done: dict[Key, dict[str, Any]]) -> Titled:
    """A run a row, the slope beside the first of its loss."""
    rows = []
    for (name, store, where), figures in done.items():
        if where == GRADIENT:
            continue
        slope, columns = done[name, store, GRADIENT], ("", "", "")
        if where == FROM_STORE:
            columns = f"{slope['found']:.5g}", f"{slope['expected']:.5g}", f"{off(slope):.1e}"
        rows.append((name, store, where, f"{figures['before']:.4f}", f"{figures['after']:.4f}", *columns))
    header = ("loss", "kept", "from", "before", "after", "gradient", "expected", "off by")
    learnt = (
        f"SmolLM2-135M-Instruct teaches {SETTINGS.keep_layers} of its layers. Before, after: the loss on "
        f"{SETTINGS.held_out} held-out documents of at most {SETTINGS.tokens} tokens, untrained and after "
        f"{SETTINGS.steps} steps of {SETTINGS.batch_size} documents at {SETTINGS.learning_rate:g}. "
    )
    differentiated = (
        "Gradient: the slope along it and as much noise, in all weights at once, as trained on in float32; expected: "
        f"by differences in float64, on {SETTINGS.differentiated} documents of at most "
        f"{SETTINGS.differentiated_tokens} tokens. "
    )
    less = (
        "A live teacher keeps no log-probs of a sample's tail, so the five losses that need them learn from a store "
        "alone; asked in other batches, it may draw another token where rounding moves a threshold."
    )
    return Titled("Every loss", learnt + differentiated + less, Table(header, tuple(rows)))


if __name__ == "__main__":
    main()
