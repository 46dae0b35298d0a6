"""What a service answers about documents, as bytes: a frame for each, as soon as it is known.

    frame   document u32, kind u8, payload bytes u32, blake2b-128 of these 9 bytes and the payload; then the payload

`document` is its place among those that were asked for. A payload of HIT or TAUGHT is a record as FORMAT.md has it for
LMDB, with ids in the place of ranks; it may be of the document's first tokens alone. That of MISSING, FAILED and FULL
is a reason, UTF-8. WAIT says nothing: the answer is still being computed, and a proxy should not give up. The last
frame is END; an answer without it was cut, and what came before it holds.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from logitstore.errors import WireError
from logitstore.lmdb_records import Record, encode, most_record_bytes
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.streams import Ranks

MEDIA_TYPE = "application/vnd.logitstore.records"
MOST_REASON_BYTES = 1 << 12
MOST_WAITS = 1 << 13
"""In one answer: hours, at the pace of a service."""
NO_TABLE = (1 << 32) - 1
_HEAD = struct.Struct("<IBI")
_DIGEST_BYTES = 16


class Kind(IntEnum):
    """What a frame says of a document."""

    HIT = 0
    """The store had it."""
    TAUGHT = 1
    """The teacher has answered, and the store has it now."""
    MISSING = 2
    """The store has no answer, and nobody was asked."""
    FAILED = 3
    """The teacher cannot answer this one."""
    FULL = 4
    """Answered, and could not be kept; or a fault that passes: ask again later."""
    WAIT = 5
    END = 6


@dataclass(frozen=True, eq=False)
class Answer:
    """What a service says of a document."""

    document: int
    kind: Kind
    record: DocumentRecord | None = None
    """Of the document, or of its first tokens."""
    reason: str = ""

    def to_bytes(self, recipe: Recipe) -> bytes:
        """The frame."""
        if self.record is None:
            payload = self.reason[: MOST_REASON_BYTES // 4].encode(errors="replace")
        else:
            payload = encode(self.record, recipe, NO_TABLE, _rank_of(recipe.vocab_size))
        head = _HEAD.pack(self.document, self.kind, len(payload))
        return head + blake2b(head + payload, digest_size=_DIGEST_BYTES).digest() + payload


def read_answers(
    pieces: Iterable[bytes], documents: Sequence[npt.NDArray[np.integer]], recipe: Recipe
) -> Iterator[Answer]:
    """The answers in a stream of bytes, up to END; nothing is believed before its digest and its tokens fit.

    Args:
        documents: what was asked for.

    Raises:
        WireError: the stream was cut, or says what no service writes.
    """
    buffer = bytearray()
    more = iter(pieces)

    def take(count: int) -> bytes:
        while len(buffer) < count:
            piece = next(more, None)
            if piece is None:
                raise WireError("the answer was cut")
            buffer.extend(piece)
        taken = bytes(buffer[:count])
        del buffer[:count]
        return taken

    longest = max(map(len, documents), default=2) - 1
    most = MOST_REASON_BYTES + recipe_bytes(longest, recipe)
    for _ in range(MOST_WAITS + len(documents)):
        head = take(_HEAD.size)
        number, kind, size = _HEAD.unpack(head)
        if size > most:
            raise WireError(f"a frame of {size:,} bytes, where {most:,} are enough for every answer")
        digest, payload = take(_DIGEST_BYTES), take(size)
        if blake2b(head + payload, digest_size=_DIGEST_BYTES).digest() != digest:
            raise WireError("a frame that is not what was sent")
        if kind == Kind.END:
            return
        if kind == Kind.WAIT:
            continue
        yield _answer(number, kind, payload, documents, recipe)
    raise WireError("an answer that does not end")


def _answer(
    number: int, kind: int, payload: bytes, documents: Sequence[npt.NDArray[np.integer]], recipe: Recipe
) -> Answer:
    try:
        asked = documents[number]
        if kind not in (Kind.HIT, Kind.TAUGHT):
            return Answer(number, Kind(kind), reason=" ".join(payload.decode().split()))
        record = Record(payload, recipe, lambda _: _ids_as_ranks(recipe.vocab_size)).document()
        if not np.array_equal(record.token_ids, asked[: len(record.token_ids)]):
            raise ValueError("an answer about another document")
        return Answer(number, Kind(kind), record)
    except (ValueError, IndexError, struct.error) as error:
        raise WireError(f"an answer that cannot be read ({error})") from error


def recipe_bytes(positions: int, recipe: Recipe) -> int:
    """Bytes of a record of so many positions, which compression does not make longer than by a little."""
    parts = recipe.sets + 1 + len(recipe.hidden_layers)
    return parts * (most_record_bytes(positions, recipe) * 9 // 8 + 1024)


@lru_cache(maxsize=4)
def _ids_as_ranks(vocab_size: int) -> Ranks:
    return Ranks(np.empty(0, np.uint32), vocab_size)


@lru_cache(maxsize=4)
def _rank_of(vocab_size: int) -> npt.NDArray[np.uint32]:
    return _ids_as_ranks(vocab_size).table()
