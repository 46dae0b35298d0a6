"""A conversation through a tokenizer's chat template: its tokens, and which of them are the assistant's.

Templates are programs of other people, run in a sandbox by transformers. They are told what mlx-lm tells them, but for
the date, and which turns are whose is found by rendering parts of the conversation.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError, ModelError

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


def has_chat_template(tokenizer: Any) -> bool:
    """Whether conversations can be rendered."""
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


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tools: Any, tokenizer: Any, where: str
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Render the conversation once, tokenise it once, and learn the tokens that end inside an assistant turn.

    Only the end of a token is looked at: byte-level tokenizers may trim the spaces off its start, and the bytes of one
    character share its end. But a header that takes in the spaces after it (Phi-3's) is no part of the turn.

    Returns:
        L token ids, and for each token whether it is to be learned, bool [L].

    Raises:
        DatasetError: the template refuses the messages, or does not tell where a turn begins or ends.
        ModelError: a tokenizer that gives no character offsets.
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
