"""The Metal emulator: each defect it knows, planted and caught at its line; the library it offers, against NumPy."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.tuner.losses as mlx_lm_losses
import numpy as np
import pytest

from tools.metal_emulator import (
    SCHEDULES,
    CaptureError,
    CompileError,
    DefectError,
    EmulatorError,
    Run,
    Virtual,
    capture,
    compiler,
    emulate,
    emulated,
    execute,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="the Metal emulator needs g++ on Linux")

Kernel = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def kernel(source: str, inputs: tuple[str, ...] = ("a",), outputs: tuple[str, ...] = ("out",), **more: Any) -> Kernel:
    make: Any = mx.fast.metal_kernel
    made: Kernel = make(name="test", input_names=list(inputs), output_names=list(outputs), source=source, **more)
    return made


def call(*inputs: Any, threads: int = 64, out: int = 64, dtype: mx.Dtype = mx.float32, **more: Any) -> dict[str, Any]:
    """The arguments of a call with one threadgroup and one output."""
    shape: dict[str, Any] = {"grid": (threads, 1, 1), "threadgroup": (threads, 1, 1)}
    return {"inputs": list(inputs), "output_shapes": [(out,)], "output_dtypes": [dtype], **shape, **more}


def defects(source: str, schedule: str | int = "ascending", **more: Any) -> set[tuple[str, int | None]]:
    """The kinds and lines of the defects of `source` over 64 threads and a 64-element input; both lines of a race."""
    run = execute(capture(kernel(source), **call(mx.arange(64.0), **more)), schedule)
    races = {(each.kind, each.other_line) for each in run.defects if each.kind == "threadgroup race"}
    return races | {(each.kind, each.line) for each in run.defects}


# ---------------------------------------------------------------- defects: planted, then mended

REVERSE = """\
uint i = thread_index_in_threadgroup;
threadgroup float shared[64];  // threadgroup words in comments, [brackets]; are no declarations
shared[i] = a[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
out[i] = shared[63 - i];
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_clean_kernel_has_no_defects(schedule: str | int) -> None:
    assert defects(REVERSE, schedule) == set()
    run = execute(capture(kernel(REVERSE), **call(mx.arange(64.0))), schedule)
    assert np.array_equal(np.array(run.outputs[0]), np.arange(64.0)[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", ("threadgroup race", 5)),
        ("mem_threadgroup", "mem_none", ("threadgroup race", 5)),
        ("mem_threadgroup", "mem_device", ("threadgroup race", 5)),
        ("threadgroup_barrier", "if (i < 32) threadgroup_barrier", ("divergent barrier", 4)),
        ("threadgroup_barrier", "if (i > 40) return; threadgroup_barrier", ("divergent barrier", 4)),
        ("= a[i]", "= a[i + 1]", ("read out of bounds", 3)),
        ("= a[i]", "= a[int(i) - 1]", ("read out of bounds", 3)),
        ("out[i]", "out[i + 1]", ("write out of bounds", 5)),
        ("shared[i] =", "shared[i + 1] =", ("write out of bounds", 3)),
        ("shared[63 - i]", "shared[64 - i]", ("read out of bounds", 5)),
        ("shared[i] =", "if (i != 7) shared[i] =", ("uninitialised threadgroup read", 5)),
        ("out[i] =", "((device float *)a)[i] = 0; out[i] =", ("write to a const buffer", 5)),
        ("shared[64]", "shared[9000]", ("too much threadgroup memory", 2)),
    ],
)
def test_a_planted_defect_is_caught_at_its_line(
    was: str, becomes: str, expected: tuple[str, int], schedule: str | int
) -> None:
    assert was in REVERSE
    assert expected in defects(REVERSE.replace(was, becomes), schedule)


def test_a_race_names_both_lines_whichever_comes_first() -> None:
    source = REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    run = execute(capture(kernel(source), **call(mx.arange(64.0))))
    pairs = {(each.line, each.other_line) for each in run.defects if each.kind == "threadgroup race"}
    assert pairs in ({(5, 3)}, {(3, 5)})  # once, whichever came first
    assert any("shared[63 - i]" in each.text for each in run.defects)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_simd_operation_that_some_lanes_skip_is_divergent(schedule: str | int) -> None:
    source = """\
    uint i = thread_index_in_threadgroup;
    float x = a[i];
    if (i % 32 < 16)
        x = simd_sum(x);
    out[i] = simd_max(x);
    """
    assert defects(source, schedule) == {("divergent simd operation", 4)}
    assert defects(source.replace("if (i % 32 < 16)", "if (i < 32)"), schedule) == set()


def test_lanes_at_two_sites_or_ended_are_divergent() -> None:
    two_sites = (
        "float x = a[thread_position_in_grid.x];\nif (x < 9) x = simd_sum(x);\nelse x = simd_sum(2 * x);\nout[0] = x;"
    )
    assert ("divergent simd operation", 2) in defects(two_sites)
    ended = "if (thread_index_in_simdgroup > 5) return;\nout[0] = simd_sum(a[0]);"
    assert defects(ended) == {("divergent simd operation", 2)}


@pytest.mark.parametrize(
    "source",
    [
        "if (l == 0) x *= 2; x = simd_sum(x); if (l == 0) out[i] = x; else out[i] = l; x = simd_max(x + out[i]);",
        "int n = l; while (simd_any(n > 0)) { if (n > 0) { n--; x += a[n]; } }",
        "for (int k = 0; k < 7; k++) { if ((i + k) % 3) x += k; else x = 0; x += simd_shuffle_xor(x, 1 << (k % 5)); }",
        "if (i / 32 == 1) x = simd_sum(l < 4 ? x : 0); threadgroup_barrier(mem_flags::mem_none);",
        "if (a[0] > 0) { x = simd_sum(x); threadgroup_barrier(mem_flags::mem_none); return; } x = simd_min(x);",
    ],
)
def test_threads_that_meet_again_are_not_called_divergent(source: str) -> None:
    given = "uint i = thread_index_in_threadgroup, l = thread_index_in_simdgroup; float x = a[i];"
    for schedule in SCHEDULES:
        assert defects(f"{given} {source} out[i] = x;", schedule) == set()


def test_a_thread_may_wait_for_another_at_an_atomic() -> None:
    source = """\
    uint i = thread_index_in_threadgroup;
    if (i == 40) atomic_store_explicit(&out[0], 1u, memory_order_relaxed);
    while (atomic_load_explicit(&out[0], memory_order_relaxed) == 0) {}
    """
    out = emulate(kernel(source, atomic_outputs=True), **call(mx.zeros(8), out=1, dtype=mx.uint32, init_value=0))[0]
    assert out.item() == 1


def test_each_array_has_its_own_bounds_and_templates_size_them() -> None:
    source = """\
    threadgroup T first[N], second[2][N];
    threadgroup
        float one;
    uint i = thread_index_in_threadgroup;
    first[i] = T(i); second[1][i] = T(i);
    if (i == 0) one = 2;
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    threadgroup T* pointer = first;
    out[i] = float(pointer[i]) * one + float(((threadgroup T*)&second[1][0])[i]);
    """
    template = [("T", mx.bfloat16), ("N", 64)]
    out = emulate(kernel(source), **call(mx.zeros(8), template=template))[0]
    assert np.array_equal(np.array(out), np.arange(64.0) * 3)
    assert defects(source.replace("pointer[i]", "pointer[i + 1]"), template=template) == {("read out of bounds", 9)}
    run = execute(capture(kernel(source), **call(mx.zeros(8), template=template)))
    assert run.threadgroup_bytes == 3 * 128 + 4


def test_a_helper_in_the_header_is_blamed_on_the_line_that_calls_it() -> None:
    header = "template <typename P>\ninline float third(P p) {\n    return p[3];\n}\n"
    source = "float x = 0;\nx += third(a);\nout[0] = x + third(b);"
    for inline in ("inline", "METAL_FUNC"):
        made = kernel(source, ("a", "b"), header=header.replace("inline", inline))
        run = execute(capture(made, **call(mx.zeros(9), mx.zeros(2), threads=1)))
        assert [(d.kind, d.line, d.header_line) for d in run.defects] == [("read out of bounds", 3, 3)]


def test_a_wild_pointer_stops_its_thread_and_not_the_process() -> None:
    source = """\
    uint i = thread_index_in_threadgroup;
    if (i == 3) out[0] = *(device float*)(a[0] > 0 ? 64ul : 72ul);
    out[i] = 1;
    """
    run = execute(capture(kernel(source), **call(mx.zeros(64))))
    assert [(d.kind, d.line) for d in run.defects] == [("read out of bounds", 2)]
    assert "belongs to no argument" in run.defects[0].message
    assert np.isnan(np.array(run.outputs[0])).nonzero()[0].tolist() == [3]


def test_an_integer_division_by_zero_stops_its_thread_and_not_the_process() -> None:
    source = "int i = thread_index_in_threadgroup;\nout[i] = 100 / (i - 9) + a[0];"
    run = execute(capture(kernel(source), **call(mx.zeros(64))))
    assert [(d.kind, d.line) for d in run.defects] == [("integer division by zero", 2)]
    assert np.isnan(np.array(run.outputs[0])).nonzero()[0].tolist() == [9]


def test_constants_of_the_header_are_readable() -> None:
    header = "constant float table[4] = {1, 2, 3, 4};\nconstant constexpr int last = 3;\n"
    made = kernel("out[0] = table[thread_index_in_threadgroup % 4] + last;", header=header)
    assert emulate(made, **call(mx.zeros(8), threads=1, out=1))[0].item() == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("threadgroup float x = 1; out[0] = x;", "refuses an initial value"),
        ("threadgroup float x[2], *p; out[0] = x[0];", "is not understood"),
    ],
)
def test_a_threadgroup_declaration_that_is_not_understood_is_refused(source: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        emulate(kernel(source), **call(mx.zeros(8)))
    with pytest.raises(CaptureError, match="only in the kernel, not x in its header"):
        emulate(kernel("out[0] = 1;", header="void f() { threadgroup float x[2]; }"), **call(mx.zeros(8)))


def test_emulate_raises_and_lists_every_defect() -> None:
    source = REVERSE.replace("= a[i]", "= a[i + 1]").replace("out[i]", "out[i + 1]")
    with pytest.raises(DefectError, match="has 2 defects") as caught:
        emulate(kernel(source), **call(mx.arange(64.0)))
    assert {each.line for each in caught.value.defects} == {3, 5}
    assert "line 3: shared[i] = a[i + 1];" in str(caught.value)


def test_emulate_refuses_a_result_that_depends_on_the_order() -> None:
    source = "atomic_store_explicit(&out[0], thread_index_in_threadgroup, memory_order_relaxed);"
    made = kernel(source, atomic_outputs=True)
    with pytest.raises(DefectError, match="output 0 depends on the order of the simdgroups"):
        emulate(made, **call(mx.zeros(8), out=1, dtype=mx.uint32))


# ---------------------------------------------------------------- the library, against NumPy


def test_simd_operations_equal_numpy() -> None:
    expressions: dict[str, Callable[..., Any]] = {
        "simd_sum(x)": lambda x: np.full(32, x.sum()),
        "simd_product(x)": lambda x: np.full(32, x.prod()),
        "simd_max(x)": lambda x: np.full(32, x.max()),
        "simd_min(x)": lambda x: np.full(32, x.min()),
        "simd_broadcast(x, 5)": lambda x: np.full(32, x[5]),
        "simd_broadcast_first(x)": lambda x: np.full(32, x[0]),
        "simd_shuffle(x, 31 - i % 32)": lambda x: x[::-1],
        "simd_shuffle_up(x, 3)": lambda x: np.r_[x[:3], x[:-3]],
        "simd_shuffle_down(x, 3)": lambda x: np.r_[x[3:], x[-3:]],
        "simd_shuffle_xor(x, 6)": lambda x: x[np.arange(32) ^ 6],
        "simd_prefix_inclusive_sum(x)": lambda x: np.cumsum(x),
        "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
        "simd_any(x > 1.2f) ? 1 : 0": lambda x: np.full(32, float((x > 1.2).any())),
        "simd_all(x > 1.2f) ? 1 : 0": lambda x: np.full(32, float((x > 1.2).all())),
        "popcount((simd_vote::vote_t)simd_ballot(x > 1))": lambda x: np.full(32, float((x > 1).sum())),
        "simd_or(as_type<uint>(x)) >> 20": lambda x: np.full(32, np.bitwise_or.reduce(x.view(np.uint32)) >> 20),
        "simd_and(as_type<uint>(x)) >> 20": lambda x: np.full(32, np.bitwise_and.reduce(x.view(np.uint32)) >> 20),
        "simd_xor(uint(x * 8))": lambda x: np.full(32, np.bitwise_xor.reduce((x * 8).astype(np.uint32))),
        "simd_is_first() ? 1 : 0": lambda _: np.r_[1.0, np.zeros(31)],
        "simd_sum(float2(x, 1)).y": lambda _: np.full(32, 32.0),
    }
    lines = [f"out[{k * 64} + i] = {text};" for k, text in enumerate(expressions)]
    source = "\n".join(["uint i = thread_index_in_threadgroup; float x = a[i];", *lines])
    x = np.random.default_rng(0).uniform(0.9, 1.3, 64).astype(np.float32)
    out = np.array(emulate(kernel(source), **call(mx.array(x), out=64 * len(lines)))[0]).reshape(-1, 64)
    for row, (text, formula) in zip(out, expressions.items(), strict=True):
        expected = np.r_[formula(x[:32]), formula(x[32:])]
        np.testing.assert_allclose(row, expected, rtol=2e-6, err_msg=text)


def test_an_incomplete_simdgroup_is_no_divergence() -> None:
    source = "out[thread_position_in_grid.x] = simd_sum(1.0f) + simd_max(a[thread_position_in_grid.x]);"
    out = emulate(kernel(source), **call(mx.arange(64.0), threads=40, out=40))[0]
    assert np.array_equal(np.array(out), np.r_[np.full(32, 32.0 + 31), np.full(8, 8.0 + 39)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mathematics_in_each_float_type(dtype: mx.Dtype) -> None:
    expressions: dict[str, Callable[..., Any]] = {
        "metal::fast::exp(x)": np.exp,
        "precise::log(x)": np.log,
        "metal::precise::exp2(x)": np.exp2,
        "sqrt(x) * rsqrt(x)": lambda x: x / x,
        "tanh(x)": np.tanh,
        "log1p(x)": np.log1p,
        "pow(x, x)": lambda x: x**x,
        "fma(x, x, x)": lambda x: x * x + x,
        "clamp(x, T(0.5), T(1))": lambda x: x.clip(0.5, 1),
        "select(x, -x, x > T(1))": lambda x: np.where(x > 1, -x, x),
        "floor(x) + rint(x) + metal::trunc(x) - ceil(x)": lambda x: np.floor(x) + np.rint(x) + np.trunc(x) - np.ceil(x),
        "isnan(x) ? T(1) : metal::abs(-x)": np.abs,
        "min(Limits<T>::max, max(x, metal::numeric_limits<T>::lowest()))": lambda x: x,
        "sign(x) * T(i + 1) / (T(2) + x)": lambda x: np.arange(1, 65) / (2 + x),
        "(i < 64) ? x : 0.0f": lambda x: x,
    }
    lines = [f"out[{k * 64} + i] = static_cast<T>({text});" for k, text in enumerate(expressions)]
    source = "\n".join(["uint i = thread_index_in_threadgroup; T x = a[i];", *lines])
    x = mx.array(np.random.default_rng(1).uniform(0.1, 3, 64)).astype(dtype)
    out = emulate(kernel(source), **call(x, out=64 * len(lines), dtype=dtype, template=[("T", dtype)]))[0]
    wide = np.array(x.astype(mx.float32), np.float64)
    step = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    rows = np.array(out.astype(mx.float32)).reshape(-1, 64)
    for row, (text, formula) in zip(rows, expressions.items(), strict=True):
        np.testing.assert_allclose(row, formula(wide), rtol=step, atol=step, err_msg=text)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_rounding_to_16_bits_is_that_of_mlx(dtype: mx.Dtype) -> None:
    a = np.random.default_rng(2).standard_normal((2, 4096)) * 2.0 ** np.arange(-20, 12, 1 / 128)
    x, y = (mx.array(row.astype(np.float32)).astype(dtype) for row in a)
    source = "uint i = thread_position_in_grid.x; out[i] = a[i] * b[i]; sum[i] = static_cast<T>(float(a[i]) + b[i]);"
    arguments = call(x, y, threads=1024, template=[("T", dtype)])
    arguments.update(grid=(4096, 1, 1), output_shapes=[(4096,)] * 2, output_dtypes=[dtype] * 2)
    product, total = emulate(kernel(source, ("a", "b"), ("out", "sum")), **arguments)
    assert mx.array_equal(product, x * y).item()
    assert mx.array_equal(total, (x.astype(mx.float32) + y.astype(mx.float32)).astype(dtype)).item()


def test_a_bfloat_is_made_from_a_float_only_explicitly() -> None:
    source = "T x = 1.0f * a[0];\nout[0] = x;"
    emulate(kernel(source), **call(mx.ones(8, mx.float16), out=1, dtype=mx.float16, template=[("T", mx.float16)]))
    with pytest.raises(CompileError, match=r"kernel.source:1:"):
        emulate(kernel(source), **call(mx.ones(8), out=1, dtype=mx.bfloat16, template=[("T", mx.bfloat16)]))


def test_vectors() -> None:
    source = """\
    float4 v = *(const device float4*)(a + 4);
    float3 u = v.xyz * 2 + float3(1, 2, 3);
    v.zw = float2(u.x, u.y) - v.xy;
    half4 h = half4(v); uint2 n = uint2(3, 4) << 1; packed_float3 p = u;
    bool4 less = v < float4(6);
    out[0] = v.z; out[1] = dot(u, u); out[2] = float(h.w) + n.x * n.y; out[3] = sizeof(float3) + sizeof(packed_float3);
    p *= 2; p = p / 2 + float3(0);
    out[4] = any(less) && !all(less); out[5] = max(v, 4.5f).x; out[6] = metal::length(float2(3, 4)); out[7] = p[2];
    """
    out = np.array(emulate(kernel(source), **call(mx.arange(8.0), threads=1, out=8))[0])
    v, u = np.array([4.0, 5, 9 - 4, 12 - 5]), np.array([9.0, 12, 15])
    assert out.tolist() == [v[2], u @ u, v[3] + 48, 28, 1, 4.5, 5, 15]


def test_integer_functions() -> None:
    source = """\
    out[0] = popcount(0xF0Fu); out[1] = clz(1u); out[2] = ctz(8u); out[3] = reverse_bits(1u) >> 31;
    out[4] = mulhi(0x80000000u, 6u); out[5] = as_type<uint>(1.0f); out[6] = ceildiv(9, 4); out[7] = clz(ushort(1));
    out[8] = sizeof(size_t) + sizeof(ulong) + sizeof(uchar) + sizeof(bfloat16_t) + sizeof(half);
    """
    out = emulate(kernel(source), **call(mx.zeros(8), threads=1, out=9, dtype=mx.uint32))[0]
    assert out.tolist() == [8, 31, 3, 1, 3, 0x3F800000, 3, 15, 21]


@pytest.mark.parametrize("on", ["device", "threadgroup"])
def test_atomics(on: str) -> None:
    object_, more = ("&out[0]", {"init_value": 5}) if on == "device" else ("&sum", {})
    source = f"""\
    uint i = thread_index_in_threadgroup;
    threadgroup atomic_uint sum;
    if (i == 0) atomic_store_explicit(&sum, 5, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit({object_}, i, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i == 0 && {int(on == "threadgroup")})
        atomic_store_explicit(&out[0], atomic_load_explicit(&sum, memory_order_relaxed), memory_order_relaxed);
    uint seen = 0;
    while (i < 2 && !atomic_compare_exchange_weak_explicit(
        &out[1], &seen, seen + i + 1, memory_order_relaxed, memory_order_relaxed)) {{}}
    """
    made = kernel(source, atomic_outputs=True)
    out = emulate(made, **call(mx.zeros(8), out=2, dtype=mx.uint32, **{"init_value": 0, **more}))[0]
    assert out[0].item() == 5 + 63 * 32
    assert out[1].item() - (5 if more else 0) == 3


def test_one_plain_access_among_atomics_is_a_race() -> None:
    source = """\
    threadgroup atomic_uint sum;
    atomic_fetch_add_explicit(&sum, 1, memory_order_relaxed);
    if (thread_index_in_threadgroup == 40) *(threadgroup uint*)&sum = 0;
    out[0] = a[0];
    """
    found = defects(source)
    assert ("threadgroup race", 3) in found or ("threadgroup race", 2) in found
    assert ("uninitialised threadgroup read", 2) in found


# ---------------------------------------------------------------- arguments


def test_small_and_scalar_inputs_are_constant_and_positions_are_right() -> None:
    source = """\
    uint i = thread_position_in_grid.x + threads_per_grid.x * thread_position_in_grid.y;
    out[i] = scale * small[2] + thread_position_in_threadgroup.x + 10 * threadgroup_position_in_grid.y
        + 100 * simdgroup_index_in_threadgroup + thread_index_in_simdgroup / 32 + threads_per_threadgroup.x;
    """
    made = kernel(source, ("scale", "small"))
    arguments = call(mx.array(2.0), mx.array([1, 2, 3], mx.int8), out=200)
    arguments.update(grid=(50, 4, 1), threadgroup=(40, 2, 1))
    launch = capture(made, **arguments)
    assert "const constant int8_t* small" in launch.source
    x, y = np.meshgrid(np.arange(50), np.arange(4))
    width = np.where(x < 40, 40, 10)  # the last threadgroup of a row is cut short
    expected = 6 + x % 40 + 10 * (y // 2) + 100 * ((x % 40 + width * (y % 2)) // 32) + width
    for schedule in SCHEDULES:
        run = execute(launch, schedule)
        assert not run.defects
        assert np.array_equal(np.array(run.outputs[0]).reshape(4, 50), expected)


def test_strides_are_passed_unless_the_input_is_made_contiguous() -> None:
    source = """\
    uint i = thread_position_in_grid.x;
    out[i] = float(a[elem_to_loc(int64_t(i), a_shape, a_strides, a_ndim)]) + a_strides[0] * 1000;
    """
    base = mx.arange(60.0).reshape(6, 10).astype(mx.bfloat16)
    view = base[1:5:2, ::-3].T
    wanted = np.array(view.astype(mx.float32)).ravel()
    for contiguous, stride in ((True, 2), (False, -3)):
        made = kernel(source, ensure_row_contiguous=contiguous)
        out = emulate(made, **call(view, threads=8, out=8))[0]
        assert np.array_equal(np.array(out), wanted + 1000 * stride)


def test_bytes_are_counted_per_argument() -> None:
    source = """\
    uint i = thread_index_in_threadgroup;
    float x = 0;
    for (uint k = i; k < uint(a_shape[0]); k += 64) x += float(a[k]);
    x = simd_sum(x);
    if (i % 32 == 0) out[i / 32] = x * scale[0];
    """
    run = execute(capture(kernel(source, ("a", "scale")), **call(mx.ones(1000, mx.float16), mx.ones(9), out=2)))
    assert run.loads["a"] == 2000 and run.loads["scale"] == 8 and run.loads["out"] == 0
    assert run.stores == {"a": 0, "a_shape": 0, "scale": 0, "out": 8}


def test_init_value_fills_and_nothing_else_is_defined() -> None:
    made = kernel("if (thread_index_in_threadgroup == 0) out[1] = 7;")
    given = emulate(made, **call(mx.zeros(8), out=3, init_value=2))[0]
    assert np.array(given).tolist() == [2, 7, 2]
    garbage = emulate(made, **call(mx.zeros(8), out=3))[0]
    assert np.isnan(np.array(garbage)).tolist() == [True, False, True]


def test_offsets_past_32_bits_need_no_memory() -> None:
    vocab, rows = 151_936, 32_768  # 2^32.2 elements: 20 GB each
    source = """\
    INDEX row = threadgroup_position_in_grid.y;
    out[row * V + thread_index_in_threadgroup] = 2 * a[row * V + thread_index_in_threadgroup];
    """
    last = (rows - 1) * vocab
    a = Virtual((rows, vocab), mx.float32, {last: mx.arange(1.0, 33.0)})
    for index, expected in (("size_t", 2.0), ("uint", 0.0)):
        arguments = call(a, threads=32, template=[("V", vocab)], virtual_outputs=True)
        arguments.update(grid=(32, rows, 1), threadgroup=(32, 1, 1), output_shapes=[(rows, vocab)])
        launch = capture(kernel(source.replace("INDEX", index)), **arguments)
        run = execute(launch, groups=[(0, rows - 1, 0)])
        assert not run.defects and run.outputs == []
        assert run.slice("out", last, last + 1).item() == expected
        assert run.stores["out"] == 128
    with pytest.raises(EmulatorError, match="one of `groups` is outside"):
        execute(launch, groups=[(0, rows, 0)])


def test_a_call_that_metal_would_refuse_is_refused() -> None:
    with pytest.raises(CaptureError, match="Metal takes 1 to 1024"):
        capture(kernel("out[0] = a[0];"), **call(mx.zeros(8), threads=1025))
    with pytest.raises(CompileError, match=r"kernel.source:2:.*nowhere"):
        emulate(kernel("out[0] = a[0];\nout[1] = nowhere;"), **call(mx.zeros(8)))
    with pytest.raises(CompileError, match="double"):
        emulate(kernel("double x = 1; out[0] = x;"), **call(mx.zeros(8)))
    with pytest.raises(EmulatorError, match="give 'ascending', 'descending' or a seed"):
        execute(capture(kernel("out[0] = a[0];"), **call(mx.zeros(8))), "sideways")


def test_the_gpp_of_macos_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert compiler() is None  # /usr/bin/g++ is Clang, and its C library has no <link.h>


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match=r"apt install g\+\+"):
        emulate(kernel("out[0] = a[0] + 12345;"), **call(mx.zeros(8)))


def test_a_compiled_kernel_is_kept_in_the_folder_given(tmp_path: Path) -> None:
    launch = capture(kernel("out[0] = a[0];"), **call(mx.zeros(8)))
    execute(launch, cache=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(path.name.split("-")[0] for path in files) == ["kernel", "runtime"]
    execute(launch, cache=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


# ---------------------------------------------------------------- whole functions

SQUARE = "uint i = thread_position_in_grid.x; out[i] = a[i] * a[i];"
DOUBLE = "uint i = thread_position_in_grid.x; out[i] = 2 * a[i] * b[i];"


def squares(forward: Kernel, backward: Kernel) -> Callable[[mx.array], Any]:
    @mx.custom_function
    def square(x: mx.array) -> mx.array:
        out: mx.array = forward(**call(x))[0]
        return out

    @square.vjp
    def square_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        out: mx.array = backward(**call(x, cotangent))[0]
        return out

    def total(x: mx.array) -> Any:
        out: Any = square(x)
        return out.sum()

    return total


def test_emulated_kernels_work_under_value_and_grad() -> None:
    x = mx.arange(64.0)
    with emulated(schedules=("descending",)) as session:
        loss = squares(kernel(SQUARE), kernel(DOUBLE, ("a", "b")))
        value, gradient = mx.value_and_grad(loss)(x)
    assert value.item() == np.sum(np.arange(64.0) ** 2)
    assert np.array_equal(np.array(gradient), 2 * np.arange(64.0))
    assert [run.schedule for run in session.runs] == ["descending", "descending"]


def test_emulated_raises_or_records_and_ends() -> None:
    before = kernel(REVERSE.replace("= a[i]", "= a[i + 1]"))
    with emulated() as session, pytest.raises(DefectError, match="read out of bounds"):
        session.wrap(before)(**call(mx.zeros(64)))
    with emulated(raises=False) as session:
        stand_in = session.wrap(before)
        stand_in(**call(mx.zeros(64)))
    assert [each.kind for run in session.runs for each in run.defects] == ["read out of bounds"]
    if not mx.metal.is_available():
        with pytest.raises((ValueError, RuntimeError), match="No Metal back-end"):
            mx.eval(stand_in(**call(mx.zeros(64))))


def test_inside_compile_the_error_says_so() -> None:
    mx.enable_compile()
    try:
        with emulated(), pytest.raises(CaptureError, match=r"cannot run inside mx\.compile"):
            made = kernel(SQUARE)
            mx.compile(lambda x: made(**call(x))[0])(mx.zeros(64))
    finally:
        mx.disable_compile()  # as the other tests of this suite have it


# ---------------------------------------------------------------- a kernel of somebody else


@pytest.fixture
def kl_source(monkeypatch: pytest.MonkeyPatch) -> str:
    """The source of mlx-lm's own forward kernel of the KL divergence."""
    made: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(mlx_lm_losses, "can_run_metal", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", lambda **arguments: made.append(arguments["source"]))
        make: Any = mlx_lm_losses._make_kl_forward_kernel
        make()
    return made[0]


def kl_run(source: str, schedule: str | int = "ascending") -> tuple[Run, np.ndarray[Any, Any]]:
    student, teacher = np.random.default_rng(3).standard_normal((2, 2, 5000)) * 3
    inputs = [mx.array(each.astype(np.float32)) for each in (student, teacher)]
    made = kernel(source, ("logits_q", "logits_p"))
    arguments = call(*inputs, template=[("T", mx.float32), ("V", 5000)])
    arguments.update(grid=(1024, 2, 1), threadgroup=(1024, 1, 1), output_shapes=[(2,)])
    q, p = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (student, teacher))
    return execute(capture(made, **arguments), schedule), (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_kl_kernel_of_mlx_lm_races_and_one_barrier_mends_it(kl_source: str, schedule: str | int) -> None:
    run, _ = kl_run(kl_source, schedule)
    texts = {kind: {d.text for d in run.defects if d.kind == kind} for kind in {d.kind for d in run.defects}}
    assert set(texts) == {"threadgroup race"}
    lines = kl_source.splitlines()
    first_sum = next(k for k, line in enumerate(lines, 1) if "shared[" in line and "= sum_exp_q;" in line)
    assert any(first_sum in (d.line, d.other_line) for d in run.defects)
    assert any("= max_q" in (d.text + d.other_text) or "max_q = shared" in (d.text + d.other_text) for d in run.defects)

    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    mended = kl_source.replace("mem_none", "mem_threadgroup")
    mended = mended.replace("// Share the sum_exp across", f"{barrier} // Share the sum_exp across")
    run, expected = kl_run(mended, schedule)
    assert run.defects == ()
    np.testing.assert_allclose(np.array(run.outputs[0]), expected, rtol=1e-5)
