"""A GGUF file is the model that llama.cpp reads from it; its answers are quoted as golden ids."""

from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from logitstore.digest import weights_digest
from logitstore.errors import ModelError
from logitstore.gguf import read_gguf
from logitstore.model import load_model, save_model_dir
from logitstore.vocabulary import vocabulary_of
from tests.gguf_files import SMOLLM2, smollm2_path, tiny_gguf
from tests.tiny import tiny_tokenizer

# What llama.cpp finds likeliest after each of these tokens, where it leads by over half a nat of logit.
PROMPT = "The capital of France is Paris, and the capital of Germany is Berlin. One, two, three, four"
NEXT = {0: 29, 1: 282, 3: 314, 4: 7042, 5: 30, 8: 3575, 9: 282, 10: 4649, 11: 314, 12: 11452, 13: 30, 14: 198, 17: 28}


def test_smollm2_predicts_what_llama_cpp_predicts() -> None:
    loaded = load_model(smollm2_path())
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
        ({"llama.block_count": mx.array(5, mx.uint32)}, "holds 4 layers, its metadata says 5"),
        ({"llama.attention.head_count": "four"}, "contradicts itself .TypeError"),
        ({"general.architecture": "two\nlines"}, r"architecture 'two\\nlines', expected 'llama'"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tiny_gguf(tmp_path)
    tensors, metadata = mx.load(str(path), return_metadata=True)
    mx.save_gguf(str(tmp_path / "changed.gguf"), tensors, {**metadata, **change})  # type: ignore[arg-type,dict-item]
    with pytest.raises(ModelError, match=message):
        read_gguf(tmp_path / "changed.gguf")


def test_a_read_only_file_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ModelError, match=r"read-only, .* type `chmod u\+w"):
        read_gguf(path)
