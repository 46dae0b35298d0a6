"""Reads a dataset as the student does and, where the teacher is asked in other words, as the teacher does."""

from collections.abc import Sequence
from dataclasses import replace

from distill_trainer.config import TrainConfig
from logitstore.asked import align
from logitstore.documents import read_documents
from logitstore.errors import DatasetError
from logitstore.prompts import prompted
from logitstore.sequences import TokenizeReport, TokenSequence, read_sequences, tokenize

UNCUT = 1 << 31


def read_both(
    config: TrainConfig, dataset: str, split: str, columns: Sequence[str], tokenizer: object, report: TokenizeReport
) -> list[TokenSequence]:
    """The student's token sequences of a dataset; with what the teacher is asked, where that is something else.

    Raises:
        DatasetError: a malformed row, a row without a prompt for the template, a completion that the two prompts
            tokenise differently.
        ConfigError, ModelError: as `tokenize`.
    """
    rows = read_documents(dataset, split=split, columns=columns)
    sequences = read_sequences(
        prompted(rows, config.student_template),
        tokenizer,
        config.max_seq_length,
        report,
        quiet=config.quiet,
        columns=columns,
        mask_prompt=config.mask_prompt,
    )
    if config.teacher_template == config.student_template:
        return sequences
    numbers = {sequence.where: number for number, sequence in enumerate(sequences)}
    again = prompted(read_documents(dataset, split=split), config.teacher_template)
    for other in tokenize(again, tokenizer, UNCUT):
        number = numbers.pop(other.where, None)
        if number is None:  # skipped: cut at the student's length, nothing of it is trained
            continue
        one = sequences[number]
        asked = align(
            one.token_ids,
            one.trained,
            other.token_ids,
            other.trained,
            one.where,
            cut_at=config.max_seq_length if one.truncated else None,
        )
        sequences[number] = replace(one, asked=asked)
    if numbers:
        raise DatasetError(f"{next(iter(numbers))} is there no more when {dataset} is read again; type it again")
    return sequences
