"""Documents to token sequences: what the teacher reads and which positions the student is trained on.

Stands between the documents and the teacher, and before the key: build and training call the same function, so a
document has the same token ids in both. Token ids are those of mlx-lm, position for position, but for today's date
where a chat template writes that: here it is always the same day. Nothing is padded, packed or shuffled here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.asked import Asked
from logitstore.chat import encode_chat, has_chat_template
from logitstore.documents import Document, format_of
from logitstore.errors import ConfigError, DatasetError, ModelError, UnusableLogitsError
from logitstore.targets import SparseTargets


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
            if not has_chat_template(tokenizer):
                raise DatasetError(
                    f"{document.where}: found messages, but the tokenizer has no chat template; "
                    'use rows of {"text"} or {"prompt", "completion"}, or an instruct model'
                )
            return encode_chat(row["messages"], tools, tokenizer, document.where)
        case "completion" if has_chat_template(tokenizer):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            return encode_chat(messages, tools, tokenizer, document.where)
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
