"""A model split into trunk and head, or told apart as one that cannot be."""

from collections.abc import Callable, Iterator
from typing import Any

from distill_kernels import SparseKL, chunked, chunked_sum, split_head

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cohere, gemma2, llama, minicpm
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
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


def dora(tied: bool) -> Any:
    model = tiny(tied=tied)
    model.freeze()
    if tied:
        layer = model.model.embed_tokens = DoRAEmbedding.from_base(model.model.embed_tokens, r=4)
    else:
        layer = model.lm_head = DoRALinear.from_base(model.lm_head, r=4)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return model


def quantised(mode: str = "affine", bits: int = 8, tied: bool = True, lora: bool = False) -> Any:
    model = tiny(tied=tied)
    nn.quantize(model, group_size=16 if mode == "nvfp4" else 32, bits=bits, mode=mode)
    if lora:
        model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
        model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape)
        model.lm_head.linear.freeze()
    return model


def scaled() -> Any:
    args = cohere.ModelArgs(
        model_type="cohere", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=96, logit_scale=0.25,
    )  # fmt: skip
    return cohere.Model(args)


def capped() -> Any:
    args = gemma2.ModelArgs(
        model_type="gemma2", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        head_dim=16, rms_norm_eps=1e-5, vocab_size=96, num_key_value_heads=2, final_logit_softcapping=2.0,
    )  # fmt: skip
    return gemma2.Model(args)


def reads_the_weight() -> Any:
    args = minicpm.ModelArgs(
        model_type="minicpm", hidden_size=32, dim_model_base=16, num_hidden_layers=1, intermediate_size=64,
        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=96, num_key_value_heads=2, scale_depth=1.0, scale_emb=1.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return minicpm.Model(args)


def biased() -> Any:
    model = tiny(tied=False)
    model.lm_head = nn.Linear(32, 96)
    return model


def wrapped() -> Any:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = tiny()

        def __call__(self, tokens: mx.array) -> Any:
            return self.language_model(tokens)

    return Wrapper()


MODELS: dict[str, Callable[[], Any]] = {
    "tied": tiny,
    "dense": lambda: tiny(tied=False),
    "bias": biased,
    "LoRA": untied_lora,
    "tied LoRA": tied_lora,
    "DoRA": lambda: dora(tied=False),
    "tied DoRA": lambda: dora(tied=True),
    "scale": scaled,
    "cap": capped,
    "wrapped": wrapped,
    "reads the weight": reads_the_weight,
    "quantised LoRA": lambda: quantised(tied=False, lora=True),
    **{f"affine {bits}": lambda bits=bits: quantised("affine", bits, tied=bits > 4) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": lambda: quantised("mxfp4", 4),
    "mxfp8": lambda: quantised("mxfp8", 8, tied=False),
    "nvfp4": lambda: quantised("nvfp4", 4, tied=False),
}


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
        for run in (
            lambda h=head: chunked(SparseKL(), mx.ones((2, 32)), h, []),
            lambda h=head: chunked_sum(SparseKL(), mx.ones((2, 32)), h, [], []),
        ):
            with pytest.raises(ValueError, match="no head"):
                run()


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
