"""Compiles a kernel's C++ to a library that the runtime can call; each distinct source once per cache folder.

The kernel is compiled with -fsanitize=thread and not linked with libtsan: the calls that the compiler inserts at every
load and store are answered by `runtime.cpp`. This module never runs a kernel.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import CompileError

_FOLDER = Path(__file__).parent
_RUNTIME_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
# -fno-inline keeps the kernel's helpers apart, so that a defect in one names the line that called it; without jump
# threading a simd operation stays one instruction in the code, as divergence is told by where lanes wait.
_KERNEL_FLAGS = (
    *("-std=c++17", "-O1", "-gdwarf-4", "-fPIC", "-shared", "-fsanitize=thread", "-fsingle-precision-constant"),
    *("-fno-inline", "-fno-thread-jumps", "-fno-tree-dominator-opts", "-fno-optimize-sibling-calls"),
    *("-fno-reorder-blocks", "-fno-guess-branch-probability"),
    *("-fno-omit-frame-pointer", "-fno-exceptions", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv"),
    *("-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-psabi", "-fmax-errors=8"),
)


def compiler() -> str | None:
    """The path of g++, or None; on macOS, where that name is Clang's, the runtime is not compiled."""
    return shutil.which("g++") if sys.platform == "linux" else None


def cache_folder() -> Path:
    """The user's cache folder for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "metal_emulator"


def runtime_library(folder: Path | None = None) -> Path:
    """The compiled runtime."""
    text = "".join((_FOLDER / name).read_text() for name in ("metal_shared.h", "runtime.cpp"))
    return _built(text, "runtime", _RUNTIME_FLAGS, (str(_FOLDER / "runtime.cpp"),), folder or cache_folder())


def kernel_library(cpp: str, folder: Path | None = None) -> Path:
    """The compiled kernel whose C++ `translate` made, linked to the runtime.

    Raises: CompileError with g++'s message, in the kernel's own line numbers.
    """
    folder = folder or cache_folder()
    runtime = runtime_library(folder)
    shim = "".join((_FOLDER / name).read_text() for name in ("metal_shared.h", "metal_shim.h"))
    flags = (*_KERNEL_FLAGS, *_half_flags(), f"-I{_FOLDER}")
    # -nodefaultlibs keeps libtsan out; the others are named again.
    libraries = ("-nodefaultlibs", "-lm", "-lgcc", "-lc")
    what = ("-x", "c++", "-", "-x", "none", str(runtime), *libraries)
    return _built(cpp + shim + str(runtime), "kernel", flags, what, folder, cpp)


@functools.cache
def _half_flags() -> tuple[str, ...]:
    """The processor's own conversions between half and float, where it has them."""
    try:
        return ("-mf16c",) if " f16c" in Path("/proc/cpuinfo").read_text() else ()
    except OSError:
        return ()


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout


def _built(text: str, kind: str, flags: tuple[str, ...], what: tuple[str, ...], folder: Path, stdin: str = "") -> Path:
    path = compiler()
    if path is None:
        raise CompileError("there is no g++ of Linux: install one there (`apt install g++`)")
    key = hashlib.blake2b(digest_size=12)
    for part in (text, *flags, *what, _version(path), platform.machine()):
        key.update(part.encode() + b"\0")
    library = folder / f"{kind}-{key.hexdigest()}.so"
    if library.is_file():
        return library
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f"{kind}-", suffix=".tmp")
    os.close(handle)
    try:
        command = [path, *flags, "-o", temporary, *what]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            raise CompileError(f"g++ refuses the {kind}:\n{done.stderr.strip()}")
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())  # a library cut short by a crash would kill whoever loads it
        os.replace(temporary, library)  # noqa: PTH105  atomic: two processes may compile one kernel at once
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library
