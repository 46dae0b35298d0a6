"""Part of `torture_store`: one process writes a store, eight read it, and every read is right.

A document says in its first tokens which one it is, so that a reader computes anew what any read must give.
"""

import mmap
import os
import random
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.contract import Store
from logitstore.recipe import DocumentRecord
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from tests.children import bounded, finish, forked, scratch
from tests.stores import VOCAB, VOCABULARY, guessed, manifest, tokens

READERS = 8
OPENED_EVERY, CLOSED_EVERY = 40, 60
MORE_BYTES = 1 << 30
_COUNT = struct.Struct("<Q")


@dataclass
class Crowd:
    """What a crowd did in some seconds."""

    seconds: float
    written: int
    """Documents."""
    reads: int
    openings: int
    positions: int


class Shared:
    """Numbers that processes share: what has been written, and for each reader what it did."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _COUNT.size * (1 + 3 * READERS))

    def __getitem__(self, at: int) -> int:
        return int(_COUNT.unpack_from(self.memory, at * _COUNT.size)[0])

    def __setitem__(self, at: int, value: int) -> None:
        _COUNT.pack_into(self.memory, at * _COUNT.size, value)


def token_ids_of(number: int) -> npt.NDArray[np.int32]:
    digits = [number // VOCAB**i % VOCAB for i in range(3)]
    return np.concatenate([np.array(digits, np.int32), tokens(number, 5 + number % 60)])


def document(number: int) -> DocumentRecord:
    return guessed(token_ids_of(number), manifest().recipe, np.random.default_rng(number))


def crowd(suffix: str, seconds: float) -> Crowd:
    """Let one write and eight read for so long.

    Raises:
        SystemExit: a read was wrong, or a process ended early.
    """
    shared, begun = Shared(), time.monotonic()
    until = begun + seconds
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / f"s{suffix}"
        finish(forked(lambda: create_store(path, manifest(), VOCABULARY)))
        limit = round(seconds) + 60
        children = [forked(lambda: write(path, shared, until, limit))]
        children += [forked(lambda n=n: read(path, shared, n, until, limit)) for n in range(READERS)]
        finish(*children)
        elapsed = time.monotonic() - begun
        finish(forked(lambda: check(path, shared[0])))
    sums = [sum(shared[1 + 3 * n + i] for n in range(READERS)) for i in range(3)]
    return Crowd(elapsed, shared[0], *sums)


def write(path: Path, shared: Shared, until: float, limit: int) -> None:
    bounded(MORE_BYTES, limit)
    number = 0
    while time.monotonic() < until:
        with open_store(path).writer("write-back") as writer:
            for _ in range(CLOSED_EVERY):
                batch = [document(number + i) for i in range(4)]
                writer.append(batch)
                writer.commit(list(writer.pending))
                number += len(batch)
                shared[0] = number
                if time.monotonic() > until:
                    break


def read(path: Path, shared: Shared, reader: int, until: float, limit: int) -> None:
    bounded(MORE_BYTES, limit)
    rng, reads, openings, positions = random.Random(reader), 0, 0, 0
    store: Store | None = None
    while time.monotonic() < until:
        written = shared[0]
        if not written:
            time.sleep(0.01)
            continue
        if store is None or rng.randrange(OPENED_EVERY) == 0:
            store, openings = open_store(path), openings + 1
        else:
            store.refresh()
        numbers = [rng.randrange(written) for _ in range(4)]
        asked = [token_ids_of(n) for n in (*numbers, written + 100_000)]
        *found, missed = store.codes(asked)
        assert missed is None, "an answer that nobody wrote"
        expected = document(numbers[0])
        require(store, expected)
        for codes, token_ids in zip(found, asked, strict=False):
            assert codes is not None and len(codes.tail) == len(token_ids) - 1, "a document is lost"
        record = store.record(rng.randrange(len(store)))
        number = sum(int(digit) * VOCAB**i for i, digit in enumerate(record.token_ids[:3]))
        assert (record.records == document(number).records).all(), "a number is wrong"
        assert store.answered(np.append(expected.token_ids, 0)) in (0, len(expected.token_ids) - 1)
        reads += len(asked) + 2
        positions += sum(map(len, asked[:4])) + len(record.records)
    for i, value in enumerate((reads, openings, positions)):
        shared[1 + 3 * reader + i] = value


def require(store: Store, expected: DocumentRecord) -> None:
    found, right = store.get(expected.token_ids), store.manifest.recipe.read(expected.records)
    assert found is not None, "a document is lost"
    for name in ("ids", "weights", "head_count", "label_log_prob", "entropy", "log_tail_mass"):
        assert getattr(found, name).tobytes() == getattr(right, name).tobytes(), "a number is wrong"


def check(path: Path, written: int) -> None:
    store = open_store(path)
    assert len(store) == written and all(document(n).key in store for n in range(written)), "a document is lost"
    assert not verify(path, quiet=True).problems, os.fspath(path)
