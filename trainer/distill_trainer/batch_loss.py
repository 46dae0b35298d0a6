"""The loss of a batch: what a step takes the gradient of, and the means that are shown."""

import distill_kernels
from distill_kernels import on_tier

import mlx.core as mx

from distill_trainer.batches import Batch
from distill_trainer.loss_values import loss_values, outputs
from distill_trainer.losses import AnyLoss
from distill_trainer.spans import OfSpans


def batch_loss(head: distill_kernels.Head, losses: AnyLoss, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Mean over trained positions of kd_weight · KL + ce_weight · CE; mean KL where there are targets; mean CE.

    Where positions have weights w, these are sum(w l) / sum(w); kd_weight and ce_weight hold them already.
    The logits of a chunk of positions exist at a time, never [batch, length, vocab].
    """
    if head.reason is None and not isinstance(losses, OfSpans):
        constants = [getattr(batch, name) for name in losses.names]
        shares = batch.kd_weight / batch.weight, batch.ce_weight / batch.weight
        total, (kl, ce) = distill_kernels.chunked_sum(on_tier(losses), outputs(head, batch), head, constants, shares)
    else:
        kl, ce = loss_values(head, losses, batch)
        each = mx.where(batch.kd_weight > 0, batch.kd_weight * kl, 0) + batch.ce_weight * ce
        total = each.mean() if batch.row_weights is None else each.sum() / batch.weight
    answered, there = batch.kd_weight > 0, batch.answered_weight
    if batch.row_weights is None:
        return total, mx.where(answered, kl, 0).sum() / mx.maximum(there, 1), ce.mean()
    kl, ce = kl * batch.row_weights, ce * batch.row_weights
    return total, mx.where(answered, kl, 0).sum() / mx.where(there > 0, there, 1), ce.sum() / batch.weight
