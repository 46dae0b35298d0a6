"""Damage an LMDB store at random, each time for a process of its own, and say how that ended; run by `test_lmdb_store`.

    python -m tests.lmdb_damage FOLDER SEED ROUNDS

A round flips a bit or cuts the file; then a child opens it, looks every document up, and writes two more. It prints
`noticed` or `right`, or what else became of it.
"""

import os
import random
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from logitstore.errors import StoreError
from logitstore.lmdb_store import LmdbStore
from logitstore.recipe import DocumentRecord
from tests.stores import VOCABULARY, manifest, records

DOCUMENTS = [*records([7, 40, 300, 600, 33], seed=1), *records([5] * 70, seed=2)]
MORE = records([30, 500], seed=3)
EXPECTED = {document.key: manifest().recipe.read(document.records) for document in (*DOCUMENTS, *MORE)}
ENOUGH_BYTES = 1 << 30
TIME_S = 20


def write(path: Path, batches: Sequence[Sequence[DocumentRecord]]) -> None:
    store = LmdbStore.create(path, manifest(), VOCABULARY)
    with store.writer("build") as writer:
        for batch in batches:
            writer.append(batch)


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    kind = rng.choice(["cut", "anywhere", "anywhere", "anywhere", "meta", "number"])
    at = rng.randrange(len(data))
    if kind == "cut":
        return data[:at], f"cut at {at}"
    if kind == "meta":
        at = 4096 * rng.randrange(2) + rng.randrange(160)
    if kind == "number":  # the header of a page, and the first of its offsets
        at = at // 4096 * 4096 + rng.randrange(40)
    bit = rng.randrange(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"bit {bit} of byte {at}"


def look(path: Path) -> str:
    try:
        store = LmdbStore(path)
        require_all(store, DOCUMENTS)
        assert len(store) == len(DOCUMENTS) and store.vocabulary == VOCABULARY
        with store.writer("more") as writer:
            writer.append(MORE)
        require_all(store, [*DOCUMENTS, *MORE])
    except StoreError:
        return "noticed"
    return "right"


def require_all(store: LmdbStore, documents: Sequence[DocumentRecord]) -> None:
    assert all(document.key in store for document in documents), "a document is lost"
    for document in [*documents[:5], *documents[5::8], *documents[-2:]]:
        found, expected = store.get(document.token_ids), EXPECTED[document.key]
        assert found is not None, "a document is lost"
        for name in ("ids", "weights", "head_count", "label_log_prob", "entropy"):
            assert (getattr(found, name) == getattr(expected, name)).all(), "a number is wrong"


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def child(path: Path) -> None:
    signal.alarm(TIME_S)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + ENOUGH_BYTES, -1))
    try:
        say(look(path))
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def main(folder: Path, seed: int, rounds: int) -> None:
    rng, whole = random.Random(seed), folder / "whole.lmdb"
    making = os.fork()  # so that no environment of LMDB's is inherited
    if making == 0:
        write(whole, [DOCUMENTS[:5], *([document] for document in DOCUMENTS[5:20]), DOCUMENTS[20:]])
        os._exit(0)
    os.waitpid(making, 0)
    data = whole.read_bytes()
    for round_ in range(rounds):
        path = folder / f"{round_}.lmdb"
        content, what = damaged(data, rng)
        path.write_bytes(content)
        pid = os.fork()
        if pid == 0:
            child(path)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            say(f"{what} ended with {status}")
        for left in folder.glob(f"*{round_}.lmdb*"):
            left.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
