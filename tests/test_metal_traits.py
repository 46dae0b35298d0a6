"""What must hold of the Metal kernels beside their numbers: bytes moved, 64-bit offsets, gradients that are used."""

from typing import Any, cast
from unittest.mock import patch

import distill_kernels
from distill_kernels import (
    BucketKL,
    BucketLoss,
    DenseLoss,
    ForwardKL,
    ReverseKL,
    RowLoss,
    SampledLoss,
    SkewReverseKL,
    SparseKL,
    metal,
)
from distill_kernels.coded import CodedLoss, Kind
from distill_kernels.sparse_metal import MOST_KEPT, SparseKernel
from distill_kernels.tier import on_tier

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from logitstore.codec import Codes, Form, weights
from logitstore.selection import Selection
from tests.emulation import emulator, needs_compiler  # noqa: F401
from tests.loss_cases import on_mlx, problem
from tools.metal_emulator import CaptureError, Emulated, Virtual, capture, execute

pytestmark = needs_compiler
VOCAB, K, N = 49152, 50, 3


def sparse_problem(n: int = N, vocab: int = VOCAB, k: int = K) -> tuple[mx.array, list[mx.array]]:
    z, ids, p, _, labels = problem(n, vocab, k, 1.0)
    return mx.array(z.astype(np.float32)), on_mlx([ids, p, labels])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("loss", [SparseKL, BucketKL])
def test_logits_are_read_once_each_way_and_their_gradient_is_written_once(
    loss: Any,
    t: float,
    dtype: mx.Dtype,
    emulator: Emulated,  # noqa: F811
) -> None:
    z, ids, p, log_tail, labels = problem(N, VOCAB, K, t)
    rows = on_mlx([ids, p, labels] if loss is SparseKL else [ids, p, log_tail, labels])
    logits = mx.array(z.astype(np.float32)).astype(dtype)
    mx.eval(mx.grad(lambda z: sum(a.sum() for a in on_tier(loss(t))(z, *rows)))(logits))
    forward, backward = (next(r for r in emulator.runs if way in r.launch.name) for way in ("_forward_", "_backward_"))
    least = N * VOCAB * logits.itemsize
    assert least <= forward.loads["logits"] <= 1.05 * least and not forward.stores["logits"]
    assert least <= backward.loads["logits"] <= 1.05 * least and backward.stores["gradient"] == least


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_beyond_two_to_the_32_elements_is_found(direction: str) -> None:
    n, vocab = 28_270, 151_936  # the last row begins at 2^32 + 111,488
    row, launches = n - 1, []
    z, rows = sparse_problem(1, vocab, 5)
    here = SparseKernel(SparseKL())
    (kd, _), saved = here.forward(z, *rows)
    wanted = kd if direction == "forward" else here.backward(z, *rows, saved=saved, cotangents=(kd, kd))
    far = Virtual((n, vocab), mx.float32, {row * vocab: z[0]})
    every = [mx.broadcast_to(r, (n, *r.shape[1:])) for r in rows]

    def keep(name: str, inputs: dict[str, Any], outputs: dict[str, Any], source: str, header: str, **call: Any) -> Any:
        kernel = metal.kernel_of(name, tuple(inputs), tuple(outputs), source, header)
        launches.append(
            capture(
                kernel,
                inputs=list(inputs.values()),
                output_shapes=[shape for shape, _ in outputs.values()],
                output_dtypes=[dtype for _, dtype in outputs.values()],
                grid=(call["threads"], call["rows"], 1),
                threadgroup=(call["threads"], 1, 1),
                template=call["template"],
                virtual_outputs=True,
            )
        )
        return [mx.zeros(1) for _ in outputs]

    with patch("distill_kernels.sparse_metal.launch", keep):
        if direction == "forward":
            here.forward(far, *every)  # type: ignore[arg-type]
        else:
            cts = (mx.broadcast_to(kd, (n,)),) * 2
            here.backward(far, *every, saved=(mx.broadcast_to(saved[0], (n, 4)),), cotangents=cts)  # type: ignore[arg-type]
    run = execute(launches[0], 3, groups=[(0, row, 0)])
    assert not run.defects and row * vocab > 1 << 32
    size = 1 if direction == "forward" else vocab
    name = "kd" if direction == "forward" else "gradient"
    assert mx.array_equal(run.slice(name, row * size, (row + 1) * size), wanted.reshape(-1))


def test_a_gradient_is_the_kernels_own_under_every_transformation(emulator: Emulated) -> None:  # noqa: F811
    z, rows = sparse_problem(2, 1000, 5)
    model = nn.Linear(8, 1000, bias=False)
    x = mx.random.normal((2, 8))

    def total(loss: RowLoss, logits: mx.array) -> mx.array:
        return sum((a.sum() for a in loss(logits, *rows)), mx.array(0.0))

    def of_model(model: nn.Module, loss: RowLoss) -> mx.array:
        return total(loss, model(x) + z)  # z, x and the rows are captured: constants

    kernel, ops = on_tier(SparseKL()), SparseKL()
    wanted = mx.grad(lambda z: total(ops, z))(z)
    for transformed in (
        mx.grad(lambda z: total(kernel, z)),
        lambda z: mx.value_and_grad(lambda z: total(kernel, z))(z)[1],
        lambda z: mx.grad(lambda z: mx.checkpoint(lambda z: total(kernel, z))(z))(z),
        lambda z: mx.vjp(lambda z: total(kernel, z), [z], [mx.array(1.0)])[1][0],
    ):
        emulator.runs.clear()
        np.testing.assert_allclose(transformed(z), wanted, atol=1e-6)
        assert sum("backward" in run.launch.name for run in emulator.runs) == len(emulator.schedules)
    found, truth = (nn.value_and_grad(model, of_model)(model, loss)[1]["weight"] for loss in (kernel, ops))
    np.testing.assert_allclose(found, truth, atol=1e-5)


def test_a_compiled_gradient_launches_each_kernel_once_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = sparse_problem(2, 1000, 5)
    launched, ops = [], SparseKL()

    def stand_in(name: str, inputs: dict[str, mx.array], *_: Any, **__: Any) -> list[mx.array]:
        """What the kernel gives, in operations that the CPU can compile."""
        launched.append(name)
        own = [inputs[row] for row in (*ops.names, "row_weights")]
        if "_forward" in name:
            losses, saved = ops.forward(inputs["logits"], *own)
            return [*losses, mx.stack([*saved, *saved], axis=1)]
        saved = inputs["saved"][:, 0], inputs["saved"][:, 1]
        return [ops.backward(inputs["logits"], *own, saved=saved, cotangents=(inputs["ct_kd"], inputs["ct_ce"]))]

    def total(loss: RowLoss, logits: mx.array) -> mx.array:
        return sum((a.sum() for a in loss(logits, *rows)), mx.array(0.0))

    monkeypatch.setattr("distill_kernels.sparse_metal.launch", stand_in)
    wanted = mx.grad(lambda z: total(ops, z))(z)
    mx.enable_compile()
    try:
        found = mx.compile(mx.value_and_grad(lambda z: total(SparseKernel(ops), z)))(z)[1]
        mx.eval(found)
    finally:
        mx.disable_compile()
    assert sorted(launched) == ["sparse_kl_weights_backward", "sparse_kl_weights_forward"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.usefixtures("emulator")
def test_inside_a_compiled_function_the_emulator_says_what_it_cannot_do() -> None:
    z, rows = sparse_problem(2, 7, 3)
    mx.enable_compile()
    try:
        with pytest.raises(CaptureError, match="call the function uncompiled"):
            mx.compile(lambda z: SparseKernel(SparseKL())(z, *rows))(z)
    finally:
        mx.disable_compile()


def test_without_metal_a_kernel_says_what_to_type() -> None:
    z, rows = sparse_problem(2, 7, 3)
    with pytest.raises(RuntimeError, match="there is no Metal here; type DISTILL_KERNELS=ops"):
        SparseKernel(SparseKL())(z, *rows)


def test_more_entries_than_threadgroup_memory_holds_are_refused() -> None:
    z, rows = sparse_problem(2, 2000, MOST_KEPT + 1)
    with pytest.raises(ValueError, match="1,025 entries a row, expected at most 1,024; type DISTILL_KERNELS=ops"):
        SparseKernel(SparseKL())(z, *rows)


@pytest.mark.parametrize(
    ("asked", "tier"), [("", "plain MLX: this MLX has no Metal"), ("ops", "plain MLX: DISTILL_KERNELS=ops"),
                        ("metal", "Metal kernels: DISTILL_KERNELS=metal")],
)  # fmt: skip
def test_the_tier_that_runs_can_say_why(asked: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.VARIABLE, asked)
    assert distill_kernels.why() == tier
    assert isinstance(on_tier(SparseKL()), SparseKernel) == (asked == "metal")


def test_a_tier_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="DISTILL_KERNELS is 'cuda', expected ops or metal"):
        distill_kernels.why()


SELECTIONS = {"threshold:8": "threshold", "top-k:8": "cells", "random:8": "counts", "random:8:0.5": "draws"}


@pytest.mark.parametrize("select", SELECTIONS)
def test_codes_are_decoded_on_the_way_to_the_loss_as_a_store_decodes_them(select: str, emulator: Emulated) -> None:  # noqa: F811
    rng, vocab = np.random.default_rng(0), 1000
    form, kind = Form(Selection.parse(select), vocab), cast(Kind, SELECTIONS[select])
    n, k = 9, form.selection.k
    ids = np.stack([rng.choice(vocab, k, replace=False) for _ in range(n)]).astype(np.uint32)
    head_count = rng.integers(1, k + 1, n).astype(np.uint32)
    codes, tail = coded_rows(rng, form, head_count)
    stored, tail_mass = weights(Codes(ids, codes, head_count, tail), form)
    loss = BucketKL() if kind == "cells" else SparseKL()
    labels = rng.integers(0, vocab, n)
    with np.errstate(divide="ignore"):
        float_rows = on_mlx([ids, stored, *([np.log(tail_mass)] if kind == "cells" else []), labels])
    rows = [*(mx.array(a) for a in (ids, codes, head_count, tail)), mx.array(labels)]
    z = mx.array(rng.normal(0, 3, (n, vocab)).astype(np.float32))
    truth = values_and_gradient(loss, z, float_rows)
    for tier in ("ops", "metal"):
        found = values_and_gradient(on_tier(CodedLoss(loss, kind), cast(Any, tier)), z, rows)
        for ours, wanted in zip(found, truth, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=3e-6, atol=2e-6)
    assert len(emulator.runs) == 2 * len(emulator.schedules)


def coded_rows(rng: np.random.Generator, form: Form, head_count: Any) -> tuple[Any, Any]:
    """Codes [N, k] and tails [N] as an encoder writes them; the first row has so many equal cells that it is scaled."""
    n, k = len(head_count), form.selection.k
    in_head = np.arange(k) < head_count[:, None]
    if form.counts:
        return (rng.integers(1, 4, (n, k)) * in_head).astype(np.uint8), np.full(n, 255, np.uint8)
    codes = rng.integers(40, 255, (n, k)).astype(np.uint8)
    codes[1, :2] = 255, 254
    tail = rng.integers(40, 256, n).astype(np.uint8)
    if form.sums_to_one:
        codes[: n // 2, 0] = 0  # the first head entry is the largest cell; elsewhere the tail is
        tail[n // 2 :] = 0
        codes[0, 1:], head_count[0] = 30, k  # seven of 0.153: the largest is left less than they have
    return np.where(in_head | (np.arange(n) == 0)[:, None], codes, 0).astype(np.uint8), tail


def values_and_gradient(loss: RowLoss, z: mx.array, rows: list[mx.array]) -> list[mx.array]:
    ones = mx.ones(len(z))
    losses, gradients = mx.vjp(lambda z: list(loss(z, *rows)), [z], [ones, ones])
    return [*losses, *gradients]


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [ReverseKL(), SkewReverseKL()], ids=str)
def test_a_sampled_reverse_divergence_is_that_of_plain_mlx(divergence: Any, t: float, emulator: Emulated) -> None:  # noqa: F811
    z, ids, p, _, labels = problem(9, 1000, 50, t)
    rows = on_mlx([ids, p, np.log(p / 2), labels])
    loss, logits = SampledLoss(t, divergence=divergence), mx.array(z.astype(np.float32))
    found, wanted = (values_and_gradient(on_tier(loss, cast(Any, tier)), logits, rows) for tier in ("metal", "ops"))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=2e-6 * t * t)
    assert len(emulator.runs) == 2 * len(emulator.schedules)


class Doubled(SparseKL):
    """A user's own."""

    def value(self, z: mx.array, *targets: mx.array) -> Any:
        (kd, ce), saved = super().value(z, *targets)
        return (2 * kd, ce), saved


class Own(ForwardKL):
    """A divergence of a user's own."""


@pytest.mark.parametrize("loss", [Doubled(), BucketLoss(divergence=Own()), DenseLoss(divergence=Own())], ids=repr)
def test_a_users_own_loss_runs_as_it_is_written_and_never_as_another_kernel(loss: Any, emulator: Emulated) -> None:  # noqa: F811
    assert on_tier(loss) is loss and not emulator.runs
    with pytest.raises(TypeError, match="has no Metal kernel"):
        on_tier(loss, "metal")


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("far", [2**32 + 3, -(2**40), 2**31])
def test_an_id_that_needs_64_bits_is_no_other_token(far: int) -> None:
    z, rows = sparse_problem(2, 7, 3)
    nobody = mx.array([far, -1], mx.int64)
    assert not SparseKernel(SparseKL())(z, rows[0], rows[1], nobody)[1].any()
    wide = mx.broadcast_to(nobody[:1, None], (2, 3))
    assert not SparseKernel(SparseKL())(z, wide, rows[1], rows[2])[0].any()


def test_a_loss_has_a_first_derivative_and_refuses_a_second() -> None:
    z, rows = sparse_problem(2, 7, 3)

    def slope(z: mx.array) -> mx.array:
        return mx.square(mx.grad(lambda z: SparseKL()(z, *rows)[0].sum())(z)).sum()

    with pytest.raises(ValueError, match="a hand-written gradient has no gradient of its own"):
        mx.grad(slope)(z)


def test_no_rows_and_no_entries_are_refused_by_shape() -> None:
    z, (ids, weights_, labels) = sparse_problem(2, 7, 3)
    with pytest.raises(ValueError, match=r"logits must be \[N >= 1, V >= 1\], found shape \(0, 7\)"):
        SparseKL()(z[:0], ids[:0], weights_[:0], labels[:0])
    with pytest.raises(ValueError, match=r"must be \[2, k >= 1\] alike, found \(2, 0\)"):
        SparseKL()(z, ids[:, :0], weights_[:, :0], labels)


def test_an_infinite_divergence_that_weighs_nothing_is_no_part_of_a_sum() -> None:
    model = Headed()
    rows = [mx.array([[1]]), mx.array([[1.0]]), mx.array([-mx.inf]), mx.array([2])]
    loss, cts = BucketLoss(divergence=ReverseKL()), [mx.zeros(1), mx.ones(1)]
    total, (kd, ce) = distill_kernels.chunked_sum(loss, mx.ones((1, 4)), distill_kernels.split_head(model), rows, cts)
    assert mx.isinf(kd).item() and total.item() == pytest.approx(ce.item())


class Headed(nn.Module):
    """Nothing but an LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.model(tokens))
