"""What a student with a tokenizer of its own learns from a store of another: bits per byte of held-out text.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python tools/bench_across.py OUT_DIR [--seeds 0,1,2] [--steps 300]

The teacher is the demo's, SmolLM2-135M-Instruct with 49,152 tokens, whose answers to CPython's text `bench_text` keeps.
The student is a llama of 0.9 million parameters that begins from nothing, with a byte-level BPE of 1,024 tokens of its
own. All methods see the same batches; the store is all that is read of the teacher. A finished run is a line of
OUT_DIR/across-TOKENS/runs.jsonl and is not run again. Writes OUT_DIR/bench_across.{txt,json}. Takes about 15 minutes
beside the teacher's pass.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from distill_trainer.config import TrainConfig
from distill_trainer.crossing import Crossing
from distill_trainer.target_source import open_stores
from distill_trainer.train import train
from logitstore.alignment import spell
from logitstore.documents import read_documents
from logitstore.figure import Table
from logitstore.model import LoadedModel, load_model
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from logitstore.vocabulary import vocabulary_of
from tools.bench_parts import Found, Target, Titled, mean_and_error
from tools.bench_store import target_table
from tools.bench_text import Taught, teach
from tools.quality_world import begun_llama, trained_tokenizer

SELECT = "threshold:16"
HELD_OUT = 6
"""Every sixth document."""
LENGTH = 256
"""Of the student's tokens."""
METHODS = {"cross-entropy": SELECT, "mapped": SELECT, "span": SELECT, "uld": "top-k:50", "gold": "top-k:50"}
"""Each with what the store keeps."""
ALPHA = 0.5
DIGITS = 3
"""Of bits per byte."""
BATCH_SIZE = 8
LEARNING_RATE = 3e-3
SETTINGS = {"alpha": ALPHA, "length": LENGTH, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=113_000)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    taught = teach(out, arguments.tokens)
    folder = out / f"across-{arguments.tokens}"
    folder.mkdir(exist_ok=True)
    teacher_bits = write_text(taught, folder)

    runs = folder / "runs.jsonl"
    settings = SETTINGS | {"steps": arguments.steps}
    lines = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
    done = [run for run in lines if run["settings"] == settings]
    for seed in map(int, arguments.seeds.split(",")):
        student = begun_student(folder, seed)
        for method in METHODS:
            if any((run["method"], run["seed"]) == (method, seed) for run in done):
                continue
            config = config_of(taught, folder, student, method, seed, arguments.steps)
            shutil.rmtree(config.out, ignore_errors=True)
            report = train(config)
            trained = load_model(config.out)
            bits = bits_per_byte(trained, held_out(folder, trained))
            step_s = report.elapsed_s / report.steps
            done.append({"method": method, "seed": seed, "settings": settings, "bits": bits, "step_s": step_s})
            with runs.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    costs = crossing_costs(taught, folder, arguments.steps)
    show(out, found(done, teacher_bits, costs, arguments.steps), {"runs": done, "teacher": teacher_bits, **costs})


def write_text(taught: Taught, folder: Path) -> float:
    """Write the teacher's documents as text, train and held out; its own bits per byte of the latter."""
    store = open_store(taught.path(SELECT))
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    nats, size = 0.0, 0
    for number, token_ids in enumerate(taught.documents):
        spelled = spell(token_ids, store.vocabulary)
        try:
            text = spelled.text.decode("utf-8")
        except UnicodeDecodeError:  # a window that ends within a character
            continue
        split = "train" if number % HELD_OUT else "heldout"
        parts[split].append(text)
        if split == "heldout":
            targets = store.get(token_ids)
            assert targets is not None
            nats -= float(targets.label_log_prob.sum(dtype=np.float64))
            size += len(spelled.text) - int(spelled.ends[0])
    for split, texts in parts.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return nats / size / math.log(2)


def begun_student(folder: Path, seed: int) -> Path:
    """An untrained student, saved."""
    path = folder / f"student-{seed}"
    if not (path / "config.json").exists():
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        begun_llama(
            path, trained_tokenizer([json.loads(line)["text"] for line in lines]), hidden=128, layers=4, seed=seed
        )
    return path


def config_of(taught: Taught, folder: Path, student: Path, method: str, seed: int, steps: int) -> TrainConfig:
    """One run."""
    store = str(taught.path(METHODS[method]))
    distils = {"store": (store,), "cross_vocab": method, "on_miss": "hard-only", "min_coverage": 0.0}
    own: dict[str, Any] = {"alpha": 0.0} if method == "cross-entropy" else {"alpha": ALPHA, **distils}
    return TrainConfig(
        student=str(student), dataset=str(folder / "train.jsonl"), out=str(folder / f"{method}-{seed}"),
        fine_tune_type="full", iters=steps, batch_size=BATCH_SIZE, max_seq_length=LENGTH, max_grad_norm=1.0, seed=seed,
        lr_schedule={"name": "cosine_decay", "arguments": [LEARNING_RATE, steps], "warmup": steps // 10}, quiet=True,
        **own,
    )  # fmt: skip


def held_out(folder: Path, student: LoadedModel) -> list[TokenSequence]:
    """The held-out documents as the student reads them."""
    return list(tokenize(read_documents(str(folder / "heldout.jsonl")), student.tokenizer, LENGTH))


def bits_per_byte(student: LoadedModel, sequences: Sequence[TokenSequence]) -> float:
    """-log2 of a student's probability of the tokens that it predicts, over the bytes of those."""
    vocabulary, nats, size = vocabulary_of(student.tokenizer), 0.0, 0
    student.model.eval()
    for sequence in sequences:
        tokens = mx.array(sequence.token_ids)[None]
        each = nn.losses.cross_entropy(student.model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])
        ends = spell(sequence.token_ids, vocabulary).ends
        nats += float(each.sum().item())
        size += int(ends[-1] - ends[0])
    return nats / size / math.log(2)


def crossing_costs(taught: Taught, folder: Path, steps: int) -> dict[str, float]:
    """Seconds: to map the vocabularies and read the store's texts, to align a document, to carry a batch over."""
    config = config_of(taught, folder, folder / "student-0", "mapped", 0, steps)
    teachers, student = open_stores(config), load_model(folder / "student-0")
    sequences = list(tokenize(read_documents(config.dataset), student.tokenizer, LENGTH))
    started = time.perf_counter()
    crossing = Crossing(config, teachers, None, student, len(vocabulary_of(student.tokenizer)))
    begun = time.perf_counter()
    crossing.method = "mapped"
    across = crossing.over(sequences, print)
    aligned = time.perf_counter()
    answers = [(s, teachers.of(s).get(s.asked_ids)) for s in across]
    read = time.perf_counter()
    for sequence, targets in answers:
        sequence.own(targets)
    carried = time.perf_counter()
    each = config.batch_size / len(across)
    return {
        "begin_s": begun - started, "align_s": (aligned - begun) / len(across), "carry_s": (carried - read) * each,
    }  # fmt: skip


def found(runs: Sequence[dict[str, Any]], teacher_bits: float, costs: dict[str, float], steps: int) -> Found:
    """The table and what must be reached."""
    bits = {method: np.array([run["bits"] for run in runs if run["method"] == method]) for method in METHODS}
    step_s = float(np.median([run["step_s"] for run in runs if run["method"] == "mapped"]))
    rows = [("the teacher", f"{teacher_bits:.3f}", "", "")]
    for method, values in bits.items():
        nearer = bits["cross-entropy"] - values
        rows.append(
            (
                method,
                mean_and_error(values, DIGITS),
                "" if method == "cross-entropy" else mean_and_error(nearer, DIGITS, signed=True),
                str(len(values)),
            )
        )
    remark = (
        f"{steps} steps of {BATCH_SIZE} documents of at most {LENGTH} tokens, alpha {ALPHA} (cross-entropy weighs "
        "the rest). Mean and its standard error over seeds; below cross-entropy: of differences between students of "
        "the same seed. "
        f"Before the first step {costs['begin_s']:.1f} s to map the vocabularies and read the store's texts, "
        f"{1e3 * costs['align_s']:.2f} ms to find and align a document."
    )
    header = ("method", "bits per byte, held out", "below cross-entropy", "seeds")
    ahead = float((bits["cross-entropy"] - bits["mapped"]).mean())
    targets = [Target.at_least("mapped, which auto takes here: bits per byte below cross-entropy's", 0, ahead, ".4f")]
    targets.append(Target.at_most("carrying a batch over, share of a step", 0.02, costs["carry_s"] / step_s, ".4f"))
    return Found([Titled("Students of another tokenizer", remark, Table(header, tuple(rows)))], tuple(targets))


def show(out: Path, found: Found, numbers: dict[str, Any]) -> None:
    """Print and write everything."""
    text = "\n".join([*(table.text() for table in found.tables), target_table(list(found.targets)).text()])
    print(text)
    (out / "bench_across.txt").write_text(text, encoding="utf-8")
    (out / "bench_across.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
