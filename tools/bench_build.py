"""A build's tokens per second against the forward pass alone, and the memory that it takes beyond the teacher.

Both run over the same documents in the same teacher batches, each in a process of its own, in turn. The forward pass
alone makes all logits and hands them to NumPy; nothing is kept of them.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from logitstore.build import BuildConfig, build
from logitstore.documents import read_documents
from logitstore.figure import Table
from logitstore.key import document_key
from logitstore.plan import plan_batches
from logitstore.sequences import tokenize
from tools.bench_parts import ROUNDS, Found, Measured, Target, Titled, child, scratch
from tools.bench_text import BATCH_TOKENS, WINDOW, teacher_path, texts

TOKENS = 6_144
TARGET_RATIO = 0.95
TARGET_BYTES = 1.5e9


def measure(out: Path, tokens: int) -> Measured:
    """Forward and build in turn, ROUNDS times."""
    rounds = []
    with scratch(out) as folder:
        _write_dataset(folder / "data.jsonl", min(tokens, TOKENS))
        for number in range(ROUNDS):
            pair: Measured = {"load": os.getloadavg()[0]}
            for what in ("forward", "build") if number % 2 == 0 else ("build", "forward"):
                pair[what] = child(
                    ["-m", "tools.bench_build", what, str(folder / "data.jsonl"), str(folder / f"{number}.zarr")]
                )
            rounds.append(pair)
    ratios = [pair["build"]["per_s"] / pair["forward"]["per_s"] for pair in rounds]
    return {"rounds": rounds, "ratio": float(np.median(ratios))}


def _write_dataset(path: Path, tokens: int) -> None:
    """About so many tokens of text, guessed at 4 characters each."""
    with path.open("w") as file:
        for text in texts():
            piece = text[: 3 * WINDOW]
            file.write(json.dumps({"text": piece}) + "\n")
            tokens -= len(piece) // 4
            if tokens <= 0:
                return


def forward(dataset: str) -> Measured:
    """The teacher's logits to NumPy, and nothing else."""
    import mlx.core as mx

    from logitstore.forward import document_logits
    from logitstore.teacher import Teacher

    teacher = Teacher(str(teacher_path()))
    documents = {document_key(s.token_ids): s for s in tokenize(read_documents(dataset), teacher.tokenizer, WINDOW)}
    started, positions = time.perf_counter(), 0
    for batch in plan_batches(documents, BATCH_TOKENS):
        for parts in document_logits(teacher.head, [documents[key].token_ids for key in batch]):
            for rows in parts:
                positions += len(np.array(rows.astype(mx.float32), copy=False))
    elapsed_s = time.perf_counter() - started
    return {"positions": positions, "per_s": positions / elapsed_s}


def built(dataset: str, out: Path) -> Measured:
    """`logitstore build`; memory is counted from the moment that it says what the dataset holds, the teacher loaded."""
    before: list[int] = []

    def say(_line: str) -> None:
        if not before:
            before.append(_resident_bytes())

    config = BuildConfig(
        teacher=str(teacher_path()),
        dataset=dataset,
        out=out,
        max_seq_length=WINDOW,
        batch_tokens=BATCH_TOKENS,
        quiet=True,
    )
    report = build(config, say)
    return {
        "positions": report.computed_positions,
        "per_s": report.positions_per_second,
        "teacher_bytes": before[0],
        "more_bytes": _peak_bytes() - before[0],
    }


def _resident_bytes() -> int:
    """Memory of this process now; and from now on its peak counts anew, where Linux lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return _peak_bytes()


def _peak_bytes() -> int:
    try:
        return _status_bytes("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def found(measured: Measured) -> Found:
    """One table."""
    rounds = measured["rounds"]
    cells = tuple(
        (
            str(number),
            f"{pair['forward']['per_s']:.1f}",
            f"{pair['build']['per_s']:.1f}",
            f"{pair['build']['per_s'] / pair['forward']['per_s']:.3f}",
            f"{pair['build']['teacher_bytes'] / 1e6:,.0f}",
            f"{pair['build']['more_bytes'] / 1e6:,.0f}",
            f"{pair['load']:.1f}",
        )
        for number, pair in enumerate(rounds, 1)
    )
    header = ("round", "forward/s", "build/s", "ratio", "MB with the teacher", "MB more at its peak", "load before")
    remark = (
        f"Positions per second by the clock, all cores, over the same {rounds[0]['build']['positions']:,} positions a "
        f"round; threshold:16. The ratio that counts is the median of {len(rounds)} rounds. Other work on the machine "
        f"moves it either way: the load average before each round stands beside it (about 2 is this run's own)."
    )
    most = max(pair["build"]["more_bytes"] for pair in rounds)
    targets = (
        Target.at_least("build, ratio to the forward pass alone", TARGET_RATIO, measured["ratio"], ".3f"),
        Target.at_most("build, GB beyond the teacher", TARGET_BYTES / 1e9, most / 1e9, ".2f"),
    )
    return Found([Titled("Building", remark, Table(header, cells))], targets)


if __name__ == "__main__":
    print(json.dumps(forward(sys.argv[2]) if sys.argv[1] == "forward" else built(sys.argv[2], Path(sys.argv[3]))))
