"""A loss on the tier that runs here: the Metal kernel on an Apple GPU, plain MLX elsewhere."""

from typing import Literal

from distill_kernels.coded import CodedLoss
from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.metal import on_metal
from distill_kernels.row_loss import RowLoss

import mlx.core as mx

Tier = Literal["ops", "metal"]


def on_tier(loss: RowLoss, tier: Tier | None = None) -> RowLoss:
    """Return the loss as plain MLX or as its Metal twin: the tier asked for, or else the one that `metal.why` tells.

    A loss that is its user's own, or of a divergence of their own, runs as they wrote it, unless `tier` asks for Metal.

    Raises:
        TypeError: `tier` is "metal", and the loss has no kernel.
    """
    metal = on_metal() if tier is None else tier == "metal"
    if not metal or not isinstance(loss, (LogitsLoss, CodedLoss)):
        return loss
    from distill_kernels.dense import DenseLoss
    from distill_kernels.dense_metal import DenseKernel
    from distill_kernels.sparse_metal import SparseKernel

    try:
        return DenseKernel.of(loss) if isinstance(loss, DenseLoss) else SparseKernel.of(loss)
    except TypeError:
        if tier is not None:
            raise
        return loss


def kd_and_ce(
    loss: LogitsLoss, tier: Tier | None, logits: mx.array, *targets: mx.array, row_weights: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return the loss's (kd, ce), each [N], on a tier, over its targets and, where there are any, weights of rows."""
    rows = targets if row_weights is None else (*targets, row_weights)
    kd, ce = on_tier(loss, tier)(logits, *rows)
    return kd, ce
