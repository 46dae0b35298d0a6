"""The Hugging Face tokenizer that a GGUF file's metadata describes, byte-level or SentencePiece.

It is rebuilt from the tokens, merges and scores in the file; its ids are those of llama.cpp. No network, no guesses: a
kind of tokenizer that is not known here is refused. Needs no MLX.
"""

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from logitstore.errors import ModelError
from logitstore.gguf_metadata import Metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where a byte-level tokenizer cuts text before merging, by `tokenizer.ggml.pre`: patterns that belong to those formats.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # a word that is a token is not merged from its parts
_BOS_BY_DEFAULT = {"llama-bpe"}

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type


def build_tokenizer(metadata: Metadata) -> "PreTrainedTokenizerFast":
    """The tokenizer that the metadata describes; its ids are those of llama.cpp with special tokens parsed.

    Raises:
        ModelError: `tokenizer.ggml.model` or `tokenizer.ggml.pre` is one that is not known here.
    """
    from transformers import PreTrainedTokenizerFast  # here, since it looks for MLX when it is imported

    kind = metadata.required("tokenizer.ggml.model")
    tokens: list[str] = metadata.required("tokenizer.ggml.tokens")
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Rows that only pad the embedding are no tokens: the vocabulary has holes there.
    vocab = {token: i for i, token in enumerate(tokens) if not (types[i] == _UNUSED and token == f"[PAD{i}]")}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, vocab)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, vocab), True
    else:
        raise ModelError(f"{metadata.path} has tokenizer '{kind}', expected 'gpt2' or 'llama'; use its safetensors")
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=types[i] != _USER_DEFINED)
            for token, i in vocab.items()
            if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    names = {
        f"{role}_token": tokens[i]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    before = names.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = names.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before or after:
        ends = [(token, vocab[token]) for token in (before, after) if token]
        single = [*([before] if before else []), "$A", *([after] if after else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get("llama.context_length"),
    )


def _byte_level(metadata: Metadata, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PATTERNS:
        known = ", ".join(sorted(_PATTERNS))
        raise ModelError(f"{metadata.path} cuts text by '{pre}', expected one of {known}; use its safetensors instead")
    merges = [tuple(merge.split(" ")) for merge in metadata.required("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _BOS_BY_DEFAULT


def _sentencepiece(metadata: Metadata, vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE joins the pair whose result scores best.

    Said as merges: every way to halve a token into two tokens, best score first.
    """
    scores: list[float] = metadata.required("tokenizer.ggml.scores")
    halves = [
        (-scores[i], vocab[token[:cut]], vocab[token[cut:]], (token[:cut], token[cut:]))
        for token, i in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [merge for *_, merge in sorted(halves)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokens = metadata.required("tokenizer.ggml.tokens")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if leading else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading else steps)
    return backend
