from collections.abc import Sequence
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from tokenizers import AddedToken, processors

from logitstore.documents import Document
from logitstore.errors import ConfigError, DatasetError, ModelError
from logitstore.sequences import TokenizeReport, TokenSequence, read_sequences, tokenize
from logitstore.vocabulary import vocabulary_of
from tests.tiny import tiny_tokenizer
from tests.tokenizers import sentencepiece_bpe, unigram

# What Qwen3 does: the last turn opens with (empty) thoughts, which vanish from it once another message follows.
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What DeepSeek-R1 and QwQ do: the generation prompt opens a thought, and turns are rendered without theirs.
OPENING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1].lstrip() }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# The generation prompt is the header of a last turn; a turn that another follows gets another header.
HEADER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' if loop.last else 'B:' }}{% endif %}"
    "{{ m['content'] + '|' }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
# An assistant's turn begins and ends with a line's end, and its first line is another one once a message follows.
LINES_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
    "{{ '\n(last)\n' if loop.last else '\n(more)\n' }}{% endif %}{{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# What Phi-3.5 and Phi-4-mini do: every message has its own end, and EOS is written once, after the last one.
CLOSED_ONCE_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# What gpt-oss does: a turn that another message follows is closed by another token than the last one.
RETURN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{{ '<|im_start|>final' if m['role'] == 'assistant' }}"
    "{{ '\n' + m['content'] + ('<|endoftext|>' if m['role'] == 'assistant' and loop.last else '<|im_end|>') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# What Apriel does: the generation prompt says more than the header of any turn.
STEPS_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nHere are my reasoning steps:\n' }}{% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def one(row: dict[str, Any], tokenizer: Any, max_seq_length: int = 512) -> TokenSequence:
    (sequence,) = tokenize([Document(row, "a.jsonl:1")], tokenizer, max_seq_length)
    return sequence


def runs(sequence: TokenSequence, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of trained positions: what the student is asked to say."""
    padded = np.concatenate([[False], sequence.trained, [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    predicted = sequence.token_ids[1:]
    return [tokenizer.decode(predicted[a:b]) for a, b in zip(starts, ends, strict=True)]


CONVERSATIONS: list[list[dict[str, str]]] = [
    [user("Why?"), assistant("Because.")],
    [
        {"role": "system", "content": "Be brief."},
        user("Où?"),
        assistant("Là-bas 你好"),
        user("Et?"),
        assistant("Ici. "),
    ],
    [user("Say it."), assistant("  two spaces\n\n  before"), user("  Again  "), assistant("\n")],
    [user("Hi"), assistant("first"), assistant("second"), user("no answer")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_ids_equal_those_of_the_template_and_of_mlx_lm(messages: list[dict[str, str]]) -> None:
    tokenizer = tiny_tokenizer()
    ids = one({"messages": messages}, tokenizer).token_ids.tolist()
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == ChatDataset([], tokenizer).process({"messages": messages})[0]


@pytest.mark.parametrize("messages", [CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[3]])
def test_trained_positions_of_a_chat_say_all_assistant_turns_and_nothing_else(messages: list[dict[str, str]]) -> None:
    tokenizer = tiny_tokenizer()
    sequence = one({"messages": messages}, tokenizer)
    assert sequence.trained.shape == (len(sequence.token_ids) - 1,)
    assert runs(sequence, tokenizer) == [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_leading_spaces_of_a_turn_are_trained(trim_offsets: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    sequence = one({"messages": [user(" a "), assistant(" b  c "), user("   "), assistant("   ")]}, tokenizer)
    assert runs(sequence, tokenizer) == [" b  c <|im_end|>\n", "   <|im_end|>\n"]


def test_a_header_that_takes_in_the_space_after_it_is_not_trained() -> None:
    tokenizer = tiny_tokenizer()
    header = AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [header]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|assistant|>\n' if m['role'] == 'assistant' }}{{ m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    for content in ("  code", "code"):
        sequence = one({"messages": [user("Why?"), assistant(content)]}, tokenizer)
        assert runs(sequence, tokenizer) == ["code<|im_end|>\n"]


def test_mlx_lm_masks_the_same_last_turn() -> None:
    tokenizer = tiny_tokenizer()
    messages = [user("Why?"), assistant("Because.")]
    sequence = one({"messages": messages}, tokenizer)
    _, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": messages})
    assert np.flatnonzero(sequence.trained).tolist() == list(range(offset - 1, len(sequence.token_ids) - 1))


@pytest.mark.parametrize(
    "marks",
    [
        (),
        ("<think>", "</think>"),
        ("<longcat_think>", "</longcat_think>"),
        ("<|think:start|>", "<|think:end|>"),
        ("<|channel>", "<channel|>"),
        ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
        ("<think>",),
    ],
)
def test_a_template_is_told_to_think_as_mlx_lm_tells_it(marks: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(marks))
    said = "{{ 'undefined' if enable_thinking is not defined else 'think' if enable_thinking else 'no' }}"
    tokenizer.chat_template = said + tokenizer.chat_template
    row = {"messages": [user("Why?"), assistant("Because.")]}
    theirs, _ = ChatDataset([row], TokenizerWrapper(tokenizer)).process(row)
    assert one(row, tokenizer).token_ids.tolist() == theirs
    assert one(row, TokenizerWrapper(tokenizer)).token_ids.tolist() == theirs


def test_a_wrapped_tokenizer_gives_the_same_as_a_bare_one() -> None:
    bare, wrapped = tiny_tokenizer(), TokenizerWrapper(tiny_tokenizer())
    for row in ({"text": "Once."}, {"prompt": "2+2=", "completion": "4"}, {"messages": CONVERSATIONS[1]}):
        first, second = one(row, bare), one(row, wrapped)
        assert first.token_ids.tolist() == second.token_ids.tolist()
        assert first.trained.tolist() == second.trained.tolist()


def test_text_is_closed_by_one_eos_and_trained_everywhere() -> None:
    tokenizer = tiny_tokenizer()
    sequence, closed = one({"text": "The store."}, tokenizer), one({"text": "The store.<|im_end|>"}, tokenizer)
    assert sequence.token_ids.tolist() == closed.token_ids.tolist()
    assert sequence.token_ids.tolist() == TextDataset([], tokenizer).process({"text": "The store."})[0]
    assert sequence.token_ids.dtype == np.int32
    assert sequence.trained.all()
    assert sequence.trained.shape == (len(sequence.token_ids) - 1,)


def test_text_keeps_the_special_tokens_of_its_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    ids = one({"text": "Once."}, tokenizer).token_ids.tolist()
    assert tokenizer.decode(ids) == "<|im_start|>Once.<|im_end|>"
    tokenizer.chat_template = None
    pair = one({"prompt": "One", "completion": " two"}, tokenizer)
    assert tokenizer.decode(pair.token_ids) == "<|im_start|>One two<|im_end|>"


@pytest.mark.parametrize("space", ["Prepend", "first", "always"])
def test_a_completion_begins_with_no_space_that_the_row_does_not_have(space: str) -> None:
    for tokenizer in (sentencepiece_bpe(space), unigram("always" if space == "Prepend" else space)):
        for prompt, completion in (("What runs?\nA:", "teacher"), ("What runs?\nA:", " teacher"), ("a", "\n\nb")):
            sequence = one({"prompt": prompt, "completion": completion}, tokenizer)
            ids = sequence.token_ids.tolist()
            assert vocabulary_of(tokenizer).joined(ids).decode() == prompt + completion
            trained = sequence.token_ids[1:][sequence.trained]
            assert b"".join(map(vocabulary_of(tokenizer).text_bytes, trained)).decode() == completion


def test_a_completion_is_an_assistant_turn_where_there_is_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    row = {"prompt": "2 + 2 =", "completion": "4, of course"}
    sequence = one(row, tokenizer)
    theirs, _ = CompletionsDataset([], tokenizer, "prompt", "completion", False).process(row)
    assert sequence.token_ids.tolist() == theirs
    assert runs(sequence, tokenizer) == ["4, of course<|im_end|>\n"]


@pytest.mark.parametrize("prompt", ["2 + 2 =", "2 + 2 = ", "", "Où"])
def test_a_completion_without_a_chat_template_is_trained_with_its_eos(prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    sequence = one({"prompt": prompt, "completion": "~ 4, bien sûr"}, tokenizer)
    assert tokenizer.decode(sequence.token_ids) == f"{prompt}~ 4, bien sûr<|im_end|>"
    # The first token of a document is predicted by no position.
    assert runs(sequence, tokenizer) == ["~ 4, bien sûr<|im_end|>" if prompt else " 4, bien sûr<|im_end|>"]


def test_messages_without_a_chat_template_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: found messages, but the tokenizer has no chat template"):
        one({"messages": CONVERSATIONS[0]}, tokenizer)


def test_tools_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + tokenizer.chat_template
    sequence = one({"messages": CONVERSATIONS[0], "tools": [{"name": "add"}]}, tokenizer)
    assert tokenizer.decode(sequence.token_ids).startswith("add<|im_start|>")
    assert runs(sequence, tokenizer) == ["Because.<|im_end|>\n"]


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day() -> None:
    tokenizer = tiny_tokenizer()
    dated = "{% set day = strftime_now(\"%d %B %Y\") %}{{ day + strftime_now( '/%m/' ) }}" + str(
        tokenizer.chat_template
    )
    for template in (dated, {"default": dated}):
        tokenizer.chat_template = template
        for each in (tokenizer, TokenizerWrapper(tokenizer)):
            sequence = one({"messages": CONVERSATIONS[0]}, each)
            assert tokenizer.decode(sequence.token_ids).startswith("26 July 2024/07/<|im_start|>")
            assert runs(sequence, tokenizer) == ["Because.<|im_end|>\n"]


def test_turns_whose_thoughts_are_dropped_are_still_found() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    sequence = one({"messages": [user("a"), assistant("one\n"), user("b"), assistant("two")]}, tokenizer)
    assert runs(sequence, tokenizer) == ["one\n<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"]


def test_turns_of_a_template_that_ends_all_messages_with_eos_are_trained_with_their_own_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = CLOSED_ONCE_TEMPLATE, "<|endoftext|>"
    messages = [user("Why?"), assistant("Because."), user("And?"), assistant("So.")]
    sequence = one({"messages": messages}, tokenizer)
    assert runs(sequence, tokenizer) == ["Because.<|im_end|>\n", "So.<|im_end|>\n<|endoftext|>"]
    assert runs(one({"messages": messages[:3]}, tokenizer), tokenizer) == ["Because.<|im_end|>\n"]


def test_turns_without_the_thought_that_the_generation_prompt_opens_are_trained() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OPENING_TEMPLATE
    sequence = one(
        {"messages": [user("a"), assistant("<b>"), user("b"), assistant("<think>\nHm.</think>\n\ntwo")]}, tokenizer
    )
    assert runs(sequence, tokenizer) == ["<b><|im_end|>\n", "two<|im_end|>\n"]
    tokenizer.chat_template = OPENING_TEMPLATE.replace(
        "m['content'].split",
        "('<think>\n\n</think>\n\n' if loop.last and loop.index0 % 2 else '') + m['content'].split",
    )  # Qwen3-Thinking: the last turn has one
    sequence = one({"messages": [user("a"), assistant("one"), user("b"), assistant("two")]}, tokenizer)
    assert runs(sequence, tokenizer) == ["one<|im_end|>\n", "\n</think>\n\ntwo<|im_end|>\n"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + THINKING_TEMPLATE,
        "{% for m in messages %}{{ m['content'] + ('</s>' if loop.last else '|') }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m['content'] + '|' }}{% endfor %}",
        HEADER_TEMPLATE.replace("m['content']", "m['content'] * 2"),
        HEADER_TEMPLATE.replace("m['content']", "m['content'][4:]"),
        LINES_TEMPLATE + "{{ messages | map(attribute='content') | join | length }}",
    ],
)
def test_a_template_that_rewrites_what_came_before_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: the chat template renders .* up to messages\[1\] differently"):
        one({"messages": [user("a"), assistant("one"), user("b"), assistant("two")]}, tokenizer)


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (HEADER_TEMPLATE, "one", "two|"),
        (LINES_TEMPLATE, "one", "\n(last)\ntwo\n"),
        (RETURN_TEMPLATE, "one", "<|im_start|>final\ntwo<|endoftext|>"),
        (STEPS_TEMPLATE, "one", "two<|im_end|>\n"),
    ],
)
def test_a_turn_that_is_rendered_otherwise_once_more_follows_is_trained_on_its_content(
    template: str, first: str, last: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [user("a"), assistant("one"), user("b"), assistant("two")]
    assert runs(one({"messages": messages}, tokenizer), tokenizer) == [first, last]
    with pytest.raises(DatasetError, match=r"up to messages\[1\] differently"):
        one({"messages": [user("a"), assistant("one") | {"reasoning": "So?"}, *messages[2:]]}, tokenizer)


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: the chat template refuses the messages: roles must alternate"):
        one({"messages": CONVERSATIONS[0]}, tokenizer)


def test_templates_of_which_none_is_the_default_are_refused_in_one_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"other": "{{ strftime_now('%Y') }}"}
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: the chat template refuses the messages: "):
        one({"messages": CONVERSATIONS[0]}, tokenizer)


def test_a_conversation_that_begins_with_the_assistant_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"messages\[0\] is an assistant turn, expected a system or user message"):
        one({"messages": [assistant("Hello!"), user("Hi")]}, tiny_tokenizer())


def test_a_long_document_is_cut_and_the_cut_is_counted() -> None:
    tokenizer, report = tiny_tokenizer(), TokenizeReport()
    whole = one({"messages": CONVERSATIONS[1]}, tokenizer)
    length = len(whole.token_ids)
    documents = [Document({"messages": CONVERSATIONS[1]}, "a.jsonl:1")]
    (cut,) = tokenize(documents, tokenizer, length - 3, report)
    assert cut.token_ids.tolist() == whole.token_ids[:-3].tolist()
    assert cut.trained.tolist() == whole.trained[:-3].tolist()
    assert cut.truncated == 3
    assert report == TokenizeReport(1, length - 3, int(whole.trained[:-3].sum()), 1, 3, 0)
    assert (one({"messages": CONVERSATIONS[1]}, tokenizer, length).truncated, whole.truncated) == (0, 0)


def test_documents_with_nothing_to_train_are_skipped_and_counted() -> None:
    rows: Sequence[dict[str, Any]] = (
        {"text": ""},
        {"text": "ab"},
        {"messages": [user("nobody answers")]},
        {"messages": [user("cut before the answer, which comes too late"), assistant("yes")]},
    )
    report = TokenizeReport()
    documents = [Document(row, f"a.jsonl:{i}") for i, row in enumerate(rows, start=1)]
    (kept,) = tokenize(documents, tiny_tokenizer(), 8, report)
    assert kept.where == "a.jsonl:2"
    assert report == TokenizeReport(4, len(kept.token_ids), len(kept.token_ids) - 1, 0, 0, 3, trained_beyond=1)


def test_a_max_length_without_a_position_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length is 1, expected at least 2.* type --max-seq-length 2048"):
        one({"text": "Once."}, tiny_tokenizer(), 1)


def test_a_tokenizer_without_offsets_is_refused_for_chats() -> None:
    class Slow:
        is_fast = False
        chat_template = "{{ messages }}"

        def __call__(self) -> None: ...

    with pytest.raises(ModelError, match="Slow gives no character offsets"):
        one({"messages": CONVERSATIONS[0]}, Slow())


def test_the_line_about_a_dataset_says_what_was_cut_skipped_and_equal() -> None:
    report = TokenizeReport(5, 4_000, 3_990, truncated_documents=1, truncated_tokens=7, skipped_documents=1)
    assert report.describe(different=3) == (
        "5 documents, 4,000 tokens, 3,990 trained positions; 1 equal to an earlier one; "
        "1 cut at --max-seq-length (7 tokens dropped); 1 skipped: nothing to train on"
    )
    assert "equal" not in report.describe()


def test_documents_of_which_the_cut_leaves_the_prompt_alone_are_told_by_its_flag() -> None:
    rows = [
        {"prompt": "What runs once, and only once?", "completion": "A"},
        {"prompt": "a", "completion": "The teacher."},
    ]
    for length, skipped in ((24, 1), (3, 2)):
        documents, report = [Document(row, "a.jsonl:1") for row in rows], TokenizeReport()
        list(tokenize(documents, tiny_tokenizer(), length, report))
        assert (report.skipped_documents, report.trained_beyond) == (skipped, skipped)
    with pytest.raises(
        DatasetError, match=r"type --max-seq-length above 3, after which 2 of them have one, or --dataset"
    ):
        read_sequences(documents, tiny_tokenizer(), 3, TokenizeReport(), quiet=True)
    assert report.describe().endswith("2 skipped: nothing to train on, in 2 before --max-seq-length")


def test_without_a_masked_prompt_every_token_is_trained() -> None:
    row = {"prompt": "What runs once?", "completion": "The teacher."}
    (masked,), (whole,) = (
        list(tokenize([Document(row, "a.jsonl:1")], tiny_tokenizer(), 64, mask_prompt=mask)) for mask in (True, False)
    )
    assert (masked.token_ids == whole.token_ids).all() and whole.trained.all() and not masked.trained.all()


def test_a_document_without_a_token_is_skipped_with_and_without_a_masked_prompt() -> None:
    tokenizer, report = tiny_tokenizer(), TokenizeReport()
    tokenizer.eos_token = None
    for mask in (True, False):
        assert not list(tokenize([Document({"text": ""}, "a.jsonl:1")], tokenizer, 64, report, mask_prompt=mask))
    assert report.skipped_documents == 2
