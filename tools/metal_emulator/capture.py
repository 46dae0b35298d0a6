"""Turns a call of an `mx.fast.metal_kernel` object into a `Launch`, everything a GPU would be given, without a GPU.

`mx.export_function` traces the call and hands over MLX's own generated source, grid and threadgroup, so what is
emulated is what Metal would compile. Nothing is evaluated but the inputs' values. This module never runs a kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .errors import CaptureError

MAX_THREADS = 1024  # per threadgroup, on every Apple GPU


@dataclass(frozen=True, eq=False)
class Virtual:
    """An array of zeros that has a shape and a dtype but no memory until it is touched; for offsets past 2^32.

    `fill` maps the position of a first element, in row-major order, to the values that stand from there on.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    fill: Mapping[int, mx.array] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """How many axes it has, as of an array."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of a kernel: its generated source, its grid in threads, its threadgroup, its inputs and its outputs."""

    name: str
    source: str  # the full Metal source, as MLX generates it
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: tuple[mx.array | Virtual, ...]
    described: tuple[tuple[bool, bool, bool], ...]  # per input, whether the kernel takes its shape, strides and ndim
    ensure_row_contiguous: bool
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    init_value: float | None = None
    virtual_outputs: bool = False  # outputs are not copied out of the run: read them with `Run.slice`


def capture(
    kernel: Callable[..., Any],
    *,
    inputs: Sequence[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    verbose: bool = False,
    stream: Any = None,
    virtual_outputs: bool = False,
) -> Launch:
    """The launch that `kernel(...)` would be with these arguments, which are those of MLX's own call.

    `inputs` may also be NumPy arrays, Python numbers and `Virtual` arrays; `verbose` and `stream` change nothing here.

    Raises: CaptureError where MLX refuses the arguments, or Metal would.
    """
    kernel = getattr(kernel, "metal_kernel", kernel)  # a stand-in of `emulated()`
    arrays = tuple(each if isinstance(each, mx.array | Virtual) else mx.array(each) for each in inputs)
    # MLX generates from shapes and dtypes alone. These zeros are never evaluated, so their size does not matter.
    examples = [mx.zeros(each.shape, each.dtype) for each in arrays]
    calls: list[dict[str, Any]] = []

    def call(*traced: mx.array) -> Any:
        extra = {} if template is None else {"template": template}
        return kernel(
            inputs=list(traced),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            init_value=init_value,
            verbose=verbose,
            stream=stream,
            **extra,
        )

    def note(event: dict[str, Any]) -> None:
        if event.get("name") == "CustomKernel":
            calls.append(event)

    try:
        mx.export_function(note, call, *examples)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CaptureError(f"MLX cannot trace this call: {error}") from error
    if len(calls) != 1:
        raise CaptureError(f"the call makes {len(calls)} Metal kernels, expected one: pass a metal_kernel object")
    name, source, *numbers = calls[0]["arguments"][:8]
    described, row_contiguous = calls[0]["arguments"][8:10]
    across = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
    # MLX clips the threadgroup to the grid, as Metal's dispatchThreads wants it.
    group = (min(int(numbers[3]), across[0]), min(int(numbers[4]), across[1]), min(int(numbers[5]), across[2]))
    threads = group[0] * group[1] * group[2]
    if not 1 <= threads <= MAX_THREADS:
        raise CaptureError(f"a threadgroup of {group} is {threads} threads; Metal takes 1 to {MAX_THREADS}")
    return Launch(
        name=str(name),
        source=str(source),
        grid=across,
        threadgroup=group,
        inputs=arrays,
        described=tuple((bool(shape), bool(strides), bool(ndim)) for shape, strides, ndim in described),
        ensure_row_contiguous=bool(row_contiguous),
        output_shapes=tuple(tuple(shape) for shape in output_shapes),
        output_dtypes=tuple(output_dtypes),
        init_value=init_value,
        virtual_outputs=virtual_outputs,
    )


def to_numpy(array: mx.array, row_contiguous: bool) -> NDArray[Any]:
    """The array's elements as raw unsigned integers or NumPy's own type, with its strides unless `row_contiguous`."""
    try:
        mx.eval(array)
    except (ValueError, RuntimeError) as error:
        raise CaptureError(
            f"the inputs have no values yet ({error}); an emulated kernel cannot run inside mx.compile or mx.vmap: "
            "call the function uncompiled, or set MLX_DISABLE_COMPILE=1"
        ) from error
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view: NDArray[Any] = np.array(plain, copy=False)
    return np.ascontiguousarray(view).reshape(array.shape) if row_contiguous else view


def numpy_dtype(dtype: mx.Dtype) -> np.dtype[Any]:
    """The NumPy type that holds one element; bfloat16 travels as uint16."""
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    return np.dtype(str(dtype).removeprefix("mlx.core.").replace("bool", "bool_"))


def to_mlx(values: NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """The inverse of `to_numpy`."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
