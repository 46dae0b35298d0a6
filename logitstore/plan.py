"""Which documents go into which shard and which teacher batch: pure functions of the documents that are still to do.

Both are greedy walks over a fixed order, cut where a limit is reached. So what is planned after an interruption
continues what was planned before it, batch for batch, and the finished store has the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.sequences import TokenSequence

SHARD_POSITIONS = 262_144


@dataclass(frozen=True)
class Part:
    """The I-th of N disjoint parts of a build, I from 1: documents belong to a part by their key."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/4".

        Raises:
            ConfigError: not two numbers, or not 1 <= I <= N.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= index <= count:
            raise ConfigError(
                f"shard {text!r} is not I/N with I from 1 to N; type --shard 1/2 here and --shard 2/2 elsewhere"
            )
        return cls(index, count)

    def holds(self, key: bytes) -> bool:
        """Whether the document with this key belongs to this part."""
        return int.from_bytes(key[8:], "little") % self.count == self.index - 1


def unique(sequences: Sequence[TokenSequence]) -> dict[bytes, TokenSequence]:
    """Documents by key, in dataset order; of equal ones the first."""
    found: dict[bytes, TokenSequence] = {}
    for sequence in sequences:
        found.setdefault(document_key(sequence.token_ids), sequence)
    return found


def plan_shards(documents: dict[bytes, TokenSequence]) -> list[list[bytes]]:
    """Cut documents, in their order, into shards of at least SHARD_POSITIONS positions (the last may be smaller)."""
    shards: list[list[bytes]] = []
    room = 0
    for key, sequence in documents.items():
        if room <= 0:
            shards.append([])
            room = SHARD_POSITIONS
        shards[-1].append(key)
        room -= len(sequence.trained)
    return shards


def plan_batches(documents: dict[bytes, TokenSequence], batch_tokens: int) -> list[list[bytes]]:
    """Group documents, longest first, into teacher batches of at most batch_tokens padded tokens, or of one document.

    Longest first, so that memory is at its highest in the first batch, and batches are padded little.
    """
    batches: list[list[bytes]] = []
    longest = 0
    for key in sorted(documents, key=lambda key: (-len(documents[key].token_ids), key)):
        length = len(documents[key].token_ids)
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = length
        batches[-1].append(key)
    return batches
