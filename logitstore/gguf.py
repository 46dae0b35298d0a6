"""Reads a llama-family GGUF file: weights under mlx-lm's names, an mlx-lm config, and a Hugging Face tokenizer.

Everything comes from the one file: `gguf_header` checks it, `mx.load` gives tensors and metadata, this module renames
and reorders, `gguf_tokenizer` builds the tokenizer.
Packed tensors (Q4_0, Q4_1, Q8_0) stay packed as weight, scales and biases; what MLX unpacks itself arrives as float16.
It builds no model and casts nothing: `model` does.

Reference: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md (2023).
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
from transformers import PreTrainedTokenizerFast

from logitstore.errors import ModelError
from logitstore.gguf_header import check_header
from logitstore.gguf_metadata import Metadata
from logitstore.gguf_tokenizer import build_tokenizer

_GROUP = 32  # values per scale, in every GGUF type that MLX keeps packed

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<leaf>weight|bias|scales|biases)")


@dataclass(frozen=True)
class GgufModel:
    """What one GGUF file holds: parameters by mlx-lm name, the config they fit, and the tokenizer."""

    weights: dict[str, mx.array]
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast


def read_gguf(path: Path) -> GgufModel:
    """Read `path`, weights and all.

    Raises:
        ModelError: not a GGUF file, cut short, contradicting itself, not writable, or holding a tensor type,
            architecture or tokenizer that cannot be served.
    """
    check_header(path)
    if not os.access(path, os.W_OK):  # MLX 0.32 maps the file for writing, though it only reads
        raise ModelError(f"{path} is read-only, MLX opens only GGUF files it may write; type `chmod u+w {path}`")
    try:
        loaded = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}; download it again") from error
    tensors, raw = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    metadata = Metadata(path, raw)
    try:
        return _model(metadata, tensors)
    except ModelError:
        raise
    except Exception as error:  # values of a wrong kind; tokenizers raises plain Exception for merges of unknown tokens
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"{path} contradicts itself ({reason}), expected a llama; download it again") from error


def _model(metadata: Metadata, tensors: dict[str, mx.array]) -> GgufModel:
    path = metadata.path
    architecture = metadata.required("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{path} holds architecture {architecture!r}, expected 'llama'; use its safetensors instead")
    config = _config(metadata, tensors)
    weights = _weights(path, tensors, heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"])
    config |= _quantization(weights)
    return GgufModel(weights, config, build_tokenizer(metadata))


def _config(metadata: Metadata, tensors: dict[str, mx.array]) -> dict[str, Any]:
    path = metadata.path
    if metadata.get("llama.expert_count", 0):
        raise ModelError(f"{path} is a mixture of experts, expected a dense llama; use its safetensors instead")
    if "rope_freqs.weight" in tensors or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ModelError(f"{path} scales its rotary positions, expected plain ones; use its safetensors instead")
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path} has no `token_embd.weight`: it holds a vocabulary, not a model")
    layers = metadata.required("llama.block_count")
    stored = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    if layers != stored:
        raise ModelError(f"{path} holds {stored} layers, its metadata says {layers}; download it again")
    hidden = metadata.required("llama.embedding_length")
    heads = metadata.required("llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    rope_dim = metadata.get("llama.rope.dimension_count", head_dim)
    if rope_dim != head_dim:
        raise ModelError(f"{path} rotates {rope_dim} of {head_dim} dimensions per head, expected all of them")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id", eos)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": metadata.required("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.required("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.get("llama.context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos if end_of_turn == eos else [eos, end_of_turn],
    }


def _weights(path: Path, tensors: dict[str, mx.array], *, heads: int, kv_heads: int) -> dict[str, mx.array]:
    weights = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        module = _MODULES.get(match["module"]) if match else None
        if match is None or module is None:
            raise ModelError(f"{path} holds tensor `{name}`, which no llama has; use the model's safetensors instead")
        if match["module"] in ("attn_q", "attn_k"):
            tensor = _half_split(tensor, heads if match["module"] == "attn_q" else kv_heads)
        prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
        weights[f"{prefix}{module}.{match['leaf']}"] = tensor
    return weights


def _half_split(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of q and k rows.

    It stores, per head, the two halves that rotate together interleaved (0, d/2, 1, d/2 + 1, ...); mlx-lm expects first
    half, then second. Rows move whole, so packed weights, scales and biases move alike.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _quantization(weights: dict[str, mx.array]) -> dict[str, Any]:
    """mlx-lm's `quantization` entry: the commonest width, and by name each module that has another."""
    bits = {
        name.removesuffix(".scales"): weights[name.removesuffix("scales") + "weight"].shape[1] // scales.shape[1]
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    others = {name: {"group_size": _GROUP, "bits": n} for name, n in sorted(bits.items()) if n != common}
    return {"quantization": {"group_size": _GROUP, "bits": common, **others}}
