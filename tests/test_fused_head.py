"""Losses over chunks of rows: the numbers of whole logits in the memory of one chunk, whoever asks for them and how."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from distill_kernels import BucketKL, Head, SparseKL, chunk_rows, chunked, chunked_sum, sparse_kl_ce, split_head

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.test_head import MODELS, tiny, untied_lora


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


def targets(rows: int, vocab: int = 96, k: int = 5) -> tuple[mx.array, mx.array, mx.array]:
    ids = mx.random.randint(0, vocab, (rows, k))
    return ids, mx.softmax(mx.random.normal((rows, k)), axis=-1), mx.random.randint(0, vocab, (rows,))


def largest_difference(a: Any, b: Any) -> float:
    """Return the largest |x - y| of any leaf, over that leaf's own size."""
    pairs = zip(tree_flatten(a), tree_flatten(b), strict=True)
    return max(((mx.abs(x - y).max() / mx.abs(x).max()).item() for (_, x), (_, y) in pairs), default=0.0)


def shares(rows: int) -> list[mx.array]:
    """How much every row's KL and cross-entropy count."""
    return [mx.random.uniform(shape=(rows,)), mx.random.uniform(shape=(rows,))]


def weighed(losses: Any, weights: list[mx.array]) -> mx.array:
    return sum((w * x).sum() for w, x in zip(weights, losses, strict=True))


def recomputed(loss: Any, hidden: mx.array, head: Head, rows: Any, weights: list[mx.array], n: int) -> mx.array:
    return weighed(chunked(loss, hidden, head, rows, n), weights)


def value_and_gradients(model: nn.Module, f: Callable[[mx.array], mx.array], x: mx.array) -> Any:
    """Return f(x) and its gradients by the model's trainable parameters, of which there may be none, and by x."""
    before = model.trainable_parameters()
    found = mx.value_and_grad(lambda p, x: (model.update(p), f(x))[1], argnums=(0, 1))(before, x)
    model.update(before)
    return found


def one_pass(*args: Any) -> mx.array:
    return chunked_sum(*args)[0]


WAYS = pytest.mark.parametrize("way", [one_pass, recomputed])


@WAYS
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("model", MODELS)
def test_chunks_give_the_losses_and_gradients_of_whole_logits(model: str, trained: bool, way: Any) -> None:
    student, tokens = MODELS[model](), mx.random.randint(0, 96, (2, 11))
    head, rows, weights = split_head(student), targets(22), shares(22)
    if not trained:
        head.module.freeze()
    before = dict(tree_flatten(student.parameters()))
    for t in (1.0, 2.0):

        def whole(bump: mx.array, t: float = t) -> mx.array:
            return weighed(sparse_kl_ce(head((head.trunk(tokens) + bump).flatten(0, 1)), *rows, t), weights)

        def parts(bump: mx.array, t: float = t) -> mx.array:
            return way(SparseKL(t), (head.trunk(tokens) + bump).flatten(0, 1), head, rows, weights, 5)

        (a, da), (b, db) = (value_and_gradients(student, f, mx.zeros((2, 11, 32))) for f in (whole, parts))
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
        assert largest_difference(da, db) < 5e-6
    assert [k for k, v in tree_flatten(student.parameters()) if not mx.array_equal(v, before[k])] == []


@pytest.mark.parametrize("tied", [True, False])
def test_in_bfloat16_the_sum_over_chunks_is_no_worse_than_whole_logits_are(tied: bool) -> None:
    model, hidden = tiny(tied=tied), mx.random.normal((64, 32))
    head, rows, weights = split_head(model), targets(64), shares(64)
    model.set_dtype(mx.bfloat16)
    whole = lambda h: weighed(sparse_kl_ce(head(h), *rows), weights)  # noqa: E731
    naive = value_and_gradients(model, whole, hidden.astype(mx.bfloat16))[1]
    ours = value_and_gradients(
        model, lambda h: one_pass(SparseKL(), h, head, rows, weights, 4), hidden.astype(mx.bfloat16)
    )[1]
    model.set_dtype(mx.float32)
    true = value_and_gradients(model, whole, hidden.astype(mx.bfloat16).astype(mx.float32))[1]
    for (name, x), (_, n), (_, t) in zip(*(tree_flatten(g) for g in (ours, naive, true)), strict=True):
        assert x.dtype == mx.bfloat16
        if t.any().item():
            error, allowed = (mx.abs(y - t).max() / mx.abs(t).max() for y in (x, n))
            assert error.item() < allowed.item() + 2e-3, name


def test_any_function_of_logits_and_any_chunk_size_will_do() -> None:
    model = tiny()
    head, hidden, labels = split_head(model), mx.random.normal((7, 32)), mx.random.randint(0, 96, (7,))
    ce = nn.losses.cross_entropy
    wanted, dh = mx.value_and_grad(lambda h: ce(head(h), labels).sum())(hidden)
    for rows in (1, 3, 7, 100):
        ours, dh_ours = mx.value_and_grad(lambda h, n=rows: chunked(ce, h, head, [labels], n)[0].sum())(hidden)
        assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert mx.allclose(dh, dh_ours, atol=1e-6).item()


def test_the_bucket_loss_runs_in_chunks_too() -> None:
    model = tiny()
    head, hidden, (ids, w, labels) = split_head(model), mx.random.normal((7, 32)), targets(7, k=1)
    rows = ids, w / 2, mx.full((7,), -0.7), labels
    wanted, dh = mx.value_and_grad(lambda h: BucketKL(2.0)(head(h), *rows)[0].sum())(hidden)
    ours, dh_ours = mx.value_and_grad(lambda h: chunked(BucketKL(2.0), h, head, rows, 3)[0].sum())(hidden)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6) and mx.allclose(dh, dh_ours, atol=1e-6).item()


def test_the_backward_pass_uses_the_saved_normalisers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backward = SparseKL.backward
    monkeypatch.setattr(SparseKL, "backward", lambda *a, **kw: seen.append(kw["saved"]) or backward(*a, **kw))
    head, rows = split_head(tiny()), targets(6)
    mx.eval(mx.grad(lambda h: chunked(SparseKL(), h, head, rows, 2)[0].sum())(mx.ones((6, 32))))
    assert [s.shape for saved in seen for s in saved] == [(2,)] * 6


def test_one_pass_takes_the_hand_written_gradient_once_per_chunk_and_the_losses_with_it() -> None:
    calls: list[str] = []

    class Counting(SparseKL):
        def forward(self, *args: Any) -> Any:
            calls.append("forward")
            return super().forward(*args)

        def backward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("backward")
            return 2 * super().backward(*args, **kwargs)

    head, args = split_head(tiny()), (targets(6), shares(6), 2)
    ours, plain = (
        mx.grad(lambda h, x=x: one_pass(x, h, head, *args))(mx.ones((6, 32))) for x in (Counting(), SparseKL())
    )
    assert calls == ["forward", "backward"] * 3
    assert mx.allclose(ours, 2 * plain, rtol=1e-5).item()


def test_to_evaluate_no_gradient_is_made_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseKL, "backward", lambda *_, **__: pytest.fail("a gradient"))
    head, rows, hidden = split_head(tiny()), targets(6), mx.ones((6, 32))
    kl, ce = chunked(SparseKL(), hidden, head, rows, 2)
    wanted = sparse_kl_ce(head(hidden), *rows)
    assert mx.allclose(kl, wanted[0], rtol=1e-5).item() and mx.allclose(ce, wanted[1], rtol=1e-5).item()


def test_a_frozen_head_gets_no_gradient_and_the_reported_losses_pass_none_on() -> None:
    head, rows = split_head(tiny()), targets(6)
    reported = mx.grad(lambda h: chunked_sum(SparseKL(), h, head, rows, shares(6), 2)[1][0].sum())(mx.ones((6, 32)))
    assert not reported.any().item()
    head.module.freeze()
    _, gradients = nn.value_and_grad(
        head.model, lambda: one_pass(SparseKL(), mx.ones((6, 32)), head, rows, shares(6), 2)
    )()
    assert "embed_tokens" not in gradients["model"] or gradients["model"]["embed_tokens"] == {}


@WAYS
@pytest.mark.parametrize("wide", [16, 128], ids=["narrow", "wide"])
@pytest.mark.parametrize("tied", [True, False])
def test_peak_memory_follows_the_chunk_and_not_the_rows(way: Any, tied: bool, wide: int) -> None:
    vocab, chunk = 4096, 64
    model = tiny(vocab, wide, tied)
    model.freeze()
    head = split_head(model)
    head.module.unfreeze()

    def peak(rows: int) -> int:
        hidden, args, weights = mx.random.normal((rows, wide)), targets(rows, vocab), shares(rows)
        mx.eval(hidden, args, weights, model.parameters())
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(value_and_gradients(model, lambda h: way(SparseKL(), h, head, args, weights, chunk), hidden))
        return mx.get_peak_memory() - held

    logits, weight = chunk * vocab * 4, vocab * wide * 4
    # 16 chunks; 4 arrays of one at a time, and what MLX allocates ahead of a busy processor; whole logits took over 40
    assert peak(1024) < weight + 8 * logits + 5 * 1024 * wide * 4


@WAYS
def test_under_a_checkpoint_the_gradients_are_the_same(way: Any) -> None:
    model, hidden = untied_lora(), mx.random.normal((7, 32))
    head, args = split_head(model), (targets(7), shares(7), 3)
    f = lambda h: way(SparseKL(), h, head, *args)  # noqa: E731
    plain, again = (nn.value_and_grad(model, g)(hidden) for g in (f, nn.utils.checkpoint(model, f)))
    assert plain[0].item() == again[0].item() and largest_difference(plain[1], again[1]) == 0
    assert largest_difference(mx.grad(f)(hidden), mx.grad(mx.checkpoint(f))(hidden)) == 0


def test_under_mx_compile_the_gradients_are_the_same() -> None:
    model, hidden, scale = tiny(), mx.random.normal((4, 32)), mx.random.uniform(shape=(4,))
    head = split_head(model)

    def loss(h: mx.array) -> mx.array:  # of few operations: each costs the C++ compiler's time
        return one_pass(lambda z, s: mx.sin(z).sum(axis=-1) * s, h, head, [scale], [scale], 2)

    plain = value_and_gradients(model, loss, hidden)
    mx.enable_compile()
    try:
        compiled = mx.compile(lambda h: value_and_gradients(model, loss, h))(hidden)
        mx.eval(compiled)
    finally:
        mx.disable_compile()
    assert largest_difference(plain, compiled) < 1e-5


@WAYS
def test_what_the_loss_captures_what_is_frozen_and_what_weighs_get_true_gradients(way: Any) -> None:
    model, hidden, labels = tiny(tied=False), mx.random.normal((7, 32)), mx.random.randint(0, 96, (7,))
    head, share = split_head(model), mx.random.uniform(shape=(7,))
    model.freeze()
    ce = nn.losses.cross_entropy

    def loss(run: Callable[..., mx.array]) -> Any:
        def f(scale: mx.array, weight: mx.array, share: mx.array, h: mx.array) -> mx.array:
            model.lm_head.weight = weight
            return run(lambda z, y: ce(scale * z, y), h, head, [labels], [share], 3)

        return mx.grad(f, argnums=(0, 1, 2, 3))(mx.array(1.5), weight, share, hidden)

    weight = model.lm_head.weight
    whole = loss(lambda f, h, head, rows, w, _: (w[0] * f(head(h), *rows)).sum())
    assert largest_difference(list(whole), list(loss(way))) < 5e-6


def test_a_sum_that_is_used_twice_gives_its_gradient_twice_over() -> None:
    head, rows, weights = split_head(tiny()), targets(6), shares(6)
    f = lambda h: one_pass(SparseKL(), h, head, rows, weights, 2)  # noqa: E731
    once, twice = mx.grad(f)(mx.ones((6, 32))), mx.grad(lambda h: (lambda x: x * 3 + x)(f(h)))(mx.ones((6, 32)))
    assert mx.allclose(twice, 4 * once).item()


@WAYS
def test_derivatives_that_are_not_there_are_refused(way: Any) -> None:
    head, args, h = split_head(tiny()), (targets(4), shares(4), 2), mx.ones((4, 32))
    f = lambda h: way(SparseKL(), h, head, *args)  # noqa: E731
    for run in (lambda: mx.jvp(f, [h], [h]), lambda: mx.grad(lambda h: mx.grad(f)(h).sum())(h)):
        with pytest.raises(ValueError, match="first derivative in reverse mode"):
            run()


def test_the_budget_says_how_many_rows_make_a_chunk() -> None:
    assert [chunk_rows(v) for v in (49_152, 151_936, 10**9)] == [416, 128, 16]
    assert chunk_rows(1000, budget_bytes=4 * 1000 * 2 * 40, dtype_bytes=2) == 32


def test_shapes_that_do_not_fit_are_refused() -> None:
    head = Head(SimpleNamespace())  # type: ignore[arg-type]
    for hidden, rows, chunk in (
        (mx.ones((2, 3, 4)), [], 1),
        (mx.ones((2, 4)), [mx.ones(3)], 1),
        (mx.ones((2, 4)), [], 0),
    ):
        for run in (lambda *a: chunked(SparseKL(), *a), lambda h, e, r, n: chunked_sum(SparseKL(), h, e, [], r, n)):
            with pytest.raises(ValueError, match="per_chunk"):
                run(hidden, head, rows, chunk)
