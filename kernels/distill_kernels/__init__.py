"""Fused distillation mathematics on MLX: what stands between logits and a gradient, and nothing else.

Importing this package first is what makes MLX fast on a Linux CPU: a good BLAS is loaded before MLX is (see `blas`).
It knows nothing of stores, datasets or training.
"""

from distill_kernels import blas

blas.load()

import mlx.core as mx  # noqa: E402


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here, where NumPy selects faster and float32 is the only fast type."""
    return bool(mx.default_device() == mx.cpu)


if on_cpu():
    mx.disable_compile()  # it calls a C++ compiler there: 37 s before the first of 20 steps of a toy model

from distill_kernels.bucket_kl import BucketKL, bucket_kl_ce  # noqa: E402
from distill_kernels.head import Head, chunked, split_head  # noqa: E402
from distill_kernels.row_loss import RowLoss  # noqa: E402
from distill_kernels.sparse_kl import SparseKL, sparse_kl_ce  # noqa: E402

__all__ = ["BucketKL", "Head", "RowLoss", "SparseKL", "bucket_kl_ce", "chunked", "on_cpu", "sparse_kl_ce", "split_head"]
