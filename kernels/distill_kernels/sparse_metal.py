"""The losses on sparse targets as Metal kernels: one threadgroup a row, one reading of the logits in each direction."""

from dataclasses import dataclass
from typing import Any

from distill_kernels.coded import CodedLoss, Kind
from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.metal import VARIABLE, launch, threads_per_row
from distill_kernels.metal_source import COMMON, as_ids, gradient_inputs, options
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import check_sparse
from distill_kernels.sparse_source import (
    BACKWARD,
    CELLS,
    CODES,
    DRAWS,
    EMPTY_TABLE,
    FORWARD,
    MASKED_BACKWARD,
    MASKED_FORWARD,
    PROLOGUE,
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
        source, inputs, n = source_of(self.loss), self._inputs(logits, rows), len(logits)
        body = MASKED_FORWARD + self._load() + EMPTY_TABLE + FORWARD.replace("VALUE", source.value)
        outputs = {"kd": ((n,), mx.float32), "ce": ((n,), mx.float32), "saved": ((n, 4), mx.float32)}
        kd, ce, saved = self._launch(source, "forward", body, inputs, outputs, [("ADDS", False)])
        return (kd, ce), (saved,)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        source, inputs = source_of(self.loss), self._inputs(logits, rows)
        inputs |= gradient_inputs(saved, cotangents)
        body = MASKED_BACKWARD + self._load() + EMPTY_TABLE + BACKWARD.replace("GRADIENT", source.gradient)
        outputs = {"gradient": (logits.shape, logits.dtype)}
        template = [("ADDS", True), ("T", logits.dtype)]
        return self._launch(source, "backward", body, inputs, outputs, template)[0]

    def _inputs(self, logits: mx.array, rows: Arrays) -> dict[str, mx.array]:
        """The kernel's arguments by name; the logits as they lie in memory, what is small in rows without gaps."""
        names = self.loss.names if self.kind is None else CodedLoss.names
        targets, row_weights = self.loss.parted(logits, rows, names)
        n, width = logits.shape
        named = dict(zip(names, targets, strict=True))
        wide = [named.pop(name) for name in ("ids", "weights", "codes", "log_probs") if name in named]
        check_sparse(logits, *wide[:2], **named)
        if wide[-1].shape != wide[0].shape:
            raise ValueError(f"log_probs must be {list(wide[0].shape)} like ids, found {list(wide[-1].shape)}")
        named = dict(zip(names, targets, strict=True))
        k = named["ids"].shape[1]
        if k > MOST_KEPT:
            raise ValueError(f"{k:,} entries a row, expected at most {MOST_KEPT:,}; type {VARIABLE}=ops")
        loss = self.loss
        dense = {
            name: as_ids(array) if name in ("ids", "labels") else mx.contiguous(array.astype(_TYPES[name]))
            for name, array in named.items()
        }
        return {
            "logits": logits,
            **dense,
            "row_weights": mx.ones(n) if row_weights is None else mx.contiguous(row_weights.astype(mx.float32)),
            "options": options(loss, parameter_of(loss)),
            "sizes": mx.array([min(width, loss.vocab_size or width), k, width], mx.uint32),
        }

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
        outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
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
            PROLOGUE + body,
            COMMON + CODES + TABLE + source.header,
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
