"""The demo's last page: what the store cost, what the students learned, and a line that one of them writes."""

import json
import re
import sys
from pathlib import Path

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx_lm

from distill_trainer.evaluate import evaluate
from logitstore.documents import read_documents
from logitstore.info import info
from logitstore.model import load_model
from logitstore.sequences import tokenize
from logitstore.store import open_store
from logitstore.teacher import Teacher

HELD_OUT_TOKENS = 256
STUDENTS = ("untrained", "cross-entropy", "distilled")
PROMPT = "The for statement is used to"


def main(demo: Path, teacher_path: str) -> None:
    teacher = Teacher(teacher_path)
    sequences = list(tokenize(read_documents(str(demo / "heldout.jsonl")), teacher.tokenizer, HELD_OUT_TOKENS))
    found = evaluate({name: load_model(demo / name) for name in STUDENTS}, teacher, sequences)
    summaries = {name: json.loads((demo / name / "summary.json").read_text()) for name in STUDENTS}
    facts = info(open_store(demo / "store.zarr"))
    built = re.search(r"at ([\d,]+) tokens/s", (demo / "build.txt").read_text())

    per_token = facts["bytes_per_token"]
    once = facts["vocabulary_bytes"] / facts["positions"]
    print(
        f"\nstore: {facts['documents']:,} documents, {facts['positions']:,} positions, {per_token:.1f} bytes per token"
    )
    print(f"       ({per_token - once:.1f} without the vocabulary, which is kept once however many tokens there are)")
    print(f"       built at {built[1]} tokens/s" if built else "       nothing was computed")
    positions = found["distilled"].positions
    print(f"held out: {len(sequences)} documents, {positions:,} positions; KL(teacher || student) in nats\n")
    row = "{:<14} {:>6} {:>9} {:>7} {:>7} {:>8} {:>10} {:>11}"
    print(row.format("student", "steps", "tokens/s", "hits", "misses", "KL", "agreement", "perplexity"))
    for name in STUDENTS:
        run, e = summaries[name], found[name]
        speed = f"{run['tokens_per_second']:,.0f}" if run["steps"] else "-"
        count = run["count"]
        scores = f"{e.kl:.3f}", f"{e.agreement:.1%}", f"{e.perplexity:,.1f}"
        print(row.format(name, run["steps"], speed, count["hits"], count["misses"], *scores))

    ce, kd = found["cross-entropy"], found["distilled"]
    nearer = kd.kl < ce.kl and kd.agreement > ce.agreement
    verdict = "nearer to the teacher than" if nearer else "NOT nearer to the teacher, in KL and agreement both, than"
    print(f"\nThe distilled student is {verdict} the one trained by cross-entropy, after the same steps.")
    model, tokenizer = mlx_lm.load(str(demo / "distilled"))
    print(f"It writes: {PROMPT}{mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=24)!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
