"""Rewrites the Metal source that MLX generates into C++ that g++ compiles, line for line.

Metal is C++14 with address spaces. `metal_shim.h` makes most of them empty words; what no header can express is done
here: threadgroup declarations become references into storage that a threadgroup's threads share, and the
instantiation becomes a function that the runtime can call. Lines keep their numbers, so that a compiler's complaint and
a defect both name the kernel's own lines. This module never compiles.
"""

import re
from dataclasses import dataclass

from .errors import CaptureError

SOURCE_FILE = "kernel.source"  # what #line calls the `source` given to metal_kernel
HEADER_FILE = "kernel.header"

_KERNEL = re.compile(r"(?P<template>template <[^\n]*>\n)?\[\[kernel\]\] void (?P<name>custom_kernel_\w+)\(\n")
_BUFFER = re.compile(r"^\s*(?P<type>.*?[*&])\s*(?P<name>\w+)\s*\[\[buffer\(\d+\)\]\]")
_POSITION = re.compile(r"^\s*(?P<type>\w+)\s+(?P<name>\w+)\s*\[\[(?P<attribute>\w+)\]\]")
_DECLARATION = re.compile(r"(?:\balignas\s*\([^)]*\)\s*)?\bthreadgroup\b(?!_)")
_DECLARATOR = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<dims>(?:\[.*\]\s*)?)", re.S)
_SIZE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Kernel:
    """A kernel as C++, with what its author wrote and what the runtime must pass, in order."""

    cpp: str
    body: str  # the `source` given to metal_kernel
    header: str
    buffers: tuple[str, ...]  # argument names: inputs, each with its _shape, _strides and _ndim if used, then outputs
    arrays: tuple[str, ...]  # threadgroup arrays, in the order of their numbers


def translate(metal: str, name: str) -> Kernel:
    """The C++ of MLX's generated `metal` for the kernel `name`.

    Raises: CaptureError where the source does not look like what MLX generates.
    """
    found = _KERNEL.search(metal)
    last = metal.rfind("\n}\n")
    if found is None or last < 0 or found["name"] != name:
        raise CaptureError(f"{name}: this source is not in the form that mx.fast.metal_kernel of MLX 0.32 generates")
    opening = metal.index(") {\n", found.end())
    header, parameters = metal[: found.start()], metal[found.end() : opening + 1]
    body = metal[opening + 4 : last]
    buffers: list[str] = []
    passed: list[str] = []
    for line in parameters.splitlines():
        if buffer := _BUFFER.match(line):
            pointer = buffer["type"].strip()
            target = f"emulator_buffers[{len(buffers)}]"
            kind = pointer[:-1].strip()
            passed.append(f"*({kind} *){target}" if pointer.endswith("&") else f"({pointer}){target}")
            buffers.append(buffer["name"])
        elif position := _POSITION.match(line):
            value = f"emulator_position->{position['attribute']}"
            passed.append(f"{position['type']}({value})")
    in_header: list[str] = []
    _share(_plain(header), in_header)
    if in_header:
        raise CaptureError(
            f"{name}: Metal takes threadgroup arrays only in the kernel, not {in_header[0]} in its header"
        )
    arrays: list[str] = []
    arguments = metal[last:].strip().rpartition(name)[2].rstrip(";\n}") if found["template"] else ""
    parts = [
        '#include "metal_shim.h"',
        f'#line 1 "{HEADER_FILE}"',
        _plain(header),
        '#line 1 "kernel.signature"',
        f"{found['template'] or ''}void {name}(",
        f"{parameters.rstrip()} {{",
        f'#line 1 "{SOURCE_FILE}"',
        _share(_plain(body), arrays),
        '#line 1 "kernel.entry"',
        "}",
        'extern "C" void emulator_entry(void *const *emulator_buffers, const emulator_ids *emulator_position) {',
        "    (void)emulator_buffers, (void)emulator_position;",
        f"    {name}{arguments}({', '.join(passed)});",
        "}",
        "",
    ]
    return Kernel("\n".join(parts), body, header, tuple(buffers), tuple(arrays))


def _plain(text: str) -> str:
    """The text without comments and without includes of Metal's own headers, on the same lines."""

    def blank(match: re.Match[str]) -> str:
        comment = match[0]
        return comment if comment[0] == '"' else " " + "\n" * comment.count("\n")

    text = re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.S)
    return re.sub(r"^[ \t]*#[ \t]*include[ \t]*[<\"](?:metal_|mlx/)[^\n]*", "", text, flags=re.M)


def _share(text: str, arrays: list[str]) -> str:
    """The text with each threadgroup declaration replaced; the names declared are appended to `arrays`."""
    out, at = [], 0
    while found := _DECLARATION.search(text, at):
        out.append(text[at : found.start()])
        end, pieces = _declarators(text, found.end())
        declared = _declare(pieces, arrays) if pieces else None
        if declared is None:
            out.append(found[0])  # a pointer, a parameter or a cast: the word is empty
            at = found.end()
        else:
            old = text[found.start() : end]
            out.append(declared.replace("\n", " ") + "\n" * old.count("\n"))
            at = end
    out.append(text[at:])
    return "".join(out)


def _declarators(text: str, start: int) -> tuple[int, list[str]]:
    """What stands between `start` and the closing `;`, split at its commas; nothing where it is no declaration."""
    pieces, depth, angle, begin = [], 0, 0, start
    for i in range(start, len(text)):
        character = text[i]
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
            if depth < 0:
                return i, []
        elif depth == 0 and character == "<":
            angle += 1
        elif depth == 0 and character == ">":
            angle -= 1
        elif depth == 0 and angle == 0 and character == ",":
            pieces.append(text[begin:i])
            begin = i + 1
        elif depth == 0 and character in "={}":
            if character == "=" and not re.search(r"[*&]", text[start:i]):
                raise CaptureError(f"Metal refuses an initial value for threadgroup memory:{text[start:i]}=")
            return i, []
        elif depth == 0 and character == ";":
            return i + 1, [*pieces, text[begin:i]]
    return len(text), []


def _declare(pieces: list[str], arrays: list[str]) -> str | None:
    first = re.fullmatch(r"(?P<type>.*?[\w>])(?P<rest>\s+[A-Za-z_]\w*\s*(?:\[.*\]\s*)?)", pieces[0], re.S)
    if first is None:
        return None
    kind = re.sub(r"\balignas\s*\([^)]*\)", "", first["type"]).strip()
    statements = []
    for piece in (first["rest"], *pieces[1:]):
        declarator = _DECLARATOR.fullmatch(piece)
        if declarator is None:
            raise CaptureError(f"this threadgroup declaration is not understood: {', '.join(pieces).strip()}")
        name, dims = declarator["name"], declarator["dims"].strip()
        left = f"(&{name}){dims}" if dims else f"&{name}"
        statements.append(f"{kind} {left} = emulator_threadgroup<{len(arrays)}, {kind}{dims}>();")
        arrays.append(name)
    return " ".join(statements)
