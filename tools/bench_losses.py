"""The losses beside dense KL and JS as others compute them: time and peak memory; and bytes per row of every kernel.

Each variant runs in a process of its own: forward, which is the mean loss over the rows, and with the gradient by the
logits. On an Apple GPU our losses run on both tiers and time is wall time; on a CPU only plain MLX runs, time is
processor time of one core, and `bench_loss_bytes` counts what the kernels read and write. Peaks include the student's
logits, the teacher's where a loss takes them, and the gradient. Under `mx.compile`, as a training step is; on a CPU
`distill_kernels` turns that off.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

from distill_kernels import (
    JSD,
    BucketKL,
    BucketLoss,
    CodedLoss,
    DenseLoss,
    LogitsLoss,
    SparseKL,
    on_cpu,
    on_tier,
    why,
)

import mlx.core as mx
import mlx.nn as nn

from logitstore.figure import Table
from tools import bench_loss_bytes
from tools.bench_loss_bytes import targets_of
from tools.bench_parts import ROUNDS, Found, Measured, Titled, child, spent
from tools.metal_emulator import compiler

SAMPLED, TRUNCATED = bench_loss_bytes.SAMPLED, bench_loss_bytes.TRUNCATED
CPU_SIZES, GPU_SIZES = ((256, 49_152), (64, 151_936)), ((2048, 49_152), (512, 151_936))
CPU_TYPES, GPU_TYPES = ("float32",), ("float32", "bfloat16")
GPU_ROUNDS = 20
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
OURS: dict[str, LogitsLoss | CodedLoss] = {
    f"sparse KL, k = {SAMPLED}": SparseKL(),
    f"sparse KL, k = {SAMPLED}, from codes": CodedLoss(SparseKL(), "threshold"),
    f"bucket KL, k = {TRUNCATED}": BucketKL(),
    f"bucket JSD, k = {TRUNCATED}": BucketLoss(divergence=JSD()),
    "dense KL": DenseLoss(),
    "dense JSD": DenseLoss(divergence=JSD()),
}
BASE = "nn.losses.kl_div_loss of log_softmax"
GATHERED = f"autodiff of a gathered KL, k = {SAMPLED}"
THEIRS = ("mlx-lm kl_div_loss", "mlx-lm js_div_loss", GATHERED)
MLX = "MLX"
FALLBACK = "its fallback"
Loss = Callable[[mx.array], mx.array]


def measure() -> Measured:
    """Every variant at every size; where there is no Apple GPU, the bytes of the kernels too."""
    tiers = ("ops", "metal") if apple_gpu() else ("ops",)
    variants = [(BASE, MLX), *product(OURS, tiers), *((name, MLX) for name in THEIRS)]
    shapes = product(CPU_TYPES, CPU_SIZES) if on_cpu() else product(GPU_TYPES, GPU_SIZES)
    runs = [variant(*v, rows, vocab, dtype) for dtype, (rows, vocab) in shapes for v in variants]
    return {"why": why(), "clock": "cpu_s" if on_cpu() else "wall_s", "runs": runs, "bytes": counted()}


def apple_gpu() -> bool:
    """Whether MLX computes on one here."""
    return bool(mx.metal.is_available()) and not on_cpu()


def counted() -> list[Measured]:
    """Bytes of every kernel; none where there is an Apple GPU, or no compiler for the emulator."""
    return bench_loss_bytes.measure() if not apple_gpu() and compiler() is not None else []


def variant(name: str, tier: str, rows: int, vocab: int, dtype: str) -> Measured:
    """One of them, in a process of its own; a failure is a result too."""
    what = {"name": name, "tier": tier, "rows": rows, "vocab": vocab, "dtype": dtype}
    try:
        result = child(["-m", "tools.bench_losses", *map(str, what.values())], ONE_THREAD)
    except subprocess.CalledProcessError as error:
        result = {"failed": f"exit code {error.returncode}"}
    print(*what.values(), result, sep=", ", file=sys.stderr)
    return {**what, **result}


def run(name: str, tier: str, rows: int, vocab: int, dtype: str) -> Measured:
    """Time and peak memory of forward, and of value and gradient."""
    mx.random.seed(0)
    kind = getattr(mx, dtype)
    logits = mx.random.normal((rows, vocab)).astype(kind)
    loss, constants, by = ours(name, tier, logits) if name in OURS else theirs(name, logits)
    mx.eval(logits, constants)
    result: Measured = {"by": by, "logits_mb": logits.nbytes / 1e6}

    def step(compiled: Callable[[mx.array], object]) -> None:
        mx.eval(compiled(logits))

    for way, function in (("forward", loss), ("both", mx.value_and_grad(loss))):
        compiled = mx.compile(function)
        step(compiled)
        mx.clear_cache()
        mx.reset_peak_memory()
        times = [spent(partial(step, compiled)) for _ in range(ROUNDS if on_cpu() else GPU_ROUNDS)]
        result[way] = {
            "cpu_s": median(t.cpu_s for t in times),
            "wall_s": median(t.wall_s for t in times),
            "peak_mb": mx.get_peak_memory() / 1e6,
        }
    return result


Made = tuple[Loss, list[mx.array], str]


def ours(name: str, tier: str, logits: mx.array) -> Made:
    """A loss of `distill_kernels` on a tier, and what it holds. Cross-entropy, which it has too, goes unused."""
    rows, vocab = logits.shape
    k = SAMPLED if name.startswith("sparse") else TRUNCATED
    targets = targets_of(OURS[name], rows, vocab, k)
    if isinstance(OURS[name], DenseLoss):
        targets[0] = targets[0].astype(logits.dtype)
    loss = on_tier(OURS[name], "metal" if tier == "metal" else "ops")
    return (lambda z: loss(z, *targets)[0].mean()), targets, {"metal": "Metal kernel", "ops": "plain MLX"}[tier]


def theirs(name: str, logits: mx.array) -> Made:
    """What people write, and what it holds."""
    if name == GATHERED:
        rows, vocab = logits.shape
        ids, weights, _ = targets_of(SparseKL(), rows, vocab, SAMPLED)

        def gathered(z: mx.array) -> mx.array:
            log_q = mx.take_along_axis(z, ids, axis=-1) - mx.logsumexp(z, axis=-1, keepdims=True)
            return (weights * (mx.log(weights) - log_q)).sum(axis=-1).mean()

        return gathered, [ids, weights], "autodiff"
    teacher = mx.random.normal(logits.shape).astype(logits.dtype)
    if name == BASE:

        def plain(z: mx.array) -> mx.array:
            log_q, log_p = nn.log_softmax(z, axis=-1), nn.log_softmax(teacher, axis=-1)
            return nn.losses.kl_div_loss(log_q, log_p, axis=-1).mean()

        return plain, [teacher], "autodiff"
    from mlx_lm.tuner import losses

    function = getattr(losses, name.split()[1])
    by = "its Metal kernel" if losses.can_run_metal() else FALLBACK
    return (lambda z: function(z, teacher).mean()), [teacher], by


def found(measured: Measured) -> Found:
    """Time and memory against dense KL at every size, and the bytes of the kernels."""
    runs, clock = measured["runs"], measured["clock"]
    shapes = dict.fromkeys((r["rows"], r["vocab"], r["dtype"]) for r in runs)
    tier = (
        f"Only one tier runs here ({measured['why']})." if {r["tier"] for r in runs} <= {"ops", MLX} else "Both tiers."
    )
    time = "Processor time of one core" if clock == "cpu_s" else "Wall time"
    fallback = any(r.get("by") == FALLBACK for r in runs)
    remark = (
        f"{tier} {time}. Forward is the loss; both is loss and gradient. Of dense: of {BASE}. Peaks include logits, "
        f"targets and gradient. mlx-lm runs its {'fallback, nn.losses.kl_div_loss' if fallback else 'Metal kernels'}."
    )
    tables = [
        Titled(
            f"Losses at N = {rows:,}, V = {vocab:,}, {dtype}",
            remark,
            against([r for r in runs if (r["rows"], r["vocab"], r["dtype"]) == (rows, vocab, dtype)], clock),
        )
        for rows, vocab, dtype in shapes
    ]
    counts = bench_loss_bytes.found(measured["bytes"]) if measured["bytes"] else Found([])
    return Found([*tables, *counts.tables], counts.targets)


def against(runs: list[Measured], clock: str) -> Table:
    """The variants of one size; why one failed is in the JSON."""
    base = next(r for r in runs if r["name"] == BASE)
    header = ("loss", "by", "forward, ms", "of dense", "both, ms", "of dense", "peak forward, MB", "both", "of dense")
    return Table(header, tuple(_row(r, base, clock) for r in runs))


def _row(r: Measured, base: Measured, clock: str) -> tuple[str, ...]:
    if "failed" in r:
        return (r["name"], r["tier"], "failed", *[""] * 6)

    def of_dense(way: str, what: str) -> str:
        return "" if "failed" in base else f"{r[way][what] / base[way][what]:.2f}"

    times = [cell for way in ("forward", "both") for cell in (f"{1e3 * r[way][clock]:,.1f}", of_dense(way, clock))]
    peaks = [f"{r[way]['peak_mb']:,.0f}" for way in ("forward", "both")]
    return (r["name"], r["by"], *times, *peaks, of_dense("both", "peak_mb"))


if __name__ == "__main__":
    name, tier, rows, vocab, dtype = sys.argv[1:]
    try:
        print(json.dumps(run(name, tier, int(rows), int(vocab), dtype)))
    except RuntimeError as error:  # a kernel that the GPU's compiler refuses, or too little memory
        print(json.dumps({"failed": str(error)}))
