"""A fast BLAS is under MLX, computes the same numbers, and its absence is said rather than suffered."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from distill_kernels import blas

import mlx.core as mx
import numpy as np
import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate: there is nothing to load")
# `blas` by itself: its package may import MLX.
ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("blas", {blas.__file__!r})
blas = sys.modules["blas"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
"""


def run(code: str, cache: Path) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", ALONE + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 33, 129)])
def test_matmul_through_the_loaded_blas_is_exact_to_rounding(dtype: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(dtype) for size in ((m, k), (n, k)))
    with mx.stream(mx.cpu):
        ours = np.array(mx.array(a, getattr(mx, dtype)) @ mx.array(b, getattr(mx, dtype)).T)
    truth = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(ours, truth, atol=20 * k * np.finfo(dtype).eps)


@linux_only
def test_loading_makes_gemm_global_and_imports_neither_mlx_nor_numpy(tmp_path: Path) -> None:
    code = """
import ctypes
status = blas.load()
print(status.source, hasattr(ctypes.CDLL(None), "cblas_sgemm"), {"mlx", "mlx.core", "numpy"} & set(sys.modules))
assert blas.load() is status
"""
    source, is_global, imported = run(code, tmp_path).split(" ", 2)
    assert is_global == str(source != "reference")
    assert imported == "set()"


@linux_only
def test_a_blas_loaded_after_mlx_is_reported_as_too_late(tmp_path: Path) -> None:
    source, advice = run("import mlx.core; s = blas.load(); print(s.source, s.advice, sep='|')", tmp_path).split("|")
    assert source == "too late"
    assert "import distill_kernels before mlx" in advice


@linux_only
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_two_processes_may_compile_the_shim_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ALONE + "blas._load_shim()"]
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(list((tmp_path / "logitstore").iterdir())) == 1


@linux_only
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_cached_shim_that_is_no_library_is_compiled_again(tmp_path: Path) -> None:
    run("blas._load_shim()", tmp_path)
    (shim,) = (tmp_path / "logitstore").iterdir()
    good = shim.read_bytes()
    shim.write_bytes(b"not a library")
    run("blas._load_shim()", tmp_path)
    assert len(shim.read_bytes()) == len(good)


@linux_only
def test_without_openblas_and_compiler_the_advice_says_what_to_install(tmp_path: Path) -> None:
    code = "blas._system_openblas = lambda: None; blas.shutil.which = lambda name: None; s = blas.load()"
    source, advice = run(code + "; print(s.source, s.advice, sep='|')", tmp_path).split("|")
    assert source == "reference"
    assert "apt install libopenblas0-pthread" in advice
    assert "\n" not in advice
