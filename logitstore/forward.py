"""Documents through a causal language model: the logits of each document's positions, some at a time.

The teacher and the evaluation of students both read a model through this. Position t reads tokens 0 .. t and no others.
"""

from collections.abc import Iterator, Sequence

from distill_kernels import Head

import mlx.core as mx
import numpy as np
import numpy.typing as npt

LOGIT_BYTES = 96 << 20
"""Float32 logits that exist at one time: 512 positions at V = 49,152, 165 at V = 151,936."""


def logit_rows(vocab_size: int) -> int:
    """How many positions' logits fit LOGIT_BYTES; at least 16."""
    return max(16, LOGIT_BYTES // (4 * vocab_size))


def document_logits(
    head: Head, documents: Sequence[npt.NDArray[np.int32]], rows: int | None = None
) -> Iterator[Iterator[mx.array]]:
    """Run documents of token ids [L] as one batch; for each, yield the logits of its L - 1 positions in parts [n, V].

    A model whose head cannot be split off (`head.reason`) makes the whole batch's logits at once.

    Args:
        rows: n of a part; by default what `logit_rows` says for the model's V.
    """
    tokens = np.zeros((len(documents), max(map(len, documents)) - 1), np.int32)
    for row, token_ids in zip(tokens, documents, strict=True):
        row[: len(token_ids) - 1] = token_ids[:-1]  # the last token predicts nothing that is known
    split = head.reason is None
    outputs = head.trunk(mx.array(tokens)) if split else head.model(mx.array(tokens))
    mx.eval(outputs)
    for output, token_ids in zip(outputs, documents, strict=True):
        yield _parts(head if split else None, output[: len(token_ids) - 1], rows)


def _parts(head: Head | None, output: mx.array, rows: int | None) -> Iterator[mx.array]:
    """Parts of one document's logits, from its hidden states or, with no head, from the logits themselves."""
    if rows is None:
        width = (output if head is None else head(output[:1])).shape[-1]  # known without computing it
        rows = logit_rows(width)
    for at in range(0, len(output), rows):
        part = output[at : at + rows]
        yield part if head is None else head(part)
