"""A llama in float64 NumPy, as its formulas read.

MLX's own float64 does not serve for differences: its fused norm and rotary embedding, and its exp, round as float32
does, to about 1e-6.

Reference: Touvron et al., "LLaMA", 2023, section 2.2; Su et al., "RoFormer", 2021, equation 34, in halves as Hugging
Face has it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.oracle import Floats, Ints


def logits(weight: Callable[[str], Floats], config: Mapping[str, Any], tokens: Ints) -> Floats:
    """Return the logits of a batch, [B, L, V].

    Args:
        weight: gives the weights of a name, as mlx-lm names them.
        config: of Hugging Face's keys; no biases, no scaled rotary embedding.
        tokens: [B, L]
    """
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width = config["hidden_size"] // heads
    length = tokens.shape[1]
    angles = np.arange(length)[:, None] * config["rope_theta"] ** (-np.arange(0, width, 2) / width)
    future = np.triu(np.full((length, length), -np.inf), 1)

    def norm(x: Floats, name: str) -> Floats:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight(f"{name}.weight")

    def turned(x: Floats) -> Floats:
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def apart(x: Floats, count: int) -> Floats:
        """[B, L, D] -> [B, heads, L, width]; a key or value head serves several heads."""
        split = x.reshape(*x.shape[:2], count, width).transpose(0, 2, 1, 3)
        return np.repeat(split, heads // count, axis=1)

    embedding = weight("model.embed_tokens.weight")
    x = embedding[tokens]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            apart(h @ weight(f"{layer}.self_attn.{name}_proj.weight").T, count)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        scores = turned(q) @ turned(k).swapaxes(-1, -2) / np.sqrt(width) + future
        attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = (attention @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + mixed @ weight(f"{layer}.self_attn.o_proj.weight").T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (h @ weight(f"{layer}.mlp.{name}_proj.weight").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{layer}.mlp.down_proj.weight").T
    x = norm(x, "model.norm")
    return x @ (embedding if config["tie_word_embeddings"] else weight("lm_head.weight")).T
