"""The benchmark of the losses leaves none out, and counts what a kernel must move at the least."""

from typing import Any

import distill_kernels
from distill_kernels import BucketLoss, DenseLoss, LogitsLoss, RowLoss, SampledLoss, TaidLoss, WeightedLoss
from distill_kernels.divergence import ForwardKL

import mlx.core as mx
import pytest

from tests.emulation import needs_compiler
from tools import bench_losses
from tools.bench_loss_bytes import LOSSES, found, measure

NO_KERNEL_OF_ITS_OWN = {RowLoss, LogitsLoss, WeightedLoss, TaidLoss}
PUBLIC = [getattr(distill_kernels, name) for name in distill_kernels.__all__]


@needs_compiler
def test_no_kernel_moves_less_than_it_must_and_a_sparse_one_hardly_more() -> None:
    entries = measure(vocab=1000, dtypes=("float32",))
    ways = {(m["kernel"], m["direction"]) for m in entries}
    assert {(name, way) for name in LOSSES for way in ("forward", "backward")} <= ways
    assert {"mlx-lm KL", "mlx-lm JS", "select threshold:16", "select top-k:50", "log Z"} <= {name for name, _ in ways}
    for m in entries:
        assert m["logits_read"] >= m["least_read"] >= 4000, m
        assert m["written"] >= m["least_written"] == (4000 if m["direction"] == "backward" else 0), m
    assert all(len(row) == len(table.table.header) for table in found(entries).tables for row in table.table.rows)


def test_every_public_loss_and_divergence_is_counted() -> None:
    losses = {p for p in PUBLIC if isinstance(p, type) and issubclass(p, RowLoss)} - NO_KERNEL_OF_ITS_OWN
    assert losses == {type(case.loss) for case in LOSSES.values()}
    divergences = {
        p for p in PUBLIC if isinstance(p, type) and {"value", "slope"} <= set(vars(p)) and not issubclass(p, RowLoss)
    }
    assert ForwardKL in divergences
    for family in (BucketLoss, SampledLoss, DenseLoss):
        counted = {type(case.loss.divergence) for case in LOSSES.values() if type(case.loss) is family}
        assert counted == divergences


@pytest.mark.parametrize("name", [*bench_losses.OURS, bench_losses.BASE, *bench_losses.THEIRS])
def test_every_variant_has_a_finite_value_and_gradient(name: str) -> None:
    result = bench_losses.run(name, "ops", 2, 1000, "float32")
    assert result["by"] and all(result[way]["peak_mb"] > 0 for way in ("forward", "both"))
    z = mx.random.normal((2, 1000))
    made: Any = bench_losses.ours(name, "ops", z) if name in bench_losses.OURS else bench_losses.theirs(name, z)
    value, gradient = mx.value_and_grad(made[0])(z)
    assert mx.isfinite(value) and mx.isfinite(gradient).all() and abs(gradient.sum()) < 1e-5


def test_a_variant_that_fails_says_so_in_its_table() -> None:
    ran = {"forward": {"cpu_s": 1.0, "peak_mb": 2.0}, "both": {"cpu_s": 2.0, "peak_mb": 3.0}, "by": "autodiff"}
    runs: list[dict[str, Any]] = [
        {"name": bench_losses.BASE, "tier": "MLX", **ran},
        {"name": "x", "tier": "metal", "failed": "refused"},
    ]
    assert bench_losses.against(runs, "cpu_s").rows[1][:3] == ("x", "metal", "failed")
