"""A vocabulary is the bytes behind the ids, whatever alphabet the tokenizer file spells them in."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from logitstore.errors import ModelError
from logitstore.vocabulary import vocabulary_of
from tests.tiny import CORPUS, SPECIAL_TOKENS, tiny_tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "é"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", [*CORPUS, "😀 \x00\x7f\xa0\u2028 ½"])
@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(), sentencepiece_tokenizer()], ids=["byte-level", "sentencepiece"]
)
def test_the_bytes_of_a_texts_tokens_join_to_the_text(tokenizer: Any, text: str) -> None:
    vocabulary = vocabulary_of(tokenizer)
    assert b"".join(vocabulary.tokens[i] for i in tokenizer.encode(text)) == text.encode()


def test_every_single_byte_is_a_token_of_both_styles() -> None:
    for tokenizer in (tiny_tokenizer(), sentencepiece_tokenizer()):
        assert {bytes([byte]) for byte in range(256)} <= set(vocabulary_of(tokenizer).tokens)


def test_special_tokens_are_their_text_and_are_listed() -> None:
    vocabulary = vocabulary_of(tiny_tokenizer())
    assert [vocabulary.text(i) for i in sorted(vocabulary.special_ids)] == list(SPECIAL_TOKENS)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)


def test_an_added_token_that_is_also_a_piece_is_spelled_as_the_piece_as_gemmas_runs_of_spaces() -> None:
    description = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    description["model"]["vocab"]["\u2581\u2581"] = len(description["model"]["vocab"])
    description["model"]["merges"].append(["\u2581", "\u2581"])
    backend = Tokenizer.from_str(json.dumps(description))
    backend.add_tokens([AddedToken("\u2581\u2581", normalized=False), AddedToken("<b>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert vocabulary_of(tokenizer).joined(tokenizer.encode("é  é<b>")) == "é  é<b>".encode()


def test_an_id_without_token_is_empty() -> None:
    tokenizer = tiny_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"].pop()
    last = max(description["model"]["vocab"], key=description["model"]["vocab"].__getitem__)
    description["model"]["vocab"][last] += 2
    shifted = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    assert vocabulary_of(shifted).tokens[-3:-1] == (b"", b"")


def test_the_fingerprint_follows_content_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    fingerprint = vocabulary_of(tokenizer).fingerprint()
    assert fingerprint == vocabulary_of(tiny_tokenizer()).fingerprint()
    assert len(bytes.fromhex(fingerprint)) == 16
    tokenizer.chat_template = None
    assert vocabulary_of(tokenizer).fingerprint() == fingerprint
    tokenizer.eos_token = "<|endoftext|>"
    assert vocabulary_of(tokenizer).fingerprint() != fingerprint
    assert vocabulary_of(tiny_tokenizer(383)).fingerprint() != fingerprint


def test_bytes_that_are_not_characters_are_shown_escaped() -> None:
    vocabulary = vocabulary_of(tiny_tokenizer())
    assert vocabulary.text(vocabulary.tokens.index(b"\xff")) == "\\xff"


def test_a_tokenizer_without_exact_bytes_is_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for tokenizer in (words, object()):
        with pytest.raises(ModelError, match="expected"):
            vocabulary_of(tokenizer)
