"""Loads a fast BLAS into the process before MLX is imported; on Linux that makes float32 matmul tens of times faster.

MLX's Linux wheels bundle the reference BLAS and bind to `cblas_sgemm` and `cblas_dgemm` by name when they are loaded,
so a library that exports these names and is already global wins. In this order:

1. the system's OpenBLAS;
2. the OpenBLAS inside NumPy's wheel. Its names and its 64-bit integers differ, so a few lines of C stand in between,
   compiled once into the user's cache folder. Only they become global: NumPy's own library stays private;
3. neither: MLX works with what it bundles, and `BlasStatus.advice` says what to install.

macOS has Accelerate and needs nothing. Only float32 and float64 gain: MLX's half-precision matmul does not use BLAS.
This module never imports MLX or NumPy and never prints.
"""

import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SHIM = """\
#include <stdint.h>

/* CBLAS with 32-bit integers in front of one with 64-bit integers, bound at run time. */
#define GEMM(name, real)                                                                                      \\
    typedef void name##_64(int, int, int, int64_t, int64_t, int64_t, real, const real *, int64_t,            \\
                           const real *, int64_t, real, real *, int64_t);                                    \\
    static name##_64 *bound_##name;                                                                          \\
    void logitstore_bind_##name(name##_64 *function) { bound_##name = function; }                            \\
    void name(int order, int ta, int tb, int m, int n, int k, real alpha, const real *a, int lda,            \\
              const real *b, int ldb, real beta, real *c, int ldc) {                                         \\
        bound_##name(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                           \\
    }

GEMM(cblas_sgemm, float)
GEMM(cblas_dgemm, double)
"""

_SLOW = "MLX on this CPU runs on its reference BLAS, tens of times slower than OpenBLAS"
_REMEDY = "install one (`apt install libopenblas0-pthread`) or a C compiler (`apt install gcc`)"


@dataclass(frozen=True)
class BlasStatus:
    """Which BLAS serves MLX, the file it came from, and what the user could do about a slow one."""

    source: Literal["accelerate", "openblas", "numpy", "reference", "too late"]
    path: str | None = None
    advice: str | None = None


@functools.cache
def load() -> BlasStatus:
    """Make the fastest BLAS at hand the one that MLX will bind to; later calls return the first answer."""
    if sys.platform == "darwin":
        return BlasStatus("accelerate")
    if "mlx.core" in sys.modules:
        return BlasStatus("too late", advice=f"{_SLOW}: import distill_kernels before mlx")
    return _system_openblas() or _numpy_openblas()


def _system_openblas() -> BlasStatus | None:
    for name in (ctypes.util.find_library("openblas"), "libopenblas.so.0"):
        if name is None:
            continue
        try:
            library = ctypes.CDLL(name)
            library.cblas_sgemm, library.cblas_dgemm  # noqa: B018  an OpenBLAS built without CBLAS does not serve
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except (OSError, AttributeError):
            continue
        return BlasStatus("openblas", name)
    return None


def _numpy_openblas() -> BlasStatus:
    path = _numpy_library()
    if path is None:
        return BlasStatus("reference", advice=f"{_SLOW}: no OpenBLAS found; {_REMEDY}")
    try:
        numpy_blas = ctypes.CDLL(str(path))
        functions = {name: getattr(numpy_blas, f"scipy_{name}64_") for name in ("cblas_sgemm", "cblas_dgemm")}
        shim = _load_shim()
        for name, function in functions.items():
            getattr(shim, f"logitstore_bind_{name}")(ctypes.cast(function, ctypes.c_void_p))
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return BlasStatus("reference", advice=f"{_SLOW}: NumPy's OpenBLAS cannot be used ({reason}); {_REMEDY}")
    return BlasStatus("numpy", str(path))


def _numpy_library() -> Path | None:
    """The 64-bit OpenBLAS that NumPy's wheel carries beside the package."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.with_name("numpy.libs")
    return min(folder.glob("libscipy_openblas64_*.so*"), default=None)


def _load_shim() -> ctypes.CDLL:
    """The compiled shim, from the cache where it is there; two processes may compile it at once."""
    key = hashlib.blake2b(f"{_SHIM}{platform.machine()}{platform.libc_ver()}".encode(), digest_size=8).hexdigest()
    path = _cache_folder() / f"blas-{key}.so"
    if path.is_file():
        try:
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            path.unlink(missing_ok=True)  # made by another system: compile it again
    _compile(path)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _compile(path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    except OSError as error:
        raise OSError(f"{path.parent} cannot be written: set XDG_CACHE_HOME to a folder that can") from error
    os.close(handle)
    try:
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-o", temporary, "-"]
        done = subprocess.run(command, input=_SHIM, text=True, capture_output=True, timeout=60)
        if done.returncode != 0:
            raise OSError(f"{compiler} failed: {done.stderr.strip()[-200:]}")
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())  # a library cut short by a crash would kill whoever loads it
        os.replace(temporary, path)  # noqa: PTH105  atomic: whoever comes second replaces equal bytes
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "logitstore"
