"""What each token id means in bytes, read from a Hugging Face tokenizer; two tokenizers are compared by this content.

Strings in a tokenizer file are spelled in that file's own alphabet (GPT-2's byte letters, SentencePiece's U+2581,
WordPiece's ##). Bytes are the same everywhere, so the GGUF and the Hugging Face tokenizer of one model have one
fingerprint. No MLX, and nothing is decoded or encoded to find out.

What holds is `Vocabulary.joined`: the bytes of a text's tokens are those of the text, after the tokenizer's own
normaliser (none in most; NFC in some; WordPiece's lower-cases and strips accents). Exceptions, which no ids can tell:
an unknown token stands for anything, WordPiece drops whitespace, a byte-level tokenizer the bytes that it has no token
for (`lost_bytes`), SentencePiece takes U+2581 for a space, and a tokenizer that puts a space before a text only where
there is none gives " a" and "a" the same ids.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from logitstore.errors import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token (index = token id; ``b""`` where no token has that id) and the ids that are not text."""

    tokens: tuple[bytes, ...]
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    leading_space: str = field(default="", compare=False)
    """Where a token begins with a space that is no text: "" nowhere; "first", in a text's first token; "always", also
    in the first one after each special token. A store does not know it of its teacher, and has "" here."""

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """BLAKE2b-128, in hex, of every token's bytes and the special, BOS and EOS ids."""
        digest = hashlib.blake2b(b"logitstore vocabulary 1", digest_size=16)
        digest.update(struct.pack("<I", len(self.tokens)))
        for token in self.tokens:
            digest.update(struct.pack("<I", len(token)) + token)
        ends = (-1 if i is None else i for i in (self.bos_id, self.eos_id))
        digest.update(struct.pack(f"<{len(self.special_ids) + 2}q", *sorted(self.special_ids), *ends))
        return digest.hexdigest()

    def text(self, token_id: int) -> str:
        """A token for display; bytes that are not whole UTF-8 characters are shown as ``\\xNN``."""
        return self.tokens[token_id].decode("utf-8", errors="backslashreplace")

    def text_bytes(self, token_id: int) -> bytes:
        """A token's part of the text: ``b""`` for special tokens, and for ids of the LM head that no token has."""
        return b"" if token_id in self.special_ids or token_id >= len(self.tokens) else self.tokens[token_id]

    def pieces(self, token_ids: Iterable[int]) -> list[bytes]:
        """Every token's part of the text that they are the tokens of, without the space that is no text."""
        found, begins = [], bool(self.leading_space)
        for token_id in token_ids:
            piece = self.text_bytes(token_id)
            if piece:
                found.append(piece[1:] if begins and piece.startswith(b" ") else piece)
                begins = False
            else:
                found.append(piece)
                begins |= self.leading_space == "always"
        return found

    def joined(self, token_ids: Iterable[int]) -> bytes:
        """The text that these are the tokens of, special ones apart; without its whitespace if `drops_whitespace`."""
        return b"".join(self.pieces(token_ids))

    @cached_property
    def drops_whitespace(self) -> bool:
        """Whether no token has whitespace in it, as of WordPiece: texts are to be compared without it then."""
        return not any(b" " in token or b"\n" in token for token in self._text_tokens())

    @cached_property
    def lost_bytes(self) -> bytes:
        """The bytes that no token has: a byte-level tokenizer passes over them, SmolLM2's over 6 control characters."""
        return bytes(set(range(256)).difference(*self._text_tokens()))

    def _text_tokens(self) -> Iterator[bytes]:
        return (token for i, token in enumerate(self.tokens) if i not in self.special_ids)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a Hugging Face fast tokenizer, by its own description of how it spells bytes.

    Raises:
        ModelError: not a fast tokenizer, or one that is neither byte-level nor SentencePiece nor WordPiece: its tokens
            have no exact bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = type(tokenizer).__name__
        raise ModelError(f"{found} is not a fast tokenizer; expected one that loads from a tokenizer.json")
    description = json.loads(backend.to_str())
    model = description["model"]
    spelled = _spelling(description)
    pieces = model["vocab"]
    ids = pieces if isinstance(pieces, dict) else {piece: i for i, (piece, _score) in enumerate(pieces)}
    by_id = {i: spelled(piece) for piece, i in ids.items()}
    added = description["added_tokens"]
    special = {token["id"] for token in added if token["special"]} | set(tokenizer.all_special_ids)
    # Gemma's runs of spaces are added tokens, and pieces that the model emits: these say what the piece says.
    pieces_too = {i for i in ids.values() if i not in special} if spelled is _sentencepiece else set()
    by_id |= {token["id"]: token["content"].encode() for token in added if token["id"] not in pieces_too}
    return Vocabulary(
        tokens=tuple(by_id.get(i, b"") for i in range(max(by_id, default=-1) + 1)),
        special_ids=frozenset(special),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        leading_space=_leading_space(description),
    )


def _spelling(description: dict[str, Any]) -> Callable[[str], bytes]:
    """How a piece of this tokenizer is read as bytes.

    Raises:
        ModelError: it has no exact bytes.
    """
    model = description["model"]
    kinds = set(_kinds([description["pre_tokenizer"], description["decoder"], model]))
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"} or model.get("byte_fallback"):
        return _sentencepiece
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return lambda piece: piece.removeprefix(prefix).encode() or piece.encode()
    raise ModelError(
        f"tokenizer '{model['type']}' has no exact bytes per token; expected byte-level BPE, SentencePiece or WordPiece"
    )


def _leading_space(description: dict[str, Any]) -> str:
    """See `Vocabulary.leading_space`."""
    for part in _parts([description["normalizer"], description["pre_tokenizer"]]):
        match part:
            case {"type": "Prepend", "prepend": "\u2581"} | {"type": "ByteLevel", "add_prefix_space": True}:
                return "always"
            case {"type": "Metaspace", "prepend_scheme": "first" | "always" as scheme}:
                return str(scheme)
    return ""


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every component in a description, however deep in sequences."""
    if isinstance(node, list):
        for item in node:
            yield from _parts(item)
    elif isinstance(node, dict):
        yield node
        for key in ("normalizers", "pretokenizers", "decoders"):
            yield from _parts(node.get(key, []))


def _kinds(node: Any) -> Iterator[str]:
    """The `type` of every component."""
    return (str(part.get("type")) for part in _parts(node))


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 is itself, the other 68 bytes are U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _gpt2_bytes()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError:
        return piece.encode()  # not in the alphabet, so it was never merged from bytes


def _sentencepiece(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()
