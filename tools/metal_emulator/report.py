"""Turns what the runtime noted, addresses and numbers, into defects that name the kernel's own lines."""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .source import HEADER_FILE, SOURCE_FILE, Kernel

KINDS = (
    "divergent barrier",
    "divergent simd operation",
    "read out of bounds",
    "write out of bounds",
    "uninitialised threadgroup read",
    "threadgroup race",
    "write to a const buffer",
    "too much threadgroup memory",
    "integer division by zero",
)
_OPERATIONS = (
    *("simd_sum", "simd_product", "simd_max", "simd_min", "simd_and", "simd_or", "simd_xor", "simd_any", "simd_all"),
    *("simd_ballot", "simd_broadcast", "simd_broadcast_first", "simd_shuffle", "simd_shuffle_up"),
    *("simd_shuffle_down", "simd_shuffle_xor", "simd_prefix_inclusive_sum", "simd_prefix_exclusive_sum"),
    *("simd_prefix_inclusive_product", "simd_prefix_exclusive_product", "simdgroup_barrier", "threadgroup_barrier"),
)
_ELSEWHERE = -(2**31)


@dataclass(frozen=True)
class Defect:
    """One rule broken at one place; `line` counts from 1 in the `source` given to `mx.fast.metal_kernel`."""

    kind: str
    message: str
    line: int | None
    text: str
    other_line: int | None = None  # the other access of a race, or where other threads wait
    other_text: str = ""
    header_line: int | None = None  # where the access itself stands, if `line` called a helper in the header
    count: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two defects one: a kind at a place; a race is the same whichever access came first."""
        if self.kind == "threadgroup race":
            return (self.kind, *sorted((self.line or 0, self.other_line or 0)))
        return (self.kind, self.line, self.header_line)

    def __str__(self) -> str:
        where = f"line {self.line}: {self.text}" if self.line else "(line unknown)"
        if self.header_line:
            where += f"  [in the header, line {self.header_line}]"
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}: {self.message}{times}\n    {where}"


class RawDefect(ctypes.Structure):
    """`Defect` of runtime.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "slot", "size", "operation")),
        ("group", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("thread", "other_thread", "present", "expected", "is_write")),
        ("offset", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("count", "pc", "kernel_pc", "other_pc", "other_kernel_pc")),
    )


@dataclass(frozen=True)
class _Place:
    line: int | None = None
    header_line: int | None = None


def defects_of(
    raw: Sequence[RawDefect], kernel: Kernel, library: Path, image: int, sizes: Sequence[int]
) -> tuple[Defect, ...]:
    """The defects, each line named once; `image` is where the library is loaded, `sizes` the buffers' bytes."""
    addresses = {each for one in raw for each in (one.pc, one.kernel_pc, one.other_pc, one.other_kernel_pc) if each}
    lines = _lines(library, {address: address - image for address in addresses})
    found: dict[tuple[object, ...], Defect] = {}
    for one in raw:
        place, other = (
            _place(lines.get(pc, ()), lines.get(kernel_pc, ()))
            for pc, kernel_pc in ((one.pc, one.kernel_pc), (one.other_pc, one.other_kernel_pc))
        )
        kind = KINDS[one.kind]
        defect = Defect(
            kind=kind,
            message=_message(one, kernel, sizes, other),
            line=place.line,
            text=_text(kernel.body, place.line) if place.line else _text(kernel.header, place.header_line),
            other_line=other.line,
            other_text=_text(kernel.body, other.line),
            header_line=place.header_line,
            count=one.count,
        )
        first = found.setdefault(defect.key, defect)
        if first is not defect:
            found[defect.key] = replace(first, count=first.count + one.count)
    return tuple(found.values())


def _message(one: RawDefect, kernel: Kernel, sizes: Sequence[int], other: _Place) -> str:
    where = f"threadgroup ({one.group[0]}, {one.group[1]}, {one.group[2]})"
    elsewhere = f"line {other.line}: {_text(kernel.body, other.line)}" if other.line else ""
    kind = KINDS[one.kind]
    if kind.startswith("divergent"):
        whole = "threadgroup" if kind == "divergent barrier" else "simdgroup"
        rest = f"thread {one.other_thread} " + (f"waits at {elsewhere}" if elsewhere else "has ended")
        return (
            f"{_OPERATIONS[one.operation]} is reached by {one.present} of the {whole}'s {one.expected} threads, "
            f"{rest}; {where}"
        )
    if kind == "too much threadgroup memory":
        return f"{one.offset} bytes, and Metal has 32768"
    who = f"thread {one.thread} of {where}"
    if kind == "integer division by zero":
        return f"{who}, or the quotient does not fit; the thread was stopped there"
    if one.slot == _ELSEWHERE:
        return f"{who} uses an address that belongs to no argument; the thread was stopped there"
    if one.slot > 0:
        name, size = kernel.buffers[one.slot - 1], f" of {sizes[one.slot - 1]} bytes"
    else:
        name, size = kernel.arrays[-1 - one.slot] if -1 - one.slot < len(kernel.arrays) else "?", ""
    what = f"bytes {one.offset} to {one.offset + one.size - 1} of {name}"
    if kind == "threadgroup race":
        earlier = "writes" if one.is_write & 2 else "reads"
        now = "written" if one.is_write & 1 else "read"
        return (
            f"{what} are {now} by {who}, and no threadgroup_barrier(mem_flags::mem_threadgroup) orders that after "
            f"thread {one.other_thread}, which {earlier} them at {elsewhere or 'an unknown line'}"
        )
    verb = {"read out of bounds": "reads", "uninitialised threadgroup read": "reads"}.get(kind, "writes")
    note = ", which nothing has written in this threadgroup" if kind.startswith("uninitialised") else size
    return f"{who} {verb} {what}{note}"


def _text(text: str, line: int | None) -> str:
    lines = text.splitlines()
    return lines[line - 1].strip() if line and line <= len(lines) else ""


def _place(own: Sequence[tuple[str, int]], caller: Sequence[tuple[str, int]]) -> _Place:
    """The line of the body nearest to the access, and the header's line if the access stands in a helper."""
    chain = [*own, *caller]
    body = next((line for file, line in chain if file == SOURCE_FILE), None)
    nearest = next(((file, line) for file, line in chain if file in (SOURCE_FILE, HEADER_FILE)), None)
    return _Place(body, nearest[1] if nearest and nearest[0] == HEADER_FILE else None)


def _lines(library: Path, offsets: dict[int, int]) -> dict[int, list[tuple[str, int]]]:
    """Per address the file and line it was compiled from, innermost inlined function first."""
    tool = _addr2line()
    if tool is None or not offsets:
        return {}
    order = list(offsets)
    # An address is where a call returns to: one byte back is inside the call.
    asked = [f"{offsets[address] - 1:#x}" for address in order]
    done = subprocess.run([tool, "-a", "-i", "-e", str(library), *asked], capture_output=True, text=True, timeout=60)
    found: dict[int, list[tuple[str, int]]] = {}
    position = -1
    for line in done.stdout.splitlines():
        if line.startswith("0x"):
            position += 1
            found[order[position]] = []
            continue
        file, _, number = line.rpartition(":")
        number = number.split(" ")[0]
        found[order[position]].append((Path(file).name, int(number) if number.isdigit() else 0))
    return found


@functools.cache
def _addr2line() -> str | None:
    return shutil.which("addr2line")
