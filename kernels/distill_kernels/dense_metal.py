"""The dense losses as Metal kernels: student and teacher logits are each read twice forward and once backward.

A divergence of two whole rows needs both normalisers before its first cell, so forward takes two passes; its gradient
has them, and takes one. One threadgroup a row; nothing as wide as the vocabulary is kept but the gradient itself.
"""

from dataclasses import dataclass

from distill_kernels import divergence_metal
from distill_kernels.dense import DenseLoss
from distill_kernels.loss_source import (
    FINAL,
    LOSS,
    MASKED_BACKWARD,
    MASKED_FORWARD,
    Outputs,
    gradient_inputs,
    loss_inputs,
    loss_outputs,
)
from distill_kernels.metal import launch, threads_per_row
from distill_kernels.metal_source import COMMON, ROW
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import check_vectors

import mlx.core as mx

TEACHER = """
    const auto teacher = teacher_logits + long(n) * long(teacher_logits_strides[0]);
    const long teacher_step = long(teacher_logits_strides[1]);
"""

FORWARD = """
    Normaliser part = {NEGATIVE_INFINITY, 0.0f};
    Normaliser part_t = {NEGATIVE_INFINITY, 0.0f};
    Normaliser part_p = {NEGATIVE_INFINITY, 0.0f};
    for (uint first = tid * PER_THREAD; first < vocab; first += threads * PER_THREAD) {
        float z[PER_THREAD];
        float s[PER_THREAD];
        float s_p[PER_THREAD];
        for (uint i = 0; i < PER_THREAD; i++) {
            const uint v = first + i;
            z[i] = v < vocab ? final_of(float(row[long(v) * step])) : NEGATIVE_INFINITY;
            s[i] = z[i] / temperature;
            s_p[i] = v < vocab ? float(teacher[long(v) * teacher_step]) / temperature : NEGATIVE_INFINITY;
        }
        include<PER_THREAD>(part_t, s);
        include<PER_THREAD>(part_p, s_p);
        if (tempered) {
            include<PER_THREAD>(part, z);
        }
    }
    const float lse_t = group_log(part_t, parts, at);
    const float lse_p = group_log(part_p, parts, at);
    const float lse = tempered ? group_log(part, parts, at) : lse_t;

    float value = 0.0f;
    float slope = 0.0f;
    for (uint first = tid * PER_THREAD; first < vocab; first += threads * PER_THREAD) {
        for (uint v = first; v < metal::min(first + PER_THREAD, vocab); v++) {
            const float log_p = float(teacher[long(v) * teacher_step]) / temperature - lse_p;
            const float log_q = final_of(float(row[long(v) * step])) / temperature - lse_t;
            const Cell cell = cell_of(metal::precise::exp(log_p), log_p, log_q);
            value += cell_value(cell, parameter);
            slope += cell_slope(cell, parameter);
        }
    }
    value = group_sum(value, parts, at);
    slope = group_sum(slope, parts, at);
    if (tid == 0) {
        kd[n] = row_weight * temperature * temperature * value;
        ce[n] = label < vocab ? row_weight * (lse - final_of(float(row[long(label) * step]))) : 0.0f;
        saved[size_t(n) * 4] = lse;
        saved[size_t(n) * 4 + 1] = lse_t;
        saved[size_t(n) * 4 + 2] = lse_p;
        saved[size_t(n) * 4 + 3] = slope;
    }
"""

BACKWARD = """
    const float a = temperature * ct;
    const float lse = saved[size_t(n) * 4];
    const float lse_t = saved[size_t(n) * 4 + 1];
    const float lse_p = saved[size_t(n) * 4 + 2];
    const float total = saved[size_t(n) * 4 + 3];
    for (uint first = tid * PER_THREAD; first < width; first += threads * PER_THREAD) {
        for (uint v = first; v < metal::min(first + PER_THREAD, width); v++) {
            if (v >= vocab) {
                into[v] = T(0.0f);
                continue;
            }
            const float z = final_of(float(row[long(v) * step]));
            float dz = 0.0f;
            if (a != 0.0f) {
                const float log_p = float(teacher[long(v) * teacher_step]) / temperature - lse_p;
                const Cell cell = cell_of(metal::precise::exp(log_p), log_p, z / temperature - lse_t);
                dz = a * (cell_slope(cell, parameter) - cell.q * total);
            }
            if (b != 0.0f) {
                dz += b * (metal::precise::exp(z - lse) - (v == label ? 1.0f : 0.0f));
            }
            into[v] = T(dz * final_of.slope(z));
        }
    }
"""


@dataclass(frozen=True)
class DenseKernel(RowLoss):
    """The Metal twin of a `DenseLoss`: the same rows, values and gradients.

    Raises, when it is called:
        ValueError: the shapes do not fit.
        RuntimeError: there is no Metal here.
    """

    loss: DenseLoss

    @classmethod
    def of(cls, loss: DenseLoss) -> "DenseKernel":
        """The twin of a loss.

        Raises:
            TypeError: it, or its divergence, is a user's own.
        """
        if type(loss) is not DenseLoss:
            raise TypeError(f"{type(loss).__name__} has no Metal kernel")
        divergence_metal.functions(loss.divergence)
        return cls(loss)

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: (kd, ce), and [N, 4] of what a gradient needs."""
        body, outputs = MASKED_FORWARD + FORWARD, loss_outputs(len(logits))
        kd, ce, saved = self._launch("forward", body, self._inputs(logits, rows), outputs)
        return (kd, ce), (saved,)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        body, inputs = MASKED_BACKWARD + BACKWARD, self._inputs(logits, rows) | gradient_inputs(saved, cotangents)
        return self._launch("backward", body, inputs, {"gradient": (logits.shape, logits.dtype)})[0]

    def _inputs(self, logits: mx.array, rows: Arrays) -> dict[str, mx.array]:
        loss, (n, width) = self.loss, logits.shape
        (teacher, labels), row_weights = loss.parted(logits, rows, loss.names)
        teacher = loss.teacher_columns(teacher, (n, loss.vocab_size or width))
        check_vectors(logits, {"labels": labels})
        own = divergence_metal.parameter(loss.divergence)
        return {"teacher_logits": teacher, **loss_inputs(loss, own, logits, labels, row_weights)}

    def _launch(
        self,
        direction: str,
        body: str,
        inputs: dict[str, mx.array],
        outputs: Outputs,
    ) -> list[mx.array]:
        n, width = inputs["logits"].shape
        return launch(
            f"dense_{type(self.loss.divergence).__name__.lower()}_{direction}",
            inputs,
            outputs,
            ROW + LOSS + TEACHER + body,
            COMMON + FINAL + divergence_metal.functions(self.loss.divergence),
            rows=n,
            threads=threads_per_row(width),
            template=[("T", inputs["logits"].dtype)],
        )
