"""A GGUF file's tokenizer gives the ids that llama.cpp gives; its answers are quoted as golden ids."""

from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import pytest

from logitstore.gguf_metadata import Metadata
from logitstore.gguf_tokenizer import build_tokenizer
from tests.gguf_files import sentencepiece_metadata, smollm2_path

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
# llama.cpp's ids under `PIECES`.
PIECE_IDS = {
    "the rat hid  in the attic.": [
        *(1, 261, 269, 275, 276, 270, 269, 271, 273, 279, 269, 267, 261, 264, 270, 270, 273, 102, 280),
    ],
    "é thing": [1, 269, 198, 172, 260, 271, 268],
    "a</s>the": [1, 264, 2, 261],
}


@pytest.fixture(scope="module")
def smollm2() -> Metadata:
    path = smollm2_path()
    _, raw = mx.load(str(path), return_metadata=True)
    return Metadata(path, raw)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", SMOLLM2_IDS, ids=ascii)
def test_smollm2_tokens_are_those_of_llama_cpp_and_decode_to_the_text(smollm2: Metadata, text: str) -> None:
    tokenizer = build_tokenizer(smollm2)
    assert tokenizer.encode(text) == SMOLLM2_IDS[text]
    assert tokenizer.decode(SMOLLM2_IDS[text]) == text


@pytest.mark.parametrize("pre", PRE_IDS)
def test_each_way_to_cut_text_gives_llama_cpps_tokens(smollm2: Metadata, pre: str) -> None:
    metadata = Metadata(smollm2.path, {**smollm2._raw, "tokenizer.ggml.pre": pre})
    assert build_tokenizer(metadata).encode(PRE_TEXT) == PRE_IDS[pre]


@pytest.mark.parametrize("text", PIECE_IDS, ids=ascii)
def test_sentencepiece_tokens_are_those_of_llama_cpp(text: str) -> None:
    assert build_tokenizer(Metadata(Path("by hand"), sentencepiece_metadata())).encode(text) == PIECE_IDS[text]


def test_bos_and_eos_are_added_as_the_metadata_says() -> None:
    flags = {"tokenizer.ggml.add_bos_token": mx.array(False), "tokenizer.ggml.add_eos_token": mx.array(True)}
    tokenizer = build_tokenizer(Metadata(Path("by hand"), sentencepiece_metadata() | flags))
    assert tokenizer.encode("the") == [261, 2]
