"""Metal's address spaces, planted mistakes that g++ takes; that the kernels make none, `emulation.emulator` sees to."""

from typing import Any

import mlx.core as mx
import pytest

from tests.address_spaces import address_space_faults
from tools.metal_emulator import capture

HEADER = """
template <int N>
inline float total(const thread float* values) { return values[0] + values[N - 1]; }
inline float first(const device float* values) { return values[0]; }
inline void keep(threadgroup float* to, float value) { to[0] = value; }
"""
BODY = """
    threadgroup float shared[8];
    float own[2] = {float(a[0]), float(a[1])};
    keep(shared, total<2>(own) + first(b));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[thread_position_in_grid.x] = T(shared[0]);
"""


def faults(body: str, header: str = HEADER) -> str:
    make: Any = mx.fast.metal_kernel
    kernel = make(name="planted", input_names=["a", "b"], output_names=["out"], source=body, header=header)
    launch = capture(
        kernel,
        inputs=[mx.zeros(64, mx.bfloat16), mx.zeros(64)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.bfloat16],
        template=[("T", mx.bfloat16)],
    )
    return "; ".join(address_space_faults(launch.source))


def test_a_kernel_that_keeps_them_apart_has_no_faults() -> None:
    assert faults(BODY) == ""


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("total<2>(own)", "total<2>(b)", "total<2>(b)"),
        ("first(b)", "first(own)", "first(own)"),
        ("keep(shared, ", "keep(own, ", "keep(own, "),
        ("float own[2] = {float(a[0]), float(a[1])};", "device float* own = shared;", "own = shared"),
        ("float(a[0])", "a[0]", "a[0]"),
    ],
)
def test_a_mistake_is_named(was: str, becomes: str, said: str) -> None:
    assert BODY.count(was) == 1
    assert said in faults(BODY.replace(was, becomes))


def test_a_pointer_that_names_no_space_is_named() -> None:
    assert "no address space: inline float first" in faults(BODY, HEADER.replace("const device float*", "const float*"))
