"""What only a Mac can show: that Apple's compiler takes every kernel, and that a GPU computes what plain MLX does.

On any other machine these are skipped; there the same kernels are executed by the emulator (test_metal_losses.py).
"""

from typing import Any

import distill_kernels
from distill_kernels.coded import CodedLoss
from distill_kernels.sparse_kl import SparseKL
from distill_kernels.tier import on_tier

import mlx.core as mx
import numpy as np
import pytest

from tests.loss_cases import on_mlx
from tests.test_metal_losses import CASES, DTYPES, VOCABULARIES, rows_of

pytestmark = pytest.mark.skipif(not mx.metal.is_available(), reason="this machine has no Apple GPU")


def values_and_gradient(loss: Any, logits: mx.array, rows: list[mx.array]) -> list[mx.array]:
    ones = mx.ones(len(logits))
    losses, gradients = mx.vjp(lambda z: list(loss(z, *rows)), [logits], [ones, ones])
    return [a.astype(mx.float32) for a in (*losses, gradients[0])]


def test_kernels_are_what_runs_here() -> None:
    assert distill_kernels.why() == "Metal kernels: MLX's default device is an Apple GPU"


@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "k"), VOCABULARIES)
@pytest.mark.parametrize("name", CASES)
def test_the_gpu_agrees_with_plain_mlx(name: str, vocab: int, k: int, dtype: mx.Dtype, compiled: bool) -> None:
    for n in (2, 9):
        loss = CASES[name].loss(2.0)
        z, rows = rows_of(loss, n, vocab, k, 2.0)
        logits, on_gpu = mx.array(z.astype(np.float32)).astype(dtype), on_mlx(rows)
        for _ in range(20):  # a race would show itself sometimes
            run = mx.compile(values_and_gradient) if compiled else values_and_gradient
            found, wanted = run(on_tier(loss, "metal"), logits, on_gpu), values_and_gradient(loss, logits, on_gpu)
            for ours, theirs in zip(found, wanted, strict=True):
                rounding = 1e-5 if dtype == mx.float32 else 2.0**-7
                assert mx.allclose(ours, theirs, rtol=rounding, atol=1e-5 + rounding * float(mx.abs(theirs).max()))


def test_the_gpu_decodes_codes() -> None:
    rng = np.random.default_rng(0)
    ids = mx.array(np.stack([rng.choice(1000, 16, replace=False) for _ in range(9)]).astype(np.uint32))
    codes = mx.array(rng.integers(40, 255, (9, 16)).astype(np.uint8))
    rows = [ids, codes, mx.full(9, 5, mx.uint32), mx.zeros(9, mx.uint8), mx.zeros(9, mx.int32)]
    z, loss = mx.random.normal((9, 1000)), CodedLoss(SparseKL(), "threshold")
    for ours, theirs in zip(*(values_and_gradient(on_tier(loss, t), z, rows) for t in ("metal", "ops")), strict=True):
        assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
