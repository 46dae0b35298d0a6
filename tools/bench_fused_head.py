"""The fused head beside dense KL: memory and time of loss and gradient, each variant in a process of its own.

Dense KL is the student's whole logits, the teacher's, and `nn.losses.kl_div_loss` of their log-softmax: [N, V] each.
The fused head reads 16 entries per position and makes a chunk of logits at a time, in `chunked_sum` (one pass) or
`chunked` (logits again for the gradient). Time is processor time of one core, whoever else uses the machine; a matrix
multiplication on two contended cores waits for both at every block, and many small ones suffer most.
"""

import json
import sys
from collections.abc import Callable

from distill_kernels import Head, SparseKL, chunk_rows, chunked, chunked_sum

import mlx.core as mx
import mlx.nn as nn

from logitstore.figure import Table
from tools.bench_parts import Found, Measured, Target, Titled, child, spent

ROWS, VOCAB, WIDTH, ENTRIES = 2048, 151_936, 1024, 16
PEAK_ROWS = (512, 1024, ROWS)
TIME_CHUNKS = (64, 256)
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
WAYS = ("dense", "one pass", "recompute")


class Student(nn.Module):
    """Nothing but an LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Identity()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.model(tokens))


def measure() -> Measured:
    """Every variant at full size; the one pass at other N, and with other chunks."""
    runs = [(way, head, ROWS, chunk_rows(VOCAB)) for way in WAYS for head in ("frozen", "trained")]
    runs += [("one pass", head, n, chunk_rows(VOCAB)) for head in ("frozen", "trained") for n in PEAK_ROWS if n < ROWS]
    runs += [("one pass", head, PEAK_ROWS[0], n) for head in ("frozen", "trained") for n in TIME_CHUNKS]
    return {"runs": [variant(*run) for run in runs]}


def variant(way: str, head: str, rows: int, per_chunk: int) -> Measured:
    """One of them, in a process of its own."""
    found = child(["-m", "tools.bench_fused_head", way, head, str(rows), str(per_chunk)], ONE_THREAD)
    print(f"{way}, head {head}, {rows} rows: {found['cpu_s']:.1f} s, {found['peak_mb']:,.0f} MB", file=sys.stderr)
    return {"way": way, "head": head, "rows": rows, "per_chunk": per_chunk, **found}


def run(way: str, trained: bool, rows: int, per_chunk: int) -> Measured:
    """Loss and gradient once, after a small one to warm up."""
    mx.random.seed(0)
    model = Student()
    if not trained:
        model.freeze()
    mx.eval(model.parameters())
    for n in (32, rows):
        hidden = mx.random.normal((n, WIDTH))
        loss, constants = (dense_kl if way == "dense" else fused_kl(way, per_chunk))(Head(model), n)
        before = model.trainable_parameters()
        step = mx.value_and_grad(lambda p, h, f=loss: (model.update(p), f(h))[1], argnums=(0, 1))
        mx.eval(hidden, *constants)
        mx.clear_cache()
        mx.reset_peak_memory()
        took = spent(lambda step=step, p=before, h=hidden: mx.eval(step(p, h)))
        model.update(before)
    return {"cpu_s": took.cpu_s, "peak_mb": mx.get_peak_memory() / 1e6, "head_mb": model.lm_head.weight.nbytes / 1e6}


Made = tuple[Callable[[mx.array], mx.array], list[mx.array]]


def dense_kl(head: Head, rows: int) -> Made:
    """KL to a teacher's whole logits, as it is usually written, and what it holds."""
    teacher = mx.random.normal((rows, VOCAB))

    def loss(hidden: mx.array) -> mx.array:
        log_q, log_p = nn.log_softmax(head(hidden), axis=-1), nn.log_softmax(teacher, axis=-1)
        return nn.losses.kl_div_loss(log_q, log_p).mean()

    return loss, [teacher]


def fused_kl(way: str, per_chunk: int) -> Callable[[Head, int], Made]:
    """0.9 KL to sparse targets + 0.1 cross-entropy, and what it holds."""

    def made(head: Head, rows: int) -> Made:
        ids = mx.random.randint(0, VOCAB, (rows, ENTRIES))
        weights = mx.softmax(mx.random.normal((rows, ENTRIES)), axis=-1)
        constants = [ids, weights, mx.random.randint(0, VOCAB, (rows,))]
        shares = [mx.full((rows,), 0.9 / rows), mx.full((rows,), 0.1 / rows)]

        def one_pass(hidden: mx.array) -> mx.array:
            return chunked_sum(SparseKL(), hidden, head, constants, shares, per_chunk)[0]

        def recompute(hidden: mx.array) -> mx.array:
            kl, ce = chunked(SparseKL(), hidden, head, constants, per_chunk)
            return (0.9 * kl + 0.1 * ce).mean()

        return (one_pass if way == "one pass" else recompute), [*constants, *shares]

    return made


def found(measured: Measured) -> Found:
    """Memory and time against dense KL, and peaks over N."""
    runs = measured["runs"]
    full, chunk = [r for r in runs if r["rows"] == ROWS], chunk_rows(VOCAB)
    dense = {r["head"]: r for r in full if r["way"] == "dense"}
    against = Table(
        ("loss + gradient", "head", "peak, MB", "of dense", "without the weights, MB", "CPU s", "of dense"),
        tuple(
            (
                r["way"],
                r["head"],
                f"{r['peak_mb']:,.0f}",
                f"1/{dense[r['head']]['peak_mb'] / r['peak_mb']:.1f}",
                f"{r['peak_mb'] - r['head_mb']:,.0f}",
                f"{r['cpu_s']:.1f}",
                f"{r['cpu_s'] / dense[r['head']]['cpu_s']:.2f}",
            )
            for r in full
        ),
    )
    over = [r for r in runs if r["way"] == "one pass" and r["per_chunk"] == chunk]
    peaks = Table(
        ("head", *(f"N = {n:,}" for n in PEAK_ROWS)),
        tuple(
            (head, *(f"{r['peak_mb']:,.0f}" for n in PEAK_ROWS for r in over if (r["head"], r["rows"]) == (head, n)))
            for head in dense
        ),
    )
    small = sorted((r for r in runs if r["rows"] == PEAK_ROWS[0]), key=lambda r: (r["head"], r["per_chunk"]))
    chunks = Table(
        ("head", "rows per chunk", "peak, MB", "CPU s"),
        tuple((r["head"], str(r["per_chunk"]), f"{r['peak_mb']:,.0f}", f"{r['cpu_s']:.1f}") for r in small),
    )
    size = f"V = {VOCAB:,}, D = {WIDTH:,}, float32"
    targets = []
    for one in (r for r in full if r["way"] == "one pass"):
        name, whole = f"fused head, {one['head']}", dense[one["head"]]
        growth = [r["peak_mb"] for r in over if r["head"] == one["head"]]
        targets += [
            Target.at_most(f"{name}: peak against dense KL", 0.125, one["peak_mb"] / whole["peak_mb"], ".3f"),
            Target.at_most(f"{name}: time against dense KL", 0.7, one["cpu_s"] / whole["cpu_s"], ".2f"),
            Target.at_most(
                f"{name}: peak at N = {ROWS:,} against {PEAK_ROWS[0]}", 1.05, max(growth) / min(growth), ".3f"
            ),
        ]
    return Found(
        [
            Titled("Fused head against dense KL", f"N = {ROWS:,}, {size}, {chunk} rows a chunk.", against),
            Titled("Peak memory of one pass over N, MB", f"{size}, {chunk} rows a chunk; the weights included.", peaks),
            Titled("Chunk sizes, one pass", f"N = {PEAK_ROWS[0]}, {size}.", chunks),
        ],
        targets,
    )


if __name__ == "__main__":
    way, head, rows, per_chunk = sys.argv[1:]
    print(json.dumps(run(way, head == "trained", int(rows), int(per_chunk))))
