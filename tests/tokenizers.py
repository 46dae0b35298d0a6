"""Tokenizers of every kind that has exact bytes, trained on the tests' corpus or put together by hand."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"


def byte_bpe(vocab_size: int = 1000, *, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, "<|endoftext|>", "<|endoftext|>")


def sentencepiece_bpe(space: str = "") -> PreTrainedTokenizerFast:
    """Llama 2's kind.

    Args:
        space: put before texts: "", "Prepend" (the normaliser), "first" or "always" (of Metaspace).
    """
    words = {piece for text in CORPUS for word in text.split() for piece in (SPACE + word, word, *word, SPACE)}
    merged = sorted(
        {word[:end] for word in words for end in range(2, len(word) + 1)} | {w for w in words if len(w) > 1}
    )
    singles = sorted({letter for piece in merged for letter in piece} | {SPACE})
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTE_PIECES, *singles, *merged])}
    merges = [(piece[:-1], piece[-1]) for piece in sorted(merged, key=len) if piece[:-1] in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", SPACE)
    if space in ("first", "always"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if space else spaces
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(backend, "<s>", "</s>", "<unk>")


def unigram(space: str = "first") -> PreTrainedTokenizerFast:
    """Trained, then given byte pieces: the trainer knows none."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)[3:]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -20.0) for piece in BYTE_PIECES)]
    pieces += [(piece, -2.0 - 0.01 * i) for i, piece in enumerate(learned)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=space)])
    return _wrapped(backend, "<s>", "</s>", "<unk>")


def wordpiece(*, lowercase: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _wrapped(backend: Tokenizer, bos: str, eos: str, unk: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, clean_up_tokenization_spaces=False
    )
