"""What the kernels of all losses take and begin with, and the Metal of what lies between raw logits and a softmax."""

import math

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.metal import as_ids, dense
from distill_kernels.row_loss import Arrays

import mlx.core as mx

Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]


def loss_inputs(
    loss: LogitsLoss, own: float, logits: mx.array, labels: mx.array, row_weights: mx.array | None
) -> dict[str, mx.array]:
    """What every loss's kernels take, by name; the logits as they lie in memory.

    Args:
        own: the loss's own number: beta, lambda, or a margin (inf for none).
    """
    (n, width), logs = logits.shape, (math.log(own), math.log1p(-own)) if 0 < own < 1 else (0.0, 0.0)
    options = [loss.temperature, loss.scale, loss.softcap or 0.0, own, *logs]
    return {
        "logits": logits,
        "labels": as_ids(labels),
        "row_weights": mx.ones(n) if row_weights is None else dense(row_weights, mx.float32),
        "options": mx.array(options, mx.float32),
        "sizes": mx.array([min(width, loss.vocab_size or width), width], mx.uint32),
    }


def gradient_inputs(saved: Arrays, cotangents: Arrays) -> dict[str, mx.array]:
    """What a gradient takes beside these, without gaps: a cotangent is often one number, broadcast."""
    arrays = saved[0], *cotangents
    return {name: mx.contiguous(array) for name, array in zip(("saved", "ct_kd", "ct_ce"), arrays, strict=True)}


def loss_outputs(n: int) -> Outputs:
    """What a forward kernel writes of n rows."""
    return {"kd": ((n,), mx.float32), "ce": ((n,), mx.float32), "saved": ((n, 4), mx.float32)}


FINAL = """
// A loss's own number, and the logarithms of it and of 1 - it, where it is the weight of a mixture.
struct Parameter {
    float value;
    float log_value;
    float log_rest;
};

// The model's logit from the head's raw output: scaled, then capped where there is a cap.
struct Final {
    float scale;
    float softcap;

    float operator()(float raw) const {
        const float z = raw * scale;
        return softcap > 0.0f ? softcap * metal::precise::tanh(z / softcap) : z;
    }

    // Its derivative with respect to the raw output.
    float slope(float final) const {
        const float share = softcap > 0.0f ? final / softcap : 0.0f;
        return scale * (1.0f - share * share);
    }
};
"""

LOSS = """
    const float temperature = options[0];
    const bool tempered = temperature != 1.0f;
    const Final final_of = {options[1], options[2]};
    const Parameter parameter = {options[3], options[4], options[5]};
    const float row_weight = row_weights[n];
    const uint label = labels[n];
"""
"""After `ROW`: the numbers of `loss_inputs`."""

MASKED_FORWARD = """
    if (row_weight == 0.0f) {
        if (tid == 0) {
            kd[n] = 0.0f;
            ce[n] = 0.0f;
            for (uint i = 0; i < 4; i++) {
                saved[size_t(n) * 4 + i] = 0.0f;
            }
        }
        return;
    }
"""

MASKED_BACKWARD = """
    const uint width = sizes[1];
    const auto into = gradient + size_t(n) * width;
    const float ct = row_weight * ct_kd[n];
    const float b = label < vocab ? row_weight * ct_ce[n] : 0.0f;
    if (row_weight == 0.0f || (ct == 0.0f && b == 0.0f)) {
        for (uint v = tid; v < width; v += threads) {
            into[v] = T(0.0f);
        }
        return;
    }
"""
