"""A tokenizer and a llama small enough to be made anew in every test, saved as mlx-lm saves its models.

Nothing is downloaded. The same arguments give the same bytes; MLX's global random state is left alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import gpt2, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The teacher runs once, and every student reads what it said.",
    "A student who learns from a whole distribution learns more than one who is told the answer.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "What is kept is small: a few bytes for every position, and the weights sum to one.",
    "In 2024 the store held 1234567890 positions; in 2025 it held more.",
    "Où est l'école? Über den Fluss. Привет, мир. 你好，世界。",
)


def tiny_tokenizer(vocab_size: int = 384, texts: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: special tokens 0, 1, 2, then 256 bytes, then merges.

    It adds neither BOS nor EOS by itself. EOS and padding are ``<|im_end|>``, BOS ``<|im_start|>``.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def save_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    layers: int = 4,
    hidden: int = 32,
    quantize: bool = False,
    tied: bool = True,
) -> Path:
    """Save a random llama and its tokenizer in `path` as an mlx-lm model directory, float32; return `path`.

    `vocab_size` is the width of the LM head (default: the tokenizer's length; wider means padding ids, as in many real
    models). `quantize` packs linear layers and embedding in 4 bits, groups of 32. `hidden` is a multiple of 32.
    """
    tokenizer = tiny_tokenizer()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": vocab_size or len(tokenizer),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    model.update(tree_unflatten([(name, _random(rng, p.shape)) for name, p in tree_flatten(model.parameters())]))
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
        config["quantization"] = {"group_size": 32, "bits": 4}

    path.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer.save_pretrained(path)
    return path


def save_tiny_gpt2(path: Path, places: int) -> Path:
    """The same of a GPT-2 of one layer, which has learned so many places and reads no more tokens."""
    config = {"model_type": "gpt2", "n_ctx": places, "n_positions": places, "n_embd": 32, "n_head": 4, "n_layer": 1}
    config |= {"layer_norm_epsilon": 1e-5, "vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}
    model, rng = gpt2.Model(gpt2.ModelArgs.from_dict(config)), np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: _random(rng, p.shape) for name, p in tree_flatten(model.parameters())}
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny_tokenizer().save_pretrained(path)
    return path


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    """Norm weights near one; matrices of unit gain, so that the logits differ enough from uniform to test on."""
    if len(shape) == 1:
        return mx.array(rng.normal(1.0, 0.1, shape).astype(np.float32))
    return mx.array(rng.normal(0.0, 1.5 / np.sqrt(shape[-1]), shape).astype(np.float32))
