"""Targets of mlx-lm's `dwq`: a folder with one safetensors file per training batch, and no tokens.

``{split}/{i:010d}.safetensors`` holds, of batch i as mlx-lm's `iterate_batches` gave it, `logits` [B, T, K] and
`indices` u32 [B, T, K]: the K = 1,024 largest raw logits of each position, unsorted, where T is the padded length less
one. Row t is about token t + 1. The sum over the vocabulary is not recorded, so log-probs are over the kept entries.
Which tokens a batch held depends on dataset, tokenizer, seed, batch size and length: the caller brings them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from logitstore.errors import DatasetError
from logitstore.foreign.alignment import aligned
from logitstore.foreign.document import ForeignDocument, ForeignSource, foreign_document, log_sum_exp
from logitstore.foreign.tensors import FLOATS, TensorFile

_PAD_TO = 32  # mlx-lm pads to one more than a multiple of this, or to its longest allowed length
_ADVICE = "give the batches of the same dataset, tokenizer, seed, batch size and length, in mlx-lm's order"

Batch = Sequence[Sequence[int]]
"""The token ids of a batch's rows, without padding."""


def read_dwq(
    path: Path, *, token_batches: Iterable[Batch], split: str = "train", check_alignment: bool = True
) -> ForeignSource:
    """Open a folder of targets, or the target folder above it.

    Args:
        token_batches: one batch for each file, in order; rows as they were fed, cut at the longest allowed length.
        split: which folder of a target folder: "train" or "valid".

    Raises:
        DatasetError: no targets there, or files of some batches are missing.
    """
    folder = path / split if (path / split).is_dir() else path
    files = sorted(folder.glob("[!.]*.safetensors"))  # no ._NAME, which macOS puts beside a file
    if not files:
        raise DatasetError(f"{folder} holds no .safetensors files, expected dwq's targets; type its target folder")
    for i, file in enumerate(files):
        if file.name != f"{i:010d}.safetensors":
            raise DatasetError(f"{folder}: found {file.name}, expected {i:010d}.safetensors; compute the targets again")
    with TensorFile(files[0]) as tensors:
        top_k = tensors.shape("logits", FLOATS, 3)[2]
    documents = _documents(files, token_batches)
    return ForeignSource(
        format="dwq",
        documents=aligned(documents, _ADVICE) if check_alignment else documents,
        unknown=(
            "teacher",
            "tokenizer",
            "row order",
            "tail mass",
            "label log-prob where the label was not kept",
            "entropy",
            "whether all batches are there",
        ),
        known={"top_k": top_k, "files": len(files)},
    )


def _documents(files: Sequence[Path], token_batches: Iterable[Batch]) -> Iterator[ForeignDocument]:
    given = iter(token_batches)
    for number, file in enumerate(files):
        batch = next(given, None)
        if batch is None:
            raise DatasetError(f"{file}: found {number} batches of tokens for {len(files)} files; {_ADVICE}")
        with TensorFile(file) as tensors:
            shape = tensors.shape("logits", FLOATS, 3)
            if tensors.shape("indices", ("U32",), 3) != shape:
                raise DatasetError(f"{file}: logits and indices differ in shape; compute the targets again")
            _require_fit(file, shape, [len(row) for row in batch])
            for b, row in enumerate(batch):
                if len(row) < 2:
                    continue
                positions = slice(0, len(row) - 1)  # the one shift: row t is about token t + 1; padding after
                logits, ids = tensors.row("logits", b)[positions], tensors.row("indices", b)[positions]
                total = log_sum_exp(logits)
                with np.errstate(invalid="ignore"):
                    log_probs = logits - total[:, None]
                yield foreign_document(np.asarray(row, np.int64), ids, log_probs, f"{file.name} row {b}")
    if next(given, None) is not None:
        raise DatasetError(f"{files[-1]} is the last file, but more batches of tokens were given; {_ADVICE}")


def _require_fit(file: Path, shape: tuple[int, ...], lengths: list[int]) -> None:
    """Raise where this many rows of these lengths do not make mlx-lm's padded batch of B rows and T + 1 columns."""
    rows, width = shape[0], shape[1]
    longest = max(lengths, default=0)
    if rows != len(lengths) or not longest - 1 <= width <= -(-longest // _PAD_TO) * _PAD_TO:
        raise DatasetError(
            f"{file}: found targets for {rows} rows of {width + 1} columns, expected {len(lengths)} rows, the longest "
            f"of {longest} tokens; {_ADVICE}"
        )
