"""Reads a llama-family GGUF file: weights under mlx-lm's names, an mlx-lm config, and a Hugging Face tokenizer.

Everything comes from the one file: `mx.load` gives tensors and metadata; this module renames, reorders and rebuilds.
Packed tensors (Q4_0, Q4_1, Q8_0) stay packed as weight, scales and biases; what MLX unpacks itself arrives as float16.
It builds no model and casts nothing: `model` does.

Reference: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md (2023).
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from logitstore.errors import ModelError

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

# Where a byte-level tokenizer cuts text before merging, by `tokenizer.ggml.pre`: patterns that belong to those formats.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # a word that is a token is not merged from its parts
_BOS_BY_DEFAULT = {"llama-bpe"}

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class GgufModel:
    """What one GGUF file holds: parameters by mlx-lm name, the config they fit, and the tokenizer."""

    weights: dict[str, mx.array]
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast


def read_gguf(path: Path) -> GgufModel:
    """Read `path`; tensors are mapped, not yet read.

    Raises
    ------
    ModelError
        Not a GGUF file, cut short, or holding a tensor type, architecture or tokenizer that cannot be served.
    """
    try:
        loaded = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}; expected F32, F16, Q4_0, Q4_1 or Q8_0") from error
    tensors, raw = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    metadata = Metadata(path, raw)
    architecture = metadata.required("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{path} holds architecture '{architecture}', expected 'llama'; use its safetensors instead")
    config = _config(metadata, tensors)
    weights = _weights(path, tensors, heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"])
    config |= _quantization(weights)
    return GgufModel(weights, config, build_tokenizer(metadata))


class Metadata:
    """A GGUF file's key-value pairs as plain Python values."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self._raw = raw

    def get(self, key: str, default: Any = None) -> Any:
        value = self._raw.get(key, default)
        if not isinstance(value, mx.array):
            return value
        if value.dtype == mx.float32 and value.ndim == 0:
            return float(str(np.array(value)))  # 1e-05, not 9.999999747378752e-06
        return value.tolist()

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.path} has no `{key}` in its metadata; expected a GGUF of a llama-family model")
        return value


# Weights and config


def _config(metadata: Metadata, tensors: dict[str, mx.array]) -> dict[str, Any]:
    path = metadata.path
    if metadata.get("llama.expert_count", 0):
        raise ModelError(f"{path} is a mixture of experts, expected a dense llama; use its safetensors instead")
    if "rope_freqs.weight" in tensors or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ModelError(f"{path} scales its rotary positions, expected plain ones; use its safetensors instead")
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path} has no `token_embd.weight`: it holds a vocabulary, not a model")
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
        "num_hidden_layers": metadata.required("llama.block_count"),
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


# Tokenizer


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describes; its ids are those of llama.cpp with special tokens parsed.

    Raises
    ------
    ModelError
        `tokenizer.ggml.model` or `tokenizer.ggml.pre` is one that is not known here.
    """
    kind = metadata.required("tokenizer.ggml.model")
    tokens: list[str] = metadata.required("tokenizer.ggml.tokens")
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Rows that only pad the embedding are no tokens: the vocabulary has holes there.
    vocab = {token: i for i, token in enumerate(tokens) if not (types[i] == _UNUSED and token == f"[PAD{i}]")}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, vocab)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, vocab), True
    else:
        raise ModelError(f"{metadata.path} has tokenizer '{kind}', expected 'gpt2' or 'llama'; use its safetensors")
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=types[i] != _USER_DEFINED)
            for token, i in vocab.items()
            if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    names = {
        f"{role}_token": tokens[i]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    before = names.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = names.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before or after:
        ends = [(token, vocab[token]) for token in (before, after) if token]
        single = [*([before] if before else []), "$A", *([after] if after else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get("llama.context_length"),
    )


def _byte_level(metadata: Metadata, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PATTERNS:
        known = ", ".join(sorted(_PATTERNS))
        raise ModelError(f"{metadata.path} cuts text by '{pre}', expected one of {known}; use its safetensors instead")
    merges = [tuple(merge.split(" ")) for merge in metadata.required("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _BOS_BY_DEFAULT


def _sentencepiece(metadata: Metadata, vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE joins the pair whose result scores best.

    Said as merges: every way to halve a token into two tokens, best score first.
    """
    scores: list[float] = metadata.required("tokenizer.ggml.scores")
    halves = [
        (-scores[i], vocab[token[:cut]], vocab[token[cut:]], (token[:cut], token[cut:]))
        for token, i in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [merge for *_, merge in sorted(halves)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokens = metadata.required("tokenizer.ggml.tokens")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if leading else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading else steps)
    return backend
