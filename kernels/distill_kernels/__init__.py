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

from distill_kernels.bucket import BucketKL, BucketLoss, bucket_kl_ce, bucket_loss_ce  # noqa: E402
from distill_kernels.coded import CodedLoss  # noqa: E402
from distill_kernels.dense import DenseLoss, dense_loss_ce  # noqa: E402
from distill_kernels.divergence import JSD, TVD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL  # noqa: E402
from distill_kernels.fused_head import chunk_rows, chunked, chunked_sum  # noqa: E402
from distill_kernels.head import Head, split_head  # noqa: E402
from distill_kernels.logits_loss import LogitsLoss  # noqa: E402
from distill_kernels.metal import why  # noqa: E402
from distill_kernels.ranking import HingeRank, LogisticRank, hinge_rank_ce, logistic_rank_ce  # noqa: E402
from distill_kernels.row_loss import RowLoss  # noqa: E402
from distill_kernels.sampled import SampledLoss, sampled_loss_ce  # noqa: E402
from distill_kernels.sparse_kl import SoftCE, SparseKL, soft_ce, sparse_kl_ce  # noqa: E402
from distill_kernels.taid import TaidLoss  # noqa: E402
from distill_kernels.tier import on_tier  # noqa: E402
from distill_kernels.weighted import WeightedLoss  # noqa: E402

__all__ = [
    "JSD",
    "TVD",
    "BucketKL",
    "BucketLoss",
    "CodedLoss",
    "DenseLoss",
    "ForwardKL",
    "Head",
    "HingeRank",
    "LogisticRank",
    "LogitsLoss",
    "ReverseKL",
    "RowLoss",
    "SampledLoss",
    "SkewKL",
    "SkewReverseKL",
    "SoftCE",
    "SparseKL",
    "TaidLoss",
    "WeightedLoss",
    "bucket_kl_ce",
    "bucket_loss_ce",
    "chunk_rows",
    "chunked",
    "chunked_sum",
    "dense_loss_ce",
    "hinge_rank_ce",
    "logistic_rank_ce",
    "on_cpu",
    "on_tier",
    "sampled_loss_ce",
    "soft_ce",
    "sparse_kl_ce",
    "split_head",
    "why",
]
