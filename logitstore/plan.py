"""Which documents go into which shard and which teacher batch, of those that are still to do.

Both are greedy walks over a fixed order, cut where a limit is reached. So what is planned after an interruption
continues what was planned before it, batch for batch, and the finished store has the same bytes. Of a dataset no more
than two shards' documents are held at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence

SHARD_POSITIONS = 262_144
SHARD_HIDDEN_BYTES = 256 << 20
"""Hidden states of one shard: it is held in memory until it is written."""


def shard_positions(recipe: Recipe) -> int:
    """How many positions make a shard: SHARD_POSITIONS, or as many as have SHARD_HIDDEN_BYTES of hidden states."""
    return min(SHARD_POSITIONS, max(1, SHARD_HIDDEN_BYTES // max(recipe.hidden_width, 1)))


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


def windows(
    sequences: Iterable[TokenSequence], wanted: Callable[[bytes], bool], positions: int | None = None
) -> Iterator[dict[bytes, TokenSequence]]:
    """Cut the wanted documents, in their order, into windows of so many positions or more: a shard each.

    Equal documents count once: `wanted` is asked for each, and is not expected to know of those that were given in the
    last window.

    Args:
        positions: by default SHARD_POSITIONS; see `shard_positions`.
    """
    positions = positions or SHARD_POSITIONS
    window: dict[bytes, TokenSequence] = {}
    last: dict[bytes, TokenSequence] = {}
    room = positions
    for sequence in sequences:
        key = document_key(sequence.token_ids)
        if key in window or key in last or not wanted(key):
            continue
        window[key] = sequence
        room -= len(sequence.trained)
        if room <= 0:
            yield window
            window, last, room = {}, window, positions
    if window:
        yield window


def window_count(positions: Iterable[int], most: int | None = None) -> int:
    """How many windows of `most` positions documents of so many positions each make."""
    count, room = 0, 0
    for more in positions:
        if room <= 0:
            count, room = count + 1, most or SHARD_POSITIONS
        room -= more
    return count


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
