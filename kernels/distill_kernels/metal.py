"""Which of the two tiers runs here and why, and the one place where a Metal kernel is launched.

`X_ops`, plain MLX, is the definition and runs anywhere; `X_kernel`, Metal, runs on an Apple GPU. Both take the same
arguments, and `X` is one of them.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

VARIABLE = "DISTILL_KERNELS"
SIMD = 32
MOST_THREADS = 512
"""Of a threadgroup. Metal allows 1,024, but fewer to a kernel that needs many registers, and MLX then raises."""
PER_THREAD = 4
"""Neighbouring logits that a thread takes at a time."""


def on_metal() -> bool:
    """Whether losses and selection run as Metal kernels.

    Raises:
        ValueError: DISTILL_KERNELS is neither "ops" nor "metal".
    """
    return _choice()[0]


def why() -> str:
    """Say which tier runs, and why.

    Raises:
        ValueError: DISTILL_KERNELS is neither "ops" nor "metal".
    """
    return _choice()[1]


def _choice() -> tuple[bool, str]:
    asked = os.environ.get(VARIABLE, "")
    if asked in ("ops", "metal"):
        return asked == "metal", f"{_NAMES[asked]}: {VARIABLE}={asked}"
    if asked:
        raise ValueError(f"{VARIABLE} is '{asked}', expected ops or metal; type {VARIABLE}=ops, or unset it")
    if not mx.metal.is_available():
        return False, f"{_NAMES['ops']}: this MLX has no Metal"
    if mx.default_device() != mx.Device(mx.gpu):
        return False, f"{_NAMES['ops']}: MLX's default device is the CPU"
    return True, f"{_NAMES['metal']}: MLX's default device is an Apple GPU"


_NAMES = {"ops": "plain MLX", "metal": "Metal kernels"}


def threads_per_row(columns: int) -> int:
    """Threads of a threadgroup that works on one row: whole simdgroups, no more than there is work for."""
    return min(MOST_THREADS, SIMD * -(-columns // (SIMD * PER_THREAD)))


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    source: str,
    header: str,
    rows: int,
    threads: int,
    template: Sequence[tuple[str, Any]] = (),
) -> list[mx.array]:
    """Run a kernel with one threadgroup of so many threads for each row: `threadgroup_position_in_grid.y` is its row.

    Inputs come as they lie in memory, with `NAME_strides`: nothing is copied.

    Raises:
        RuntimeError: there is no Metal here.
    """
    kernel = kernel_of(name, tuple(inputs), tuple(outputs), source, header)
    try:
        made: list[mx.array] = kernel(
            inputs=list(inputs.values()),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            grid=(threads, rows, 1),
            threadgroup=(threads, 1, 1),
            template=list(template),
        )
    except RuntimeError as error:
        if "No Metal" not in str(error):
            raise
        raise RuntimeError(f"Metal kernels were asked for and there is no Metal here; type {VARIABLE}=ops") from error
    return made


@cache
def kernel_of(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> Any:
    """A kernel is made once; MLX compiles it once for each set of types and template arguments."""
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )


def dense(rows: mx.array, dtype: mx.Dtype) -> mx.array:
    """What is small beside the logits, in rows without gaps."""
    return mx.contiguous(rows.astype(dtype))


def as_ids(ids: mx.array) -> mx.array:
    """Return ids as the kernels read them, uint32; what does not fit becomes 2^31 - 1, which no vocabulary holds."""
    if ids.dtype in (mx.int32, mx.uint32):
        return dense(ids, mx.uint32)
    wide, nobody = ids.astype(mx.int64), 2**31 - 1
    return dense(mx.where((wide >= 0) & (wide < nobody), wide, nobody), mx.uint32)
