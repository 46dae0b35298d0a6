"""Runs a launch under one schedule of its simdgroups, in memory where every access is watched."""

import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .capture import Launch, Virtual, numpy_dtype, to_mlx, to_numpy
from .compile import kernel_library, runtime_library
from .errors import EmulatorError
from .report import Defect, RawDefect, defects_of
from .source import Kernel, translate

Schedule = str | int  # "ascending", "descending", or the seed of a random interleaving

_LARGE = 1 << 28  # outputs of more bytes stay untouched, zero, until the kernel writes to them
_ONE_RUN = threading.Lock()  # the runtime's state is global


@dataclass(frozen=True, eq=False)
class Run:
    """What a launch did: its outputs, its defects, and the bytes that it loaded and stored per argument."""

    launch: Launch
    schedule: Schedule
    outputs: list[mx.array]
    defects: tuple[Defect, ...]
    loads: dict[str, int]
    stores: dict[str, int]
    threadgroup_bytes: int
    elapsed_s: float
    memory: "Memory"

    def slice(self, name: str, start: int, stop: int) -> mx.array:
        """Elements [start, stop) of the argument `name` after the run; only for a launch with `virtual_outputs`."""
        if not self.launch.virtual_outputs:
            raise EmulatorError("this run's memory is gone: capture the launch with virtual_outputs=True")
        return self.memory.slice(name, start, stop)


@dataclass(frozen=True, eq=False)
class _Buffer:
    name: str
    dtype: mx.Dtype
    bytes: int
    value: NDArray[Any] | Virtual | None  # None: an output
    before: int = 0  # bytes in front of element 0, for a view with negative strides


class Memory:
    """The launch's buffers, each in a slot of one reserved address range; only pages that are touched exist."""

    def __init__(self, library: ctypes.CDLL, buffers: Sequence[_Buffer], init_value: float | None) -> None:
        self.buffers = buffers
        sizes = (ctypes.c_uint64 * len(buffers))(*(each.bytes for each in buffers))
        self.handle = library.emulator_open(len(buffers), sizes)
        if not self.handle:
            raise EmulatorError("the system does not give enough addresses: see `ulimit -v` and vm.overcommit_memory")
        self.close = weakref.finalize(self, library.emulator_close, ctypes.c_void_p(self.handle))
        self.addresses = [library.emulator_slot(self.handle, i) for i in range(len(buffers))]
        for i, each in enumerate(buffers):
            if each.value is None:
                library.emulator_writable(self.handle, i)
                self._fill_output(i, init_value)
            elif isinstance(each.value, Virtual):
                for start, values in each.value.fill.items():
                    raw = to_numpy(mx.array(values, each.dtype), row_contiguous=True)
                    self._view(i, start * each.dtype.size, raw.nbytes)[:] = raw.reshape(-1).view(np.uint8)
            else:
                self._copy_in(i, each.value)

    def slice(self, name: str, start: int, stop: int) -> mx.array:
        index = next((i for i, each in enumerate(self.buffers) if each.name == name), None)
        if index is None:
            raise EmulatorError(f"no argument is called {name}: there are {', '.join(b.name for b in self.buffers)}")
        dtype = self.buffers[index].dtype
        raw = self._view(index, start * dtype.size, (stop - start) * dtype.size)
        return to_mlx(raw.copy().view(numpy_dtype(dtype)), dtype)

    def _view(self, index: int, start: int, count: int) -> NDArray[np.uint8]:
        if not 0 <= start <= start + count <= self.buffers[index].bytes:
            raise EmulatorError(f"{self.buffers[index].name} has no bytes {start} to {start + count}")
        if count == 0:
            return np.empty(0, np.uint8)
        memory = (ctypes.c_uint8 * count).from_address(self.addresses[index] + start)
        return np.ctypeslib.as_array(memory)

    def _copy_in(self, index: int, value: NDArray[Any]) -> None:
        if value.size == 0:
            return
        memory = self._view(index, 0, self.buffers[index].bytes)
        target = np.ndarray(value.shape, value.dtype, memory.data, self.buffers[index].before, value.strides)
        target[...] = value

    def _fill_output(self, index: int, init_value: float | None) -> None:
        each = self.buffers[index]
        if init_value is None:
            if each.bytes <= _LARGE:  # what nothing has written is garbage on a GPU: here it is NaN, or -1
                self._view(index, 0, each.bytes)[:] = 0xFF
        elif init_value != 0:
            if each.bytes > _LARGE:
                raise EmulatorError(f"an init_value would fill the {each.bytes} bytes of {each.name}: only 0 is free")
            value = to_numpy(mx.full((1,), init_value, each.dtype), row_contiguous=True)
            self._view(index, 0, each.bytes).view(value.dtype)[:] = value


def execute(
    launch: Launch,
    schedule: Schedule = "ascending",
    groups: Iterable[tuple[int, int, int]] | None = None,
    cache: Path | None = None,
) -> Run:
    """Runs the launch once; `groups` are the threadgroups to run, as (x, y, z) positions, all of them if None.

    `schedule` is "ascending" or "descending", each simdgroup running to its next threadgroup barrier in that order, or
    the seed of a random interleaving that changes simdgroup at simd operations, barriers, atomics and some accesses to
    threadgroup memory. `cache` is the folder for compiled kernels, the user's cache folder if None.

    Raises: CompileError where g++ refuses the kernel. A defect is not raised but returned.
    """
    kernel = translate(launch.source, launch.name)
    path = kernel_library(kernel.cpp, cache)
    runtime, library = _runtime(runtime_library(cache)), _kernel(path)
    buffers = _buffers(launch, kernel)
    memory = Memory(runtime, buffers, launch.init_value)
    order, seed = _order(schedule)
    positions = None if groups is None else np.array(list(groups), np.uint32).reshape(-1, 3)
    if positions is not None:
        across = [-(-n // k) for n, k in zip(launch.grid, launch.threadgroup, strict=True)]
        if (positions >= np.array(across)).any():
            raise EmulatorError(f"the grid has {across} threadgroups, and one of `groups` is outside")
    starts = [address + each.before for address, each in zip(memory.addresses, buffers, strict=True)]
    with _ONE_RUN:
        began = time.perf_counter()
        count = runtime.emulator_run(
            memory.handle,
            ctypes.cast(library.emulator_entry, ctypes.c_void_p),
            (ctypes.c_void_p * len(starts))(*starts),
            len(starts),
            (ctypes.c_uint64 * 3)(*launch.grid),
            (ctypes.c_uint32 * 3)(*launch.threadgroup),
            None if positions is None else positions.ctypes.data,
            0 if positions is None else len(positions),
            order,
            seed,
        )
        elapsed_s = time.perf_counter() - began
        if count < 0:
            raise EmulatorError("the system does not give memory for the threads' stacks")
        raw = ctypes.cast(runtime.emulator_defects(), ctypes.POINTER(RawDefect))[:count] if count else []
        defects = defects_of(raw, kernel, path, runtime.emulator_image(), [each.bytes for each in buffers])
        threadgroup_bytes = runtime.emulator_shared_bytes()
    loads, stores = _counts(runtime, memory)
    outputs: list[mx.array] = []
    if not launch.virtual_outputs:
        for each, shape in zip(buffers[-len(launch.output_shapes) :], launch.output_shapes, strict=True):
            outputs.append(memory.slice(each.name, 0, prod(shape)).reshape(shape))
        memory.close()
    return Run(launch, schedule, outputs, defects, loads, stores, threadgroup_bytes, elapsed_s, memory)


def _buffers(launch: Launch, kernel: Kernel) -> list[_Buffer]:
    """The kernel's buffers in the order of its parameters."""
    names = iter(kernel.buffers)
    buffers = []
    for value, described in zip(launch.inputs, launch.described, strict=True):
        name = next(names)
        if isinstance(value, Virtual):
            shape, strides = value.shape, _row_strides(value.shape)
            buffers.append(_Buffer(name, value.dtype, prod(shape) * value.dtype.size, value))
        else:
            raw = to_numpy(value, launch.ensure_row_contiguous)
            shape, strides = raw.shape, tuple(step // raw.itemsize for step in raw.strides)
            reach = [(n - 1) * step for n, step in zip(raw.shape, raw.strides, strict=True)]
            before = -sum(step for step in reach if step < 0)
            size = before + sum(step for step in reach if step > 0) + raw.itemsize if raw.size else 0
            buffers.append(_Buffer(name, value.dtype, size, raw, before))
        if not shape:
            continue
        facts = (("shape", shape, mx.int32), ("strides", strides, mx.int64), ("ndim", (len(shape),), mx.int32))
        for (fact, numbers, kind), used in zip(facts, described, strict=True):
            if used:
                values = np.array(numbers, numpy_dtype(kind))
                buffers.append(_Buffer(next(names), kind, values.nbytes, values))
                if not buffers[-1].name.endswith(f"_{fact}"):
                    raise EmulatorError(f"{buffers[-1].name} stands where {name}_{fact} was expected")
    for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True):
        buffers.append(_Buffer(next(names), dtype, prod(shape) * dtype.size, None))
    return buffers


def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _order(schedule: Schedule) -> tuple[int, int]:
    if isinstance(schedule, int):
        return 2, schedule
    if schedule not in ("ascending", "descending"):
        raise EmulatorError(f"schedule is {schedule!r}: give 'ascending', 'descending' or a seed")
    return ("ascending", "descending").index(schedule), 0


def _counts(runtime: ctypes.CDLL, memory: Memory) -> tuple[dict[str, int], dict[str, int]]:
    loads, stores = {}, {}
    loaded, stored = ctypes.c_uint64(), ctypes.c_uint64()
    for i, each in enumerate(memory.buffers):
        runtime.emulator_counts(memory.handle, i, ctypes.byref(loaded), ctypes.byref(stored))
        loads[each.name], stores[each.name] = loaded.value, stored.value
    return loads, stores


@functools.cache
def _runtime(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, word = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    signatures: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("emulator_open", pointer, (integer, pointer)),
        ("emulator_close", None, (pointer,)),
        ("emulator_slot", pointer, (pointer, integer)),
        ("emulator_writable", None, (pointer, integer)),
        ("emulator_counts", None, (pointer, integer, pointer, pointer)),
        ("emulator_defects", pointer, ()),
        ("emulator_image", word, ()),
        ("emulator_shared_bytes", word, ()),
        (
            "emulator_run",
            integer,
            (pointer, pointer, pointer, integer, pointer, pointer, pointer, word, integer, word),
        ),
    )
    for name, result, arguments in signatures:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def _kernel(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
