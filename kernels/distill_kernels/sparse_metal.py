"""The losses on sparse targets as Metal kernels: one threadgroup a row, one reading of the logits in each direction."""

from dataclasses import dataclass
from typing import Any

from distill_kernels.coded import CodedLoss, Kind
from distill_kernels.logits_loss import LogitsLoss
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
from distill_kernels.metal import VARIABLE, as_ids, dense, launch, threads_per_row
from distill_kernels.metal_source import COMMON, ROW
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import check_sparse
from distill_kernels.sparse_source import (
    BACKWARD,
    CELLS,
    CODES,
    DRAWS,
    EMPTY_TABLE,
    ENTRIES,
    FORWARD,
    TABLE,
    TAIL,
    WEIGHTS,
)
from distill_kernels.sparse_source_losses import LossSource, parameter_of, source_of

import mlx.core as mx

ROOMS = 32, 128, 1024
"""Entries of a row that a kernel is compiled for; the largest, with its table, fills 24 of a threadgroup's 32 KiB."""
MOST_KEPT = ROOMS[-1]


@dataclass(frozen=True)
class SparseKernel(RowLoss):
    """The Metal twin of a loss on sparse targets, or of a `CodedLoss`: the same rows, values and gradients.

    Raises, when it is called:
        ValueError: the shapes do not fit, or a row has more than 1,024 entries.
        RuntimeError: there is no Metal here.
    """

    loss: LogitsLoss
    kind: Kind | None = None
    """What codes stand for, where targets come as codes."""

    @classmethod
    def of(cls, loss: LogitsLoss | CodedLoss) -> "SparseKernel":
        """The twin of a loss.

        Raises:
            TypeError: it has no kernel.
        """
        kernel = cls(loss.loss, loss.kind) if isinstance(loss, CodedLoss) else cls(loss)
        source_of(kernel.loss)
        return kernel

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: (kd, ce), and [N, 4] of what a gradient needs."""
        source, inputs = source_of(self.loss), self._inputs(logits, rows)
        body = MASKED_FORWARD + self._load() + EMPTY_TABLE + FORWARD.replace("VALUE", source.value)
        kd, ce, saved = self._launch(source, "forward", body, inputs, loss_outputs(len(logits)), [("ADDS", False)])
        return (kd, ce), (saved,)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        source, inputs = source_of(self.loss), self._inputs(logits, rows) | gradient_inputs(saved, cotangents)
        body = MASKED_BACKWARD + self._load() + EMPTY_TABLE + BACKWARD.replace("GRADIENT", source.gradient)
        outputs = {"gradient": (logits.shape, logits.dtype)}
        template = [("ADDS", True), ("T", logits.dtype)]
        return self._launch(source, "backward", body, inputs, outputs, template)[0]

    def _inputs(self, logits: mx.array, rows: Arrays) -> dict[str, mx.array]:
        """The kernel's arguments by name; the logits as they lie in memory, what is small in rows without gaps."""
        names = self.loss.names if self.kind is None else CodedLoss.names
        targets, row_weights = self.loss.parted(logits, rows, names)
        named = dict(zip(names, targets, strict=True))
        check_sparse(logits, **{"weights" if name == "codes" else name: array for name, array in named.items()})
        k = named["ids"].shape[1]
        if k > MOST_KEPT:
            raise ValueError(f"{k:,} entries a row, expected at most {MOST_KEPT:,}; type {VARIABLE}=ops")
        own = {name: dense(array, _TYPES[name]) for name, array in named.items() if name in _TYPES}
        shared = loss_inputs(self.loss, parameter_of(self.loss), logits, named["labels"], row_weights)
        return {"ids": as_ids(named["ids"]), **own, **shared}

    def _load(self) -> str:
        """Where a row's entries come from."""
        if self.kind is None:
            return (TAIL if "log_tail_mass" in self.loss.names else "") + WEIGHTS
        return DRAWS if self.kind in ("counts", "draws") else CELLS

    def _launch(
        self,
        source: LossSource,
        direction: str,
        body: str,
        inputs: dict[str, mx.array],
        outputs: Outputs,
        template: list[tuple[str, Any]],
    ) -> list[mx.array]:
        n, k = inputs["ids"].shape
        constants = {
            "K": next(room for room in ROOMS if k <= room),
            "EXCLUDES": source.replaces,
            "RANKS": source.ranks,
            "SAMPLED": self.kind == "threshold",
            "COUNTS": self.kind == "counts",
        }
        return launch(
            f"{source.name}_{self.kind or 'weights'}_{direction}",
            inputs,
            outputs,
            ROW + LOSS + ENTRIES + body,
            COMMON + FINAL + CODES + TABLE + source.header,
            rows=n,
            threads=threads_per_row(inputs["logits"].shape[1]),
            template=[*constants.items(), *template],
        )


_TYPES = {
    "weights": mx.float32,
    "codes": mx.uint8,
    "head_count": mx.uint32,
    "tail": mx.uint8,
    "log_tail_mass": mx.float32,
    "log_probs": mx.float32,
}
