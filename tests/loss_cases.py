"""Problems for the losses of `distill_kernels`, and the comparison of a loss with its oracle."""

from collections.abc import Callable, Sequence
from typing import Any

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import RowLoss
from distill_kernels.tier import on_tier

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracle import Floats, Ints, Losses, log_softmax, of_raw

SHAPES = [(2, 1), (7, 3), (7, 7), (1000, 50), (4099, 50), (49152, 50)]
"""(vocabulary, k)."""

EPS = {mx.float32: 2e-5, mx.float16: 2**-11, mx.bfloat16: 2**-8}
"""How far a gradient may be off relatively: what float32 makes of it, or the rounding to the logits' dtype."""

Rows = Sequence[NDArray[Any]]


def exact(x: Floats) -> Floats:
    """Return x rounded to float32."""
    return x.astype(np.float32).astype(np.float64)


def problem(rows: int, vocab: int, k: int, t: float, seed: int = 0) -> tuple[Floats, Ints, Floats, Floats, Ints]:
    """Return (student's logits, ids, top-k probabilities of a teacher at T, log of its tail mass, labels)."""
    rng = np.random.default_rng(seed)
    z, teacher = exact(rng.normal(0, 2, (2, rows, vocab)))
    return z, *top_k(teacher, k, t), rng.integers(0, vocab, rows)


def top_k(teacher: Floats, k: int, t: float) -> tuple[Ints, Floats, Floats]:
    """Return (ids, probabilities, log tail mass) of the k most likely tokens."""
    log_p = log_softmax(teacher / t)
    ids = np.argsort(-log_p, axis=-1)
    head, tail = (np.take_along_axis(log_p, part, -1) for part in (ids[:, :k], ids[:, k:]))
    with np.errstate(divide="ignore"):
        return ids[:, :k], exact(np.exp(head)), exact(np.logaddexp.reduce(tail, axis=-1, initial=-np.inf))


def on_mlx(rows: Rows) -> list[mx.array]:
    """Return the rows as float32 and int32."""
    return [mx.array(r.astype(np.float32 if r.dtype.kind == "f" else np.int32)) for r in rows]


def run(loss: RowLoss, logits: Any, rows: Rows, cts: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """Return (first loss, second loss, gradient of both times their cotangents, by default 1)."""
    z = logits if isinstance(logits, mx.array) else mx.array(logits.astype(np.float32))
    cotangents = [mx.array(c.astype(np.float32)) for c in (np.ones((2, len(z))) if cts is None else cts)]
    (kd, ce), (dz,) = mx.vjp(lambda z: list(on_tier(loss)(z, *on_mlx(rows))), [z], cotangents)
    assert dz.dtype == z.dtype and kd.dtype == ce.dtype == mx.float32
    return tuple(np.array(a.astype(mx.float32)).astype(np.float64) for a in (kd, ce, dz))  # type: ignore[return-value]


def assert_equals(
    loss: LogitsLoss, raw: Floats, rows: Rows, wanted: Callable[[Floats], Losses], dtype: mx.Dtype = mx.float32
) -> None:
    """Assert that values and gradient of `loss` are those that the oracle has for the same, rounded, logits."""
    logits = mx.array(raw.astype(np.float32)).astype(dtype)
    truth = of_raw(wanted, np.array(logits.astype(mx.float32)).astype(np.float64), **options(loss))
    cts = exact(np.random.default_rng(1).normal(size=(2, len(raw))))
    kd, ce, dz = run(loss, logits, rows, cts)
    np.testing.assert_allclose(kd, truth.kd, rtol=3e-6, atol=2e-6 * loss.temperature**2)
    np.testing.assert_allclose(ce, truth.ce, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(dz, truth.gradient(*cts), rtol=EPS[dtype], atol=3e-7 * loss.temperature)


def options(loss: LogitsLoss) -> dict[str, Any]:
    return {"scale": loss.scale, "softcap": loss.softcap, "vocab_size": loss.vocab_size}


def assert_a_masked_row_touches_nothing(loss: LogitsLoss, logits: Floats, rows: Rows) -> None:
    """Assert that row weights multiply, and that a row of weight 0, all NaN, gives zeros and changes no other."""
    rows = [*rows, np.array([2.0, *np.ones(len(logits) - 1)])]
    wanted = run(loss, logits, rows)
    for array in (logits, *rows[:-1]):
        array[1] = np.nan if array.dtype.kind == "f" else 0
    rows[-1][1] = 0
    for ours, theirs in zip(run(loss, logits, rows), wanted, strict=True):
        assert not ours[1].any()
        np.testing.assert_array_equal(np.delete(ours, 1, axis=0), np.delete(theirs, 1, axis=0))
    plain = run(loss, logits[:1], [r[:1] for r in rows[:-1]])
    for ours, theirs in zip(wanted, plain, strict=True):
        np.testing.assert_allclose(ours[:1], 2 * theirs, rtol=1e-6)


def assert_backward_is_called(loss: LogitsLoss, logits: Floats, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that a gradient is what `slope` returns, and comes of one call of it."""
    calls = []

    def slope(_: LogitsLoss, z: mx.array, *_rows: mx.array, **kw: Any) -> mx.array:
        calls.append(kw["cotangents"])
        return mx.full(z.shape, 5.0)

    monkeypatch.setattr(type(loss), "slope", slope)
    assert (run(loss, logits, rows)[2] == 5.0).all() and len(calls) == 1
