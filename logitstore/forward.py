"""Documents through a causal language model: the logits of each document's positions, some at a time.

The teacher and the evaluation of students both read a model through this. Position t reads tokens 0 .. t and no others.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from distill_kernels import Head

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from logitstore.trace import traced

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
    for parts in document_outputs(head, documents, (), rows):
        yield (logits for logits, _ in parts)


def document_outputs(
    head: Head, documents: Sequence[npt.NDArray[np.int32]], layers: Sequence[int], rows: int | None = None
) -> Iterator[Iterator[tuple[mx.array, mx.array | None]]]:
    """The same, and beside each part the outputs of these layers [n, layers, D] in the same forward pass; else None.

    Raises:
        ConfigError, ModelError: as `trace.traced`.
    """
    tokens = np.zeros((len(documents), max(map(len, documents)) - 1), np.int32)
    for row, token_ids in zip(tokens, documents, strict=True):
        row[: len(token_ids) - 1] = token_ids[:-1]  # the last token predicts nothing that is known
    split = head.reason is None
    tracing: AbstractContextManager[dict[int, mx.array]] = traced(head.model, layers) if layers else nullcontext({})
    with tracing as found:
        outputs = head.trunk(mx.array(tokens)) if split else head.model(mx.array(tokens))
        hidden = [found[number] for number in layers]
        mx.eval(outputs, hidden)
    for i, token_ids in enumerate(documents):
        n = len(token_ids) - 1
        inner = mx.stack([layer[i, :n] for layer in hidden], axis=1) if hidden else None
        yield _parts(head if split else None, outputs[i, :n], inner, rows)


def _parts(
    head: Head | None, output: mx.array, inner: mx.array | None, rows: int | None
) -> Iterator[tuple[mx.array, mx.array | None]]:
    """Parts of one document's logits, from its last hidden states or, with no head, from the logits themselves."""
    if rows is None:
        width = (output if head is None else head(output[:1])).shape[-1]  # known without computing it
        rows = logit_rows(width)
    for at in range(0, len(output), rows):
        part = output[at : at + rows]
        yield part if head is None else head(part), None if inner is None else inner[at : at + rows]
