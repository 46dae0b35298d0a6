"""The teacher's side as Metal kernels, executed: held against NumPy's selection given the same random numbers."""

from dataclasses import replace
from math import prod
from typing import Any
from unittest.mock import patch

from distill_kernels import metal
from distill_kernels.select import Kept, log_z, select_threshold, select_threshold_ops, select_top_k, select_top_k_ops
from distill_kernels.select_metal import MOST_KEPT, select_threshold_kernel, select_top_k_kernel

import mlx.core as mx
import numpy as np
import pytest

from logitstore import cpu_selection, device_selection
from logitstore.selection import Selected, Selection, randomness
from tests.distributions import SHAPES, logits_row, softmax
from tests.emulation import emulator, needs_compiler  # noqa: F401
from tests.oracle import log_softmax
from tests.test_selection import (  # noqa: F401  some are collected here too, to run on the kernels
    BESIDE,
    KEY,
    falling,
    require_mean,
    rows,
    test_a_broken_teacher_is_refused,
    test_a_tiny_tail_mass_is_summed_and_not_cancelled,
    test_log_z_is_that_of_its_definition,
    test_mlx_draws_no_id_beyond_the_vocabulary_where_the_last_block_is_empty,
    test_mlx_takes_logits_of_half_precision,
    weights,
)
from tools.metal_emulator import SCHEDULES, Emulated, Virtual, capture, execute

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulator")]

VOCABULARIES = [2, 7, 1000, 4099, 49_152, 151_936]
CASES = [(vocab_size, k, mx.float32) for vocab_size in VOCABULARIES for k in (1, 12, 16, 50)]
CASES += [(vocab_size, 12, dtype) for vocab_size in VOCABULARIES for dtype in (mx.float16, mx.bfloat16)]


def on_both(z: mx.array, text: str, temperature: float = 1.0, seed: int = 0) -> tuple[Selected, Selected]:
    """The kernels' and NumPy's choice, given the same random numbers; what is beside the entries, in float64."""
    (n, vocab_size), selection = z.shape, Selection.parse(text)
    labels = (np.arange(n) * 7 + vocab_size - 1) % vocab_size
    random = randomness(KEY, np.arange(n), selection, vocab_size, seed=seed)
    plain = np.array(z.astype(mx.float32))
    ours = device_selection.select(z, labels, selection, temperature, random)
    wanted = cpu_selection.select(plain, labels, selection, temperature, random)
    log_p = log_softmax(plain.astype(np.float64))
    entropy = -(np.exp(log_p) * np.maximum(log_p, -1e4)).sum(axis=1)
    return ours, replace(wanted, label_log_prob=log_p[np.arange(n), labels], entropy=entropy)


def assert_same(ours: Selected, wanted: Selected) -> None:
    np.testing.assert_array_equal(ours.head_count, wanted.head_count)
    np.testing.assert_array_equal(ours.ids, wanted.ids)
    np.testing.assert_allclose(ours.values, wanted.values, rtol=3e-6, atol=1e-30)
    for name in BESIDE:
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=5e-6, atol=2e-6)


def problem(n: int, vocab_size: int, seed: int = 0) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return (logits, labels, block_order, start)."""
    rng, blocks = np.random.default_rng(seed), -(-vocab_size // 64)
    order = rng.permuted(np.tile(np.arange(blocks, dtype=np.uint32), (n, 1)), axis=1)
    start = rng.integers(0, 1 << 24, n).astype(np.int32)
    labels = rng.integers(0, vocab_size, n).astype(np.int32)
    return mx.array(rows(n, vocab_size, 3.0, seed)), mx.array(labels), mx.array(order), mx.array(start)


@pytest.mark.parametrize(("vocab_size", "k", "dtype"), CASES)
def test_the_kernels_keep_what_numpy_keeps(vocab_size: int, k: int, dtype: mx.Dtype) -> None:
    n = 9 if vocab_size in (2, 1000) else 2
    wider = falling(n, vocab_size + 3) * (1 + np.arange(n)[:, None] % 3)
    z = mx.array(wider).astype(dtype)[:, 1:-2]  # rows that do not follow each other
    for temperature in (1.0, 2.0):
        assert_same(*on_both(z, f"threshold:{k}", temperature))
    assert_same(*on_both(z, f"top-k:{k}", 2.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", [1, 65, 4099])
def test_rows_of_every_ugly_shape_are_kept_as_numpy_keeps_them(vocab_size: int, shape: str) -> None:
    rng = np.random.default_rng(1)
    z = mx.array(np.stack([logits_row(shape, vocab_size, rng) for _ in range(3)]))
    for text in ("threshold:5", "top-k:16", "top-p:0.8:16"):
        assert_same(*on_both(z, text))


def test_logits_are_taken_as_they_lie_in_memory() -> None:
    z = falling(3, 1000)
    wanted = on_both(mx.array(z), "threshold:16")[1]
    columns, every_second = mx.array(z.T.copy()).T, mx.repeat(mx.repeat(mx.array(z), 2, axis=0), 2, axis=1)[::2, ::2]
    backwards = mx.array(z[::-1, ::-1].copy())[::-1, ::-1]
    for view in (columns, every_second, backwards, mx.broadcast_to(mx.array(z[:1]), (3, 1000))):
        ours, here = on_both(view, "threshold:16")
        assert_same(ours, here)
    np.testing.assert_array_equal(on_both(columns, "threshold:16")[0].ids, wanted.ids)


@pytest.mark.parametrize(("vocab_size", "k"), [(40_000, 1024), (140_000, 1000), (262_208, 50)])
def test_many_entries_and_many_blocks_fit(vocab_size: int, k: int, emulator: Emulated) -> None:  # noqa: F811
    emulator.schedules = ("descending",)
    z = mx.array(falling(1, vocab_size))
    for text in (f"threshold:{k}", f"top-k:{k}"):
        ours, wanted = on_both(z, text)
        np.testing.assert_array_equal(ours.head_count, wanted.head_count)
        assert (ours.ids == wanted.ids).mean() > 0.99
    assert max(run.threadgroup_bytes for run in emulator.runs) <= 32_768


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_distribution_is_told_and_harms_no_other(bad: float) -> None:
    z, *others = problem(3, 4099)
    broken = mx.array(z)
    broken[1, 50 if bad != -np.inf else slice(None)] = bad
    for k in (16, 50):
        found, wanted = (select_threshold(x, others[0], k, 1.0, *others[1:]) for x in (broken, z))
        assert not found.ids[1].any() and mx.isnan(found.probs[1]).all() and mx.isnan(found.tail_mass[1])
        assert found.head_count[1] == 0 and not mx.isfinite(found.entropy[1])
        assert all(mx.array_equal(a[::2], b[::2]) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("k", [0, MOST_KEPT + 1])
def test_more_entries_than_a_threadgroup_holds_are_refused(k: int) -> None:
    z, labels, order, start = problem(1, 1000)
    with pytest.raises(ValueError, match="DISTILL_KERNELS=ops"):
        select_threshold_kernel(z, labels, k, 1.0, order, start)
    with pytest.raises(ValueError, match="1 to 1,024"):
        select_top_k_kernel(z, labels, k, 1.0)


@pytest.mark.parametrize(("vocab_size", "k"), [(2, 1), (1000, 12), (4099, 33), (4099, 32), (8000, 62), (49_152, 16)])
def test_logits_are_read_at_most_twice(vocab_size: int, k: int, emulator: Emulated) -> None:  # noqa: F811
    z, *others = problem(3, vocab_size)
    z[0] = 0.0  # every block as good as any
    z[1] = mx.where(mx.arange(vocab_size) < vocab_size // 2, 0.0, -1e-3)
    mx.eval(select_threshold(z.astype(mx.float16), others[0], k, 1.0, *others[1:]))
    once = 3 * vocab_size * mx.float16.size
    read = sum(run.loads["logits"] for run in emulator.runs if run.schedule == "ascending")
    assert once <= read <= (1.05 if vocab_size > 40_000 else 2) * once
    assert not any(run.stores["logits"] for run in emulator.runs)


def test_log_z_of_several_temperatures_takes_one_reading(emulator: Emulated) -> None:  # noqa: F811
    z = mx.array(falling(9, 4099)).astype(mx.bfloat16)[:, :-1]
    found, wanted = log_z(z, (1.5, 4.0)), cpu_selection.log_z(np.array(z.astype(mx.float32)), (1.5, 4.0))
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    assert {run.loads["logits"] for run in emulator.runs} == {z.nbytes}


def test_every_schedule_has_the_same_result(emulator: Emulated) -> None:  # noqa: F811
    z, *others = problem(9, 4099)
    for k in (16, 50):
        mx.eval(select_threshold(z, others[0], k, 2.0, *others[1:]), select_top_k(z, others[0], k, 1.0))
    runs = emulator.runs
    assert len(runs) == 8 * len(SCHEDULES) and not any(run.defects for run in runs)
    for at in range(0, len(runs), len(SCHEDULES)):
        kept = 5 if "blocks" in runs[at].launch.name else 4  # the rest is scratch, candidates in any order
        first, *others = ([np.array(a) for a in run.outputs[:kept]] for run in runs[at : at + len(SCHEDULES)])
        assert all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))


def test_the_mean_weight_of_every_id_is_its_probability(emulator: Emulated) -> None:  # noqa: F811
    emulator.schedules, n = ("ascending",), 4000
    z = rows(1, 300, 2.0, seed=3)
    selection = Selection.parse("threshold:16")
    random = randomness(KEY, np.arange(n), selection, 300, seed=7)
    every = mx.broadcast_to(mx.array(z), (n, 300))
    kept = device_selection.select(every, np.zeros(n, np.int64), selection, 1.0, random)
    require_mean(kept.ids, weights(kept), softmax(z)[0])
    np.testing.assert_allclose(weights(kept).sum(axis=1), 1, atol=2e-6)


def test_over_a_thousand_rows_rounding_moves_hardly_a_draw(emulator: Emulated) -> None:  # noqa: F811
    emulator.schedules = ("ascending",)
    ours, wanted = on_both(mx.array(falling(1500, 4099)), "threshold:16")
    np.testing.assert_array_equal(ours.head_count, wanted.head_count)
    assert (ours.ids != wanted.ids).sum() <= 4  # of 24,000
    for name in BESIDE:
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), rtol=1e-5, atol=2e-6)


def test_ops_run_where_there_is_no_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.VARIABLE, "ops")
    z, *others = problem(2, 1000)
    arguments = others[0], 5, 1.0
    for chosen, ops in (
        (select_threshold(z, *arguments, *others[1:]), select_threshold_ops(z, *arguments, *others[1:])),
        (select_top_k(z, *arguments), select_top_k_ops(z, *arguments)),
    ):
        assert all(mx.array_equal(a, b) for a, b in zip(chosen, ops, strict=True))


def test_a_row_beyond_two_to_the_32_elements_is_found() -> None:
    n, vocab_size = 28_270, 151_936  # the last row begins at 2^32 + 111,488
    row = n - 1
    here = problem(1, vocab_size)
    far = [Virtual((n, *a.shape[1:]), a.dtype, {row * prod(a.shape[1:]): a[0]}) for a in here]

    def launch(name: str, inputs: dict[str, Any], outputs: dict[str, Any], *source: str, **call: Any) -> list[Virtual]:
        kernel = metal.kernel_of(name, tuple(inputs), tuple(outputs), *source)
        shapes, dtypes = zip(*outputs.values(), strict=True)
        grid, group = (call["threads"], call["rows"], 1), (call["threads"], 1, 1)
        shaped = {"output_shapes": shapes, "output_dtypes": dtypes, "template": call["template"]}
        launched = capture(
            kernel, inputs=[*inputs.values()], grid=grid, threadgroup=group, virtual_outputs=True, **shaped
        )
        run = execute(launched, 3, groups=[(0, row, 0)])
        assert not run.defects
        sizes = [prod(shape[1:]) for shape in shapes]
        parts = [run.slice(name, row * size, (row + 1) * size) for name, size in zip(outputs, sizes, strict=True)]
        return [
            Virtual(shape, dtype, {row * size: part})
            for shape, dtype, size, part in zip(shapes, dtypes, sizes, parts, strict=True)
        ]

    wanted = select_threshold(here[0], here[1], 16, 1.0, *here[2:])
    with (
        patch("distill_kernels.select_metal.launch", launch),
        patch("distill_kernels.select_metal.dense", lambda a, _: a),
        patch("distill_kernels.select_metal.as_ids", lambda a: a),
    ):
        found: Kept = select_threshold_kernel(far[0], far[1], 16, 1.0, *far[2:])  # type: ignore[arg-type]
    for a, b in zip(found, wanted, strict=True):
        assert mx.array_equal(next(iter(a.fill.values())), b.reshape(-1))  # type: ignore[attr-defined]
