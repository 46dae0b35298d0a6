"""Bytes that each Metal kernel reads and writes per row, counted by the emulator's loads and stores.

Beside them stands what is possible at the least: every logit that a direction needs read once, every cell of the
gradient written once. mlx-lm's own kernels of dense KL and JS are counted the same way. Says nothing of speed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from distill_kernels import (
    JSD,
    TVD,
    BucketKL,
    BucketLoss,
    CodedLoss,
    DenseLoss,
    ForwardKL,
    HingeRank,
    LogisticRank,
    LogitsLoss,
    ReverseKL,
    RowLoss,
    SampledLoss,
    SkewKL,
    SkewReverseKL,
    SoftCE,
    SparseKL,
    metal,
    on_tier,
)
from distill_kernels.select_metal import log_z_kernel, select_threshold_kernel, select_top_k_kernel

import mlx.core as mx

from logitstore.figure import Table
from tools.bench_parts import Found, Measured, Target, Titled
from tools.metal_emulator import Emulated, Run, emulated

ROWS, VOCAB, SAMPLED, TRUNCATED = 2, 49_152, 16, 50
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
SLACK = 1.05
DIVERGENCES = (ForwardKL(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), TVD())
LOGITS = {"logits", "teacher_logits", "logits_q", "logits_p"}
"""What the arguments as wide as the vocabulary are called."""


@dataclass(frozen=True)
class Case:
    """A loss and its entries per row."""

    loss: LogitsLoss | CodedLoss
    k: int = TRUNCATED

    @property
    def sparse(self) -> bool:
        """Whether the student's logits are the only ones."""
        return not isinstance(self.loss, DenseLoss)


LOSSES = {
    "sparse KL": Case(SparseKL(), SAMPLED),
    "sparse KL, codes": Case(CodedLoss(SparseKL(), "threshold"), SAMPLED),
    "soft cross-entropy": Case(SoftCE(), SAMPLED),
    "hinge": Case(HingeRank()),
    "logistic": Case(LogisticRank()),
    "bucket KL": Case(BucketKL()),
    "bucket KL, codes": Case(CodedLoss(BucketKL(), "cells")),
    **{f"bucket {type(d).__name__}": Case(BucketLoss(divergence=d)) for d in DIVERGENCES},
    **{f"sampled {type(d).__name__}": Case(SampledLoss(divergence=d), SAMPLED) for d in DIVERGENCES},
    **{f"dense {type(d).__name__}": Case(DenseLoss(divergence=d)) for d in DIVERGENCES},
}
"""Every loss that has a kernel."""


def targets_of(loss: LogitsLoss | CodedLoss, rows: int, vocab: int, k: int) -> list[mx.array]:
    """Made-up rows of a loss: distinct ids; weights that sum to 1, or to 0.9 beside a tail."""
    apart = vocab // k
    share = 0.9 if "log_tail_mass" in loss.names else 1.0
    weights = share * mx.softmax(mx.random.normal((rows, k)), axis=-1)
    made = {
        "ids": (mx.arange(k)[None] * apart + mx.random.randint(0, apart, (rows, 1))).astype(mx.uint32),
        "weights": weights,
        "log_probs": mx.log(weights / 2),
        "log_tail_mass": mx.log(mx.full(rows, 1 - 0.9)),
        "codes": mx.random.randint(80, 255, (rows, k)).astype(mx.uint8),
        "head_count": mx.full(
            rows, k // 2 if isinstance(loss, CodedLoss) and loss.kind == "threshold" else k, mx.uint32
        ),
        "tail": mx.zeros(rows, mx.uint8),
        "teacher_logits": mx.random.normal((rows, vocab)),  # made only where a loss takes it
        "labels": mx.random.randint(0, vocab, (rows,)),
    }
    return [made[name] for name in loss.names]


def measure(vocab: int = VOCAB, rows: int = ROWS, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Measured]:
    """One entry for each kernel, direction and type of the logits."""
    return [entry for dtype in dtypes for entry in (*_ours(vocab, rows, dtype), *_of_mlx_lm(vocab, rows, dtype))]


def _ours(vocab: int, rows: int, dtype: str) -> Iterator[Measured]:
    logits = mx.random.normal((rows, vocab), key=mx.random.key(0)).astype(DTYPES[dtype])
    with _emulator() as session:
        for name, case in LOSSES.items():
            targets = targets_of(case.loss, rows, vocab, case.k)
            if not case.sparse:
                targets[0] = targets[0].astype(logits.dtype)
            _value_and_gradient(on_tier(case.loss, "metal"), logits, targets)
            yield from _entries(name, "sparse" if case.sparse else "dense", session, logits)
        labels, blocks = mx.zeros(rows, mx.int32), -(-vocab // 64)
        order = mx.broadcast_to(mx.arange(blocks), (rows, blocks))
        select_threshold_kernel(logits, labels, SAMPLED, 1.0, order, mx.zeros(rows, mx.int32))
        yield from _entries(f"select threshold:{SAMPLED}", "selection", session, logits)
        select_top_k_kernel(logits, labels, TRUNCATED, 1.0)
        yield from _entries(f"select top-k:{TRUNCATED}", "selection", session, logits)
        log_z_kernel(logits, (1.0, 2.0))
        yield from _entries("log Z", "selection", session, logits)


def _value_and_gradient(loss: RowLoss, logits: mx.array, targets: list[mx.array]) -> None:
    ones = mx.ones(len(logits))
    mx.eval(mx.vjp(lambda z: list(loss(z, *targets)), [logits], [ones, ones]))


def _of_mlx_lm(vocab: int, rows: int, dtype: str) -> Iterator[Measured]:
    """Their defects (ml-explore/mlx-lm#1700) do not change what they read."""
    import mlx_lm.tuner.losses as theirs

    student, teacher = mx.random.normal((2, rows, vocab), key=mx.random.key(0)).astype(DTYPES[dtype])
    with ExitStack() as stack:
        session = stack.enter_context(_emulator(raises=False))
        stack.enter_context(patch.object(theirs, "can_run_metal", lambda: True))
        for of in ("kl", "js"):
            for way in ("forward", "backward"):
                made = getattr(theirs, f"_make_{of}_{way}_kernel")()
                stack.enter_context(patch.object(theirs, f"_{of}_{way}_kernel", made))
        for name, loss in (("mlx-lm KL", theirs.kl_div_loss), ("mlx-lm JS", theirs.js_div_loss)):
            mx.eval(mx.grad(lambda z, f=loss: f(z, teacher).sum())(student))
            yield from _entries(name, "dense", session, student)


@contextmanager
def _emulator(raises: bool = True) -> Iterator[Emulated]:
    metal.kernel_of.cache_clear()
    with emulated(raises=raises) as session:
        yield session
    metal.kernel_of.cache_clear()


def _entries(name: str, kind: str, session: Emulated, logits: mx.array) -> Iterator[Measured]:
    """Forward and backward of what has run since the last call, per row; the launches of a direction together."""
    rows, vocab = logits.shape
    once = vocab * logits.itemsize
    for way in ("forward", "backward"):
        runs = [run for run in session.runs if ("backward" in run.launch.name) == (way == "backward")]
        if not runs:
            continue
        logits_read = _total(runs, "loads", True) / rows
        yield {
            "kernel": name,
            "kind": kind,
            "direction": way,
            "dtype": str(logits.dtype).removeprefix("mlx.core."),
            "logits_read": logits_read,
            "least_read": once * (2 if kind == "dense" else 1),
            "rest_read": _total(runs, "loads", False) / rows,
            "written": _total(runs, "stores", False) / rows,
            "least_written": once if way == "backward" else 0,
        }
    session.runs.clear()


def _total(runs: list[Run], what: str, wide: bool) -> int:
    counts = [getattr(run, what) for run in runs]
    return sum(size for count in counts for name, size in count.items() if (name in LOGITS) == wide)


def found(measured: list[Measured]) -> Found:
    """A table of ratios, and the sparse losses' as targets."""
    by_kernel: dict[tuple[str, str], list[Measured]] = {}
    for m in sorted(measured, key=lambda m: ("sparse", "dense", "selection").index(m["kind"])):
        by_kernel.setdefault((m["kernel"], m["direction"]), []).append(m)
    header = (
        "kernel",
        "way",
        "reads, KB",
        "at least",
        "ratio",
        "in bf16",
        "writes, KB",
        "at least",
        "ratio",
        "in bf16",
    )
    table = Table((*header, "small, KB"), tuple(_row(group) for group in by_kernel.values()))
    targets = []
    sparse = [m for m in measured if m["kind"] == "sparse"]
    for way in ("forward", "backward"):
        worst = max(m["logits_read"] / m["least_read"] for m in sparse if m["direction"] == way)
        targets.append(Target.at_most(f"sparse {way}: logits read, of the least", SLACK, worst, ".4f"))
    worst = max(m["written"] / m["least_written"] for m in sparse if m["direction"] == "backward")
    targets.append(Target.at_most("sparse backward: gradient written, of the least", SLACK, worst, ".4f"))
    remark = (
        f"Counted by the emulator at V = {VOCAB:,}, float32 and then bfloat16; k = {SAMPLED} (sparse, sampled) or "
        f"{TRUNCATED}. Reads are of logits, the teacher's too where they are dense. Small: other arguments; a value "
        "that all threads read counts once for each of them, though a GPU fetches it once for many."
    )
    return Found([Titled("Bytes per row of every Metal kernel", remark, table)], targets)


def _row(group: list[Measured]) -> tuple[str, ...]:
    by_type = {m["dtype"]: m for m in group}
    full, half = by_type["float32"], by_type.get("bfloat16")
    cells = [full["kernel"], full["direction"]]
    for reached, least in (("logits_read", "least_read"), ("written", "least_written")):
        cells += [_kilobytes(full[reached]), _kilobytes(full[least])]
        cells += [f"{m[reached] / m[least]:.3f}" if m and m[least] else "" for m in (full, half)]
    return (*cells, _kilobytes(full["rest_read"]))


def _kilobytes(size: float) -> str:
    return f"{size / 1e3:,.1f}"
