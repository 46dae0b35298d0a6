"""A document and its targets as JSON values, for whoever draws them: `GET /v1/stores/NAME/documents/REF`.

Reads no store itself. Never NaN: what a store does not know is null.
"""

import codecs
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.inspect import NO_TOKEN
from logitstore.manifest import Manifest
from logitstore.measures import unknown_labels
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary

MOST_POSITIONS = 4096
"""Of one answer; a longer document is given a part at a time."""
MOST_ENTRIES = 64
"""Of a position: the largest of the head, then of the tail."""


def document_json(
    token_ids: npt.NDArray[np.int32],
    targets: SparseTargets,
    vocabulary: Vocabulary,
    manifest: Manifest,
    start: int = 0,
    count: int = MOST_POSITIONS,
) -> dict[str, Any]:
    """Positions start .. start + P - 1 of a document: position t is what the teacher said after tokens 0 .. t.

    ::

        token_ids  [P + 1]    from `start` on: the label of row i is token_ids[i + 1]
        pieces     [P + 1]    the tokens as they read one after another: a character stands where its last byte is
        texts      {id: text} of every token named here, read by itself; bytes that are no character as \\xNN
        surprise   [P]        -log p(label), nats, at temperature 1; null where it is not known
        entropy    [P]        nats, at temperature 1
        tail_mass  [P]        probability outside the head
        ids        [P][k]     kept entries, first the head and then the tail, each by falling weight
        weights    [P][k]     theirs
        probs      [P][k]     their own probabilities, where a store keeps those of the tail too; else null
        head       [P]        how many of the row are the head
        kept       [P]        how many entries there are; more than k where a row was cut at `MOST_ENTRIES`
    """
    shown = targets.rows(slice(start, start + count))
    ids_here = token_ids[start : start + len(shown) + 1].tolist()
    labels = np.asarray(ids_here[1:], np.int64)
    place, kept, head = _order(shown)
    ids = np.take_along_axis(shown.ids, place, axis=1)
    rows = np.minimum(kept, MOST_ENTRIES).tolist()
    unknown = unknown_labels(shown, labels, manifest)
    surprise = [None if lost else value for value, lost in zip(_rounded(-shown.label_log_prob), unknown, strict=True)]
    of_rows = [row[:n] for row, n in zip(ids.tolist(), rows, strict=True)]
    own = None if shown.log_probs is None else np.exp(shown.log_probs)
    named = sorted({*ids_here, *(token for row in of_rows for token in row)})
    return {
        "length": len(token_ids),
        "start": start,
        "token_ids": ids_here,
        "pieces": _pieces(vocabulary, token_ids, start, len(ids_here)),
        "texts": {str(token): _text(vocabulary, token) for token in named},
        "special": [token for token in named if token in vocabulary.special_ids],
        "surprise": surprise,
        "entropy": [None] * len(shown) if "entropy" in manifest.unknown else _rounded(shown.entropy),
        "tail_mass": _rounded(np.exp(shown.log_tail_mass)),
        "ids": of_rows,
        "weights": _rows(shown.weights, place, rows),
        "probs": None if own is None else _rows(own, place, rows),
        "head": np.minimum(head, MOST_ENTRIES).tolist(),
        "kept": kept.tolist(),
    }


def _order(
    targets: SparseTargets,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The places of a row's entries, head first, each part by falling weight and empty entries last [P, k]; how many
    are kept and how many are of the head [P].
    """
    kept = targets.weights > 0
    group = np.where(kept, np.where(targets.in_head, 0, 1), 2)
    order = np.lexsort((-targets.weights, group), axis=1)[:, :MOST_ENTRIES]
    return order, kept.sum(axis=1), (group == 0).sum(axis=1)


def _rows(values: npt.NDArray[np.float32], place: npt.NDArray[np.intp], counts: list[int]) -> list[list[float]]:
    ordered = np.take_along_axis(values, place, axis=1)
    return [_rounded(row[:n]) for row, n in zip(ordered, counts, strict=True)]


def _rounded(values: npt.NDArray[np.float32]) -> list[Any]:
    """To 4 digits: more than a store knows, and half of what JSON would spell."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _text(vocabulary: Vocabulary, token_id: int) -> str:
    return vocabulary.text(token_id) if token_id < len(vocabulary) else NO_TOKEN.format(token_id)


def _pieces(vocabulary: Vocabulary, token_ids: npt.NDArray[np.int32], start: int, count: int) -> list[str]:
    """The text between tokens; "" for a token that ends within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    first = max(start - 4, 0)  # a character has 4 bytes at most
    pieces = [
        decoder.decode(vocabulary.tokens[token]) if token < len(vocabulary) else decoder.decode(b"", final=True)
        for token in token_ids[first : start + count].tolist()
    ]
    pieces[-1] += decoder.decode(b"", final=start + count >= len(token_ids))
    return pieces[start - first :]
