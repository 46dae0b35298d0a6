"""Documents to token sequences: what the teacher reads and which positions the student is trained on.

Stands between the documents and the teacher, and before the key: build and training call the same function, so a
document has the same token ids in both. Token ids are those of mlx-lm, position for position, but for today's date
where a chat template writes that: here it is always the same day. Nothing is padded, packed or shuffled here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.asked import Asked
from logitstore.documents import Document, format_of
from logitstore.errors import ConfigError, DatasetError, ModelError, UnusableLogitsError
from logitstore.targets import SparseTargets

TODAY = datetime(2024, 7, 26)
"""What a chat template that asks for the date is told (Llama 3.2, SmolLM3, gpt-oss): with the true one, a document had
other tokens tomorrow, and a store none of its targets. It is the day that Llama 3's template names without a clock."""
_ASKS_THE_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
    ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
)
"""The tokens around thoughts that mlx-lm knows; it tells a chat template to think where the vocabulary has them."""
_OPENS_A_THOUGHT = re.compile(r"<think>\s*\Z")
"""How some generation prompts end (DeepSeek-R1, QwQ, Qwen3-Thinking); a turn without thoughts begins before that."""
_SOME_CONTENT = "\ue000"
"""A content for a turn that no other has, and no template strips: of the private use area."""


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One tokenised document of L tokens, hence L-1 positions.

    token_ids: int32 [L].
    trained: bool [L-1]; trained[t] says whether position t, which predicts token t+1, is trained.
    where: the place of the document, as in `Document`.
    truncated: tokens cut from the end, 0 if none.
    weights: float32 [L-1], above 0 where trained; how much each position's loss counts. None: all alike.
    asked: what the teacher reads in its place. None: the same tokens.
    columns: values of the dataset's further columns that were asked for, by name, as the row has them.
    """

    token_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    where: str
    truncated: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    weights: npt.NDArray[np.float32] | None = None
    asked: Asked | None = None

    @property
    def asked_ids(self) -> npt.NDArray[np.int32]:
        """The token ids that the teacher reads, whose key the document has in a store."""
        return self.token_ids if self.asked is None else self.asked.token_ids

    def answered(self, positions: int) -> int:
        """How many leading positions of the document are answered by so many of what the teacher reads."""
        return positions if self.asked is None else self.asked.answered(positions)

    def own(self, targets: SparseTargets | None) -> SparseTargets | None:
        """Targets of what the teacher reads, as those of the document's own positions."""
        return targets if self.asked is None or targets is None else self.asked.shifted(targets)


@dataclass
class TokenizeReport:
    """What `tokenize` met so far. All but `documents` and `skipped_documents` speak of the sequences it yielded."""

    documents: int = 0
    tokens: int = 0
    trained_positions: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    skipped_documents: int = 0
    """Nothing is trained in them."""
    trained_beyond: int = 0
    """Of these, those of which something is trained after the cut."""

    def describe(self, different: int | None = None) -> str:
        """One line for the user.

        Args:
            different: how many of the sequences are different, where that matters.
        """
        parts = [f"{self.documents:,} documents, {self.tokens:,} tokens, {self.trained_positions:,} trained positions"]
        sequences = self.documents - self.skipped_documents
        if different is not None and sequences > different:
            parts.append(f"{sequences - different:,} equal to an earlier one")
        if self.truncated_documents:
            parts.append(
                f"{self.truncated_documents:,} cut at --max-seq-length ({self.truncated_tokens:,} tokens dropped)"
            )
        if self.skipped_documents:
            beyond = f", in {self.trained_beyond:,} before --max-seq-length" if self.trained_beyond else ""
            parts.append(f"{self.skipped_documents:,} skipped: nothing to train on{beyond}")
        return "; ".join(parts)

    def require_some(self, max_seq_length: int) -> None:
        """Check that a sequence was yielded.

        Raises:
            DatasetError: none was.
        """
        if self.skipped_documents == self.documents:
            longer = (
                f"--max-seq-length above {max_seq_length}, after which {self.trained_beyond:,} of them have one, or "
            )
            raise DatasetError(
                f"the dataset has {self.documents:,} documents, but none with two tokens and a trained position; "
                f"type {longer if self.trained_beyond else ''}--dataset with another"
            )


def read_sequences(
    rows: Iterable[Document],
    tokenizer: Any,
    max_seq_length: int,
    report: TokenizeReport,
    *,
    quiet: bool = False,
    columns: Sequence[str] = (),
    mask_prompt: bool = True,
) -> list[TokenSequence]:
    """Tokenise a whole dataset, with a progress bar where that takes over a second: `tokenize`, as a list.

    Raises:
        DatasetError: a malformed row, or not a single usable document.
        ConfigError, ModelError: as `tokenize`.
    """
    bar = tqdm(rows, desc="tokenize", unit="doc", delay=1, leave=False, disable=quiet)
    sequences = list(tokenize(bar, tokenizer, max_seq_length, report, columns, mask_prompt))
    report.require_some(max_seq_length)
    return sequences


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    max_seq_length: int,
    report: TokenizeReport | None = None,
    columns: Sequence[str] = (),
    mask_prompt: bool = True,
) -> Iterator[TokenSequence]:
    """One sequence per document, of its first `max_seq_length` tokens; `report` is kept up to date along the way.

    text: its tokens and EOS; every position is trained.
    prompt, completion: a user and an assistant message where the tokenizer has a chat template; else the tokens of
    both and EOS. Trained where the completion, or what closes it, is predicted.
    messages: as the chat template renders them; trained where an assistant turn, or what closes it, is predicted. Of a
    turn that is rendered otherwise once more follows, the content alone.

    A document with fewer than two tokens, or with no trained position among those kept, is skipped and counted.
    `tokenizer` is a fast Hugging Face tokenizer, bare or in mlx-lm's wrapper. `columns` are kept as they are; the rows
    have them where `read_documents` was asked for them. Without `mask_prompt` every position is trained.

    Raises:
        ConfigError: `max_seq_length` is less than 2.
        DatasetError: messages without a chat template, or with one that does not tell where a turn begins or ends.
        ModelError: a chat is to be tokenised by a tokenizer that gives no character offsets.
    """
    if max_seq_length < 2:
        raise ConfigError(
            f"max_seq_length is {max_seq_length}, expected at least 2: one token to read and one to predict; "
            "type --max-seq-length 2048"
        )
    report = report or TokenizeReport()
    for document in documents:
        report.documents += 1
        ids, learned = _encode(document, tokenizer)
        token_ids = np.array(ids[:max_seq_length], np.int32)
        trained = (learned[:max_seq_length] if mask_prompt else np.ones(len(token_ids), np.bool_))[1:]
        # that is the one shift: position t predicts token t + 1
        if not trained.any():
            report.skipped_documents += 1
            report.trained_beyond += any(learned[max_seq_length:])
            continue
        truncated = len(ids) - len(token_ids)
        report.tokens += len(token_ids)
        report.trained_positions += int(trained.sum())
        report.truncated_documents += truncated > 0
        report.truncated_tokens += truncated
        kept = {name: document.row[name] for name in columns}
        yield TokenSequence(token_ids, trained, document.where, truncated, kept)


def require_ids_below(vocab_size: int, sequences: Iterable[TokenSequence], model: str) -> None:
    """Check before a model reads them that it has an embedding for every token: MLX reads past the end without a word.

    Raises:
        ModelError: naming the first document with a token that the model lacks.
    """
    for sequence in sequences:
        largest = int(max(sequence.token_ids.max(), sequence.asked_ids.max()))
        if largest >= vocab_size:
            raise ModelError(
                f"{sequence.where} holds token {largest}, but {model} knows {vocab_size:,} tokens; "
                "its tokenizer is not the one it was trained with: type a model folder whose parts belong together"
            )


def require_places(places: int | None, tokens: int, model: str) -> None:
    """Check before a model reads so many tokens that it has learned so many places: MLX reads past the end of these.

    Args:
        places: None for a model that can count on.

    Raises:
        UnusableLogitsError: saying where to cut documents.
    """
    if places is not None and tokens > places:
        raise UnusableLogitsError(
            f"a document has {tokens:,} tokens to read, but {model} has learned {places:,} places; "
            f"type --max-seq-length {places}"
        )


def _encode(document: Document, tokenizer: Any) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """The L token ids of a document, and for each token whether it is to be learned, bool [L]."""
    row, tools = document.row, document.row.get("tools")
    match format_of(row):
        case "messages":
            if not _has_chat_template(tokenizer):
                raise DatasetError(
                    f"{document.where}: found messages, but the tokenizer has no chat template; "
                    'use rows of {"text"} or {"prompt", "completion"}, or an instruct model'
                )
            return _encode_chat(row["messages"], tools, tokenizer, document.where)
        case "completion" if _has_chat_template(tokenizer):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            return _encode_chat(messages, tools, tokenizer, document.where)
        case "completion":
            prompt = _encode_prompt(row["prompt"], tokenizer)
            ids = _closed(prompt + _encode_completion(row["completion"], tokenizer), tokenizer)
            return ids, np.arange(len(ids)) >= len(prompt)
        case _:
            ids = _closed(_ids(row["text"], tokenizer), tokenizer)
            return ids, np.ones(len(ids), np.bool_)


def _encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, without the EOS that some tokenizers add to every text."""
    ids = _ids(prompt, tokenizer)
    added = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token)
    return ids[:-1] if added else ids


def _encode_completion(completion: str, tokenizer: Any) -> list[int]:
    """Token ids of a completion as it stands in a text: not with the space that some tokenizers put before a text."""
    before, both = (_ids(text, tokenizer, add_special_tokens=False) for text in ("\n", "\n" + completion))
    alone = both[: len(before)] != before  # it merges with the line's end
    return _ids(completion, tokenizer, add_special_tokens=False) if alone else both[len(before) :]


def _ids(text: str, tokenizer: Any, **options: Any) -> list[int]:
    # verbose=False: what is longer than the model's own limit is cut and counted here
    return list(tokenizer.encode(text, verbose=False, **options))


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with EOS at the end, if the tokenizer has one and it is not there already."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _has_chat_template(tokenizer: Any) -> bool:
    # mlx-lm's wrapper also knows templates that are Python functions
    return bool(getattr(tokenizer, "has_chat_template", tokenizer.chat_template is not None))


def _undated(tokenizer: Any, tools: Any) -> dict[str, str]:
    """The tokenizer's chat template with `TODAY` in it, as an option to render with; nothing where it has no date."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return {}
    template = tokenizer.get_chat_template(tools=tools)
    return {"chat_template": _ASKS_THE_DATE.sub(lambda asks: asks[1] + TODAY.strftime(asks[2]) + asks[1], template)}


def _thinks(tokenizer: Any) -> dict[str, bool]:
    """What mlx-lm tells every chat template beside the messages; nothing where its wrapper will say so itself."""
    if hasattr(tokenizer, "has_thinking"):
        return {}
    number = tokenizer.backend_tokenizer.token_to_id
    return {"enable_thinking": any(all(number(mark) is not None for mark in marks) for marks in _THOUGHT_MARKS)}


def _encode_chat(
    messages: Sequence[Mapping[str, Any]], tools: Any, tokenizer: Any, where: str
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Render the conversation once, tokenise it once, and learn the tokens that end inside an assistant turn.

    Only the end of a token is looked at: byte-level tokenizers may trim the spaces off its start, and the bytes of one
    character share its end. But a header that takes in the spaces after it (Phi-3's) is no part of the turn.
    """

    def render(turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        try:
            options |= _undated(tokenizer, tools) | told
            return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options))
        except Exception as error:  # a template is a program of its own and may raise anything
            raise DatasetError(
                f"{where}: the chat template refuses the messages: {' '.join(str(error).split())}"
            ) from error

    fast = tokenizer if callable(tokenizer) else tokenizer._tokenizer  # mlx-lm's wrapper cannot be called
    if not fast.is_fast:
        raise ModelError(
            f"{type(fast).__name__} gives no character offsets; expected a tokenizer with a tokenizer.json"
        )
    told = _thinks(tokenizer)
    whole = render(messages)
    encoding = fast(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    starts, ends = offsets.T
    learned = np.zeros(len(ends), np.bool_)
    for start, end in _assistant_spans(messages, whole, render, tokenizer.eos_token or "", where):
        learned |= (ends > start) & (ends <= end)
        for number in np.flatnonzero((starts < start) & (ends > start)):
            added = fast.added_tokens_decoder.get(ids[number])
            learned[number] &= added is None or not added.rstrip
    return ids, learned


def _assistant_spans(
    messages: Sequence[Mapping[str, Any]], whole: str, render: Callable[..., str], eos: str, where: str
) -> Iterator[tuple[int, int]]:
    """[start, end) in `whole` of every assistant turn: after the generation prompt, to the end of what closes it.

    `eos` may stand at the end of all messages, whatever closes each of them (Phi-3 and its successors).
    """
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise DatasetError(
                f"{where}: messages[0] is an assistant turn, expected a system or user message before it"
            )
        prompt = render(messages[:i], add_generation_prompt=True)
        if not whole.startswith(prompt):
            prompt = _OPENS_A_THOUGHT.sub("", prompt)
        through = render(messages[: i + 1])
        start, end = len(prompt), _turn_end(prompt, through, whole)
        if end is None:
            end = _turn_end(prompt, through.removesuffix(eos), whole)
        span = (start, end) if end is not None else _content_span(messages, i, whole, render)
        if span is None:
            raise DatasetError(
                f"{where}: the chat template renders the turns up to messages[{i}] differently once more follows; "
                "expected the same text, to tell the assistant's tokens; use single-turn rows, or another chat template"
            )
        yield span


def _content_span(
    messages: Sequence[Mapping[str, Any]], i: int, whole: str, render: Callable[..., str]
) -> tuple[int, int] | None:
    """[start, end) in `whole` of what it says of the content of messages[i], which is all that changes with it; to the
    end of all for the last one. None where that is not all, nothing is left of it, or the turn has more than a content.

    What closes a turn is not told by this. It is for templates that close the last one otherwise (gpt-oss), that put
    something in the place of thoughts (GLM-4.6), or whose generation prompt says more than a turn does (Apriel).
    """
    message = messages[i]
    if any(value for name, value in message.items() if name not in ("role", "content")):
        return None
    other = render([*messages[:i], {**message, "content": _SOME_CONTENT}, *messages[i + 1 :]])
    before, _, after = other.partition(_SOME_CONTENT)
    in_order = before.startswith(render(messages[:i]))
    if not (in_order and whole.startswith(before) and whole.endswith(after) and len(before + after) < len(whole)):
        return None
    return len(before), len(whole) - len(after) if messages[i + 1 :] else len(whole)


def _turn_end(prompt: str, through: str, whole: str) -> int | None:
    """Where in `whole` the turn ends that `through` ends with; None where the three do not begin alike."""
    if not (whole.startswith(prompt) and through.startswith(prompt)):
        return None
    # Some templates (Qwen3) drop the thoughts at the head of a turn once another follows: what is left is its rest.
    turn, found = through[len(prompt) :], whole[len(prompt) :]
    rests = (turn[cut:] for cut in range(len(turn)) if found.startswith(turn[cut:]))
    left = next((rest for rest in rests if rest == turn or rest.strip()), None)  # a line's end is no rest
    return None if left is None else len(prompt) + len(left)
