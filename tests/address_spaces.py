"""Whether a Metal kernel keeps its address spaces apart, which g++, the emulator's compiler, does not know of.

Clang's C++ for OpenCL has the same four, refuses what mixes them, and comes as a package. Where it differs is evened
out here: a kernel may not be a template there, and a pointer that names no space may point to any.
"""

import re
from functools import cache
from pathlib import Path

from clang.cindex import CursorKind, Diagnostic, Index, TranslationUnit

SOURCE = "kernel.clcpp"
HEADER = Path(__file__).with_suffix(".h")
FLAGS = ("-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64-unknown-unknown", "-cl-no-stdinc")
DECLARED = CursorKind.PARM_DECL, CursorKind.VAR_DECL, CursorKind.FIELD_DECL
_TEMPLATE = re.compile(r"template <([^\n]*)>\n(?=\[\[kernel\]\])")
_INSTANCE = re.compile(r"\ntemplate \[\[host_name.*<(.*)>;\s*$", re.S)


@cache
def address_space_faults(metal: str) -> tuple[str, ...]:
    """What Clang says against the source that MLX generates for a kernel, each with the line that it names."""
    text = _opencl(metal)
    unit = TranslationUnit.from_source(
        SOURCE,
        args=[*FLAGS, "-include", str(HEADER)],
        unsaved_files=[(SOURCE, text)],
        index=Index.create(),
    )
    lines = ["", *text.splitlines()]
    refused = [
        f"{each.spelling}: {lines[each.location.line].strip()}"
        for each in unit.diagnostics
        if each.severity >= Diagnostic.Error
    ]
    unsaid = [
        f"points to no address space: {lines[each.location.line].strip()}"
        for outer in unit.cursor.get_children()
        if outer.location.file.name == SOURCE
        for each in outer.walk_preorder()
        if each.kind in DECLARED and "__generic" in each.type.spelling
    ]
    return (*refused, *unsaid)


def _opencl(metal: str) -> str:
    """The source with its template arguments filled in and OpenCL's word for a kernel."""
    metal = re.sub(r"^\s*#\s*include[^\n]*", "", metal, flags=re.M)
    if instance := _INSTANCE.search(metal):
        template = _TEMPLATE.search(metal)
        assert template is not None
        names, values = template[1].split(", "), instance[1].split(", ")
        filled = "".join(_define(name, value) for name, value in zip(names, values, strict=True))
        metal = metal[: template.start()] + filled + metal[template.end() : instance.start()]
    return re.sub(r"\[\[[^\]]*\]\]", "", metal.replace("[[kernel]]", "__kernel"))


def _define(parameter: str, value: str) -> str:
    kind, name = parameter.split()
    if kind == "typename":
        return f"typedef {value} {name};\n"
    return f"#define {name} {kind}({value})\n"
