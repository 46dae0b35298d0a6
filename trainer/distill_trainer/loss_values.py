"""The losses of a batch's positions, one by one, with a gradient that computes a chunk's logits a second time."""

import distill_kernels
from distill_kernels import on_tier

import mlx.core as mx

from distill_trainer.batches import Batch
from distill_trainer.losses import AnyLoss
from distill_trainer.packing import kept_apart
from distill_trainer.spans import OfSpans


def loss_values(head: distill_kernels.Head, losses: AnyLoss, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return (distillation loss, cross-entropy) of a batch's rows, float32 [N] each."""
    out, constants = outputs(head, batch), [getattr(batch, name) for name in losses.names]
    if isinstance(losses, OfSpans):
        return losses.values(head, out, *constants)
    loss = on_tier(losses)
    kd, ce = loss(out, *constants) if head.reason else distill_kernels.chunked(loss, out, head, constants)
    return kd, ce


def outputs(head: distill_kernels.Head, batch: Batch) -> mx.array:
    """What the model says at a batch's rows: hidden states [N, D], or logits [N, V] where its head is part of it."""
    cache = () if batch.documents is None else (kept_apart(head.model, batch.documents),)
    out = head.model(batch.tokens, *cache) if head.reason else head.trunk(batch.tokens, *cache)
    return out.reshape(-1, out.shape[-1])[batch.rows]
