"""A model split into trunk and head, and losses over chunks of rows: the same numbers in the memory of one chunk."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from distill_kernels import BucketKL, Head, SparseKL, chunked, sparse_kl_ce, split_head

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cohere, llama
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    mx.random.seed(0)
    yield
    mx.clear_cache()


def tiny(vocab: int = 96, width: int = 32, tied: bool = True) -> Any:
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=width,
            num_hidden_layers=1,
            intermediate_size=64,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
    )


def tied_lora() -> Any:
    model = tiny()
    model.freeze()
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=4)
    model.model.embed_tokens.lora_b = mx.random.normal(model.model.embed_tokens.lora_b.shape)
    return model


def untied_lora(dropout: float = 0.0) -> Any:
    model = tiny(tied=False)
    model.freeze()
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4, dropout=dropout)
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
    return model


def quantised() -> Any:
    model = tiny()
    nn.quantize(model, group_size=32, bits=8)
    return model


def scaled() -> Any:
    args = cohere.ModelArgs(
        model_type="cohere", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=96, logit_scale=0.25,
    )  # fmt: skip
    return cohere.Model(args)


def wrapped() -> Any:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = tiny()

        def __call__(self, tokens: mx.array) -> Any:
            return self.language_model(tokens)

    return Wrapper()


MODELS: list[Callable[[], Any]] = [tiny, lambda: tiny(tied=False), tied_lora, untied_lora, quantised, scaled, wrapped]


def targets(rows: int, vocab: int, k: int = 5) -> tuple[mx.array, mx.array, mx.array]:
    ids = mx.random.randint(0, vocab, (rows, k))
    return ids, mx.softmax(mx.random.normal((rows, k)), axis=-1), mx.random.randint(0, vocab, (rows,))


def largest_difference(a: Any, b: Any) -> float:
    """Return the largest |x - y| of any leaf, over that leaf's own size."""
    pairs = zip(tree_flatten(a), tree_flatten(b), strict=True)
    return max(((mx.abs(x - y).max() / mx.abs(x).max()).item() for (_, x), (_, y) in pairs), default=0.0)


@pytest.mark.parametrize("make", MODELS)
def test_chunks_give_the_losses_and_gradients_of_whole_logits(make: Callable[[], Any]) -> None:
    model, tokens = make(), mx.random.randint(0, 96, (2, 11))
    head, rows = split_head(model), targets(22, 96)
    assert head.reason is None

    def whole(t: float) -> mx.array:
        return sum(x.mean() for x in sparse_kl_ce(model(tokens).flatten(0, 1), *rows, t))

    def parts(t: float) -> mx.array:
        return sum(x.mean() for x in chunked(SparseKL(t), head.trunk(tokens).flatten(0, 1), head, rows, 5))

    before = dict(tree_flatten(model.parameters()))
    for t in (1.0, 2.0):
        (a, da), (b, db) = nn.value_and_grad(model, whole)(t), nn.value_and_grad(model, parts)(t)
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
        assert largest_difference(da, db) < 3e-6
    assert [k for k, v in tree_flatten(model.parameters()) if not mx.array_equal(v, before[k])] == []


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
    head, hidden, (ids, w, labels) = split_head(model), mx.random.normal((7, 32)), targets(7, 96, k=1)
    rows = ids, w / 2, mx.full((7,), -0.7), labels
    wanted, dh = mx.value_and_grad(lambda h: BucketKL(2.0)(head(h), *rows)[0].sum())(hidden)
    ours, dh_ours = mx.value_and_grad(lambda h: chunked(BucketKL(2.0), h, head, rows, 3)[0].sum())(hidden)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6) and mx.allclose(dh, dh_ours, atol=1e-6).item()


def test_the_backward_pass_uses_the_saved_normalisers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backward = SparseKL.backward
    monkeypatch.setattr(SparseKL, "backward", lambda *a, **kw: seen.append(kw["saved"]) or backward(*a, **kw))
    head, rows = split_head(tiny()), targets(6, 96)
    mx.eval(mx.grad(lambda h: chunked(SparseKL(), h, head, rows, 2)[0].sum())(mx.ones((6, 32))))
    assert [s.shape for saved in seen for s in saved] == [(2,)] * 6


def test_peak_memory_follows_the_chunk_and_not_the_rows() -> None:
    vocab, width = 49152, 64
    model = tiny(vocab, width)
    head = split_head(model)

    def peak(rows: int) -> int:
        hidden, args = mx.random.normal((rows, width)), targets(rows, vocab)
        mx.eval(hidden, args, model.parameters())
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        loss = lambda h: sum(x.mean() for x in chunked(SparseKL(), h, head, args, 128))  # noqa: E731
        step = mx.value_and_grad(lambda p, h: (model.update(p), loss(h))[1], argnums=(0, 1))
        mx.eval(step(before := model.trainable_parameters(), hidden))
        model.update(before)
        return mx.get_peak_memory() - held

    small, large, logits = peak(512), peak(2048), 2048 * vocab * 4
    assert large < logits / 3
    assert large < small + 128 * vocab * 4  # four times the rows, and not one chunk of logits more


def test_a_model_that_cannot_be_split_says_why() -> None:
    class Normed(type(tiny())):  # type: ignore[misc]
        def __call__(self, tokens: mx.array) -> Any:
            return self.model.embed_tokens.as_linear(self.model.norm(self.model(tokens)))

    class Shifted(type(tiny())):  # type: ignore[misc]
        def __call__(self, tokens: mx.array) -> Any:
            return super().__call__(tokens) + tokens[..., None]

    args = tiny().args
    for model, why in (
        (nn.Linear(3, 3), "embed_tokens"),
        (Normed(args), "model.norm"),
        (Shifted(args), "not those"),
        (untied_lora(dropout=0.1), "dropout"),
    ):
        head = split_head(model)
        assert head.reason is not None and why in head.reason
        with pytest.raises(ValueError, match="no head"):
            chunked(SparseKL(), mx.ones((2, 32)), head, [], 1)


def test_the_probe_leaves_no_trace_and_copes_with_dropout_in_the_trunk() -> None:
    model = tiny()
    layer = model.layers[0].self_attn
    layer.q_proj = LoRALinear.from_base(layer.q_proj, r=4, dropout=0.5)
    layer.q_proj.lora_b = mx.random.normal(layer.q_proj.lora_b.shape)
    layer.k_proj.eval()
    modes = [m.training for m in model.modules()]
    mx.random.seed(3)
    draw = mx.random.normal((2,))
    mx.random.seed(3)
    assert split_head(model).reason is None
    assert [m.training for m in model.modules()] == modes
    assert mx.array_equal(mx.random.normal((2,)), draw).item()


def test_shapes_that_do_not_fit_are_refused() -> None:
    head = Head(SimpleNamespace())  # type: ignore[arg-type]
    for hidden, rows, chunk in (
        (mx.ones((2, 3, 4)), [], 1),
        (mx.ones((2, 4)), [mx.ones(3)], 1),
        (mx.ones((2, 4)), [], 0),
    ):
        with pytest.raises(ValueError, match="chunk_rows"):
            chunked(SparseKL(), hidden, head, rows, chunk)
