"""Documents through a causal language model: the logits of each document's positions, some at a time.

The teacher and the evaluation of students both read a model through this. Position t reads tokens 0 .. t and no others.
"""

from collections.abc import Iterator, Sequence

from distill_kernels import Head

import mlx.core as mx
import numpy as np
import numpy.typing as npt

LOGIT_ROWS = 512
"""Positions whose logits exist at one time: 100 MB of float32 at V = 49,152."""


def document_logits(head: Head, documents: Sequence[npt.NDArray[np.int32]]) -> Iterator[Iterator[mx.array]]:
    """Run documents of token ids [L] as one batch; for each, yield the logits of its L - 1 positions in parts [n, V].

    A model whose head cannot be split off (`head.reason`) makes the whole batch's logits at once.
    """
    tokens = np.zeros((len(documents), max(map(len, documents)) - 1), np.int32)
    for row, token_ids in zip(tokens, documents, strict=True):
        row[: len(token_ids) - 1] = token_ids[:-1]  # the last token predicts nothing that is known
    split = head.reason is None
    outputs = head.trunk(mx.array(tokens)) if split else head.model(mx.array(tokens))
    mx.eval(outputs)
    for output, token_ids in zip(outputs, documents, strict=True):
        stop = len(token_ids) - 1
        parts = (output[at : min(at + LOGIT_ROWS, stop)] for at in range(0, stop, LOGIT_ROWS))
        yield (head(part) if split else part for part in parts)
