"""Part of `torture_store`: one byte of a store is flipped or cut, and a process of its own reads all of it.

Every damage is noticed before a number is used, or the answers are right all the same; nothing crashes, hangs or takes
more than 1 GB. The child that reads has 1 GB beyond what it begins with, and 20 s.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt

from logitstore.contract import Store
from logitstore.errors import StoreError
from logitstore.journal import ShardWriter
from logitstore.recipe import DocumentRecord
from logitstore.saved_maps import save_vocabulary_map, saved_vocabulary_map
from logitstore.sealed import GROUP
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import VocabularyMap, map_vocabularies
from logitstore.zarr_store import MAP_PREFIX, ZarrStore
from tests.children import bounded, finish, forked, scratch
from tests.stores import VOCABULARY, contents, manifest, records

DOCUMENTS = [*records([7, 40, 300, 600, 33], seed=1), *records([5] * 60, seed=2)]
PENDING = records([9, 30], seed=3)
FIDELITY = {"positions": 5, "kl_floor": 0.25}
MAP = map_vocabularies(VOCABULARY, Vocabulary((*VOCABULARY.tokens[::2], b"<", b"1", b">"), frozenset(), None, None))
MORE_BYTES, MOST_S = 1 << 30, 20
ENDINGS = {0: "right", 10: "noticed", 11: "noticed, but not by verify", 12: "right, and verify names it"}
GOOD = ("right", "noticed", "right, and verify names it")


@dataclass
class Tally:
    """What became of the damages to one kind of file."""

    flips: int = 0
    noticed: int = 0
    right: int = 0
    bad: int = 0
    most_mb: int = 0


def flips(count: int, seed: int) -> tuple[dict[str, Tally], list[str]]:
    """Damage stores `count` times: a tally by kind of file, and a line for each damage that ended badly."""
    rng, tallies, bad = random.Random(seed), defaultdict[str, Tally](Tally), list[str]()
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        home = Path(folder)
        finish(forked(lambda: make(home)))
        kinds = kinds_of(home)
        running: dict[int, tuple[str, str, Path]] = {}
        trials = trials_of(kinds, home, count, rng)
        while True:
            while len(running) < (os.cpu_count() or 1) and (trial := next(trials, None)):
                kind, what, path = trial
                running[forked(lambda path=path: child(path))] = kind, what, path
            if not running:
                break
            pid, status, usage = os.wait4(-1, 0)
            kind, what, path = running.pop(pid)
            for left in path.parent.glob(f"{path.stem}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for left in path.parent.glob(f".{path.stem}*"):
                left.unlink()
            ending = ENDINGS.get(code := os.waitstatus_to_exitcode(status), f"ended with {code}")
            tally = tallies[kind]
            tally.flips += 1
            tally.noticed += ending == "noticed"
            tally.right += ending.startswith("right")
            tally.most_mb = max(tally.most_mb, usage.ru_maxrss >> (20 if sys.platform == "darwin" else 10))
            if ending not in GOOD:
                tally.bad += 1
                bad.append(f"{kind}: {what}: {ending}")
    return dict(tallies), bad


def make(home: Path) -> None:
    """The stores that are damaged: a folder with index, fidelity and journal, a zip file of it, an LMDB file."""
    store = ZarrStore.create(home / "whole.zarr", manifest(), VOCABULARY)
    store.write_documents(DOCUMENTS[:5])
    store.write_documents(DOCUMENTS[5:])
    store.save_index()
    store.save_fidelity(FIDELITY)
    save_vocabulary_map(store, MAP)
    with ZipFile(home / "whole.zip", "w") as archive:
        for name, data in contents(store.folder).items():
            archive.writestr(name, data)
    with suppress(KeyboardInterrupt), ShardWriter(store, "build") as writer:
        for document in PENDING:
            writer.append([document])
        raise KeyboardInterrupt
    other = create_store(home / "whole.lmdb", manifest(), VOCABULARY)
    with other.writer("build") as writer:
        for batch in (DOCUMENTS[:5], *([document] for document in DOCUMENTS[5:30]), DOCUMENTS[30:]):
            writer.append(batch)
    other.save_fidelity(FIDELITY)


def kinds_of(home: Path) -> dict[str, list[str]]:
    """The files of the stores, by kind."""
    kinds = defaultdict[str, list[str]](list)
    for name in contents(home / "whole.zarr"):
        parts = name.split("/")
        parts[0] = "map" if parts[0].startswith(MAP_PREFIX) else parts[0]
        if name.startswith(".journal"):
            kind = "journal"
        elif parts[0] == "shards" and len(parts) > 2:
            kind = "shard " + (GROUP if len(parts) == 3 else f"{parts[2]}{' ' + GROUP if parts[3] == GROUP else ''}")
        else:
            kind = f"{parts[0]} {GROUP}" if parts[-1] == GROUP and len(parts) > 1 else parts[0]
        kinds[kind].append(f"whole.zarr/{name}")
    return {**kinds, "zip": ["whole.zip"], "LMDB": ["whole.lmdb"], "LMDB pages": ["whole.lmdb"]}


def trials_of(
    kinds: dict[str, list[str]], home: Path, count: int, rng: random.Random
) -> Iterator[tuple[str, str, Path]]:
    """Damage copies, every kind in turn; of a zip and an LMDB file, in which everything lies, four times as often."""
    order = [kind for kind in kinds for _ in range(4 if kind in ("zip", "LMDB", "LMDB pages") else 1)]
    for number in range(count):
        kind = order[number % len(order)]
        source = Path(rng.choice(kinds[kind]))
        copy = home / f"{number}{Path(source.parts[0]).suffix}"
        whole = home / source.parts[0]
        shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)
        file = copy.joinpath(*source.parts[1:])
        data = bytearray(file.read_bytes())
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        if kind == "LMDB pages":  # their headers, and the two meta pages
            at = rng.choice([at // 4096 * 4096 + rng.randrange(40), 4096 * rng.randrange(2) + rng.randrange(160)])
        if rng.random() < 0.2:
            del data[at:]
            what = f"{source} cut at {at:,}"
        else:
            data[at] ^= 1 << bit
            what = f"{source} bit {bit} of byte {at:,}"
        file.write_bytes(data)
        yield kind, what, copy


def child(path: Path) -> None:
    """Read a damaged store, and say by the exit code how that went."""
    bounded(MORE_BYTES, MOST_S)
    try:
        named = bool(verify(path, quiet=True).problems)
    except StoreError:
        named = True
    try:
        look(path)
    except StoreError:
        os._exit(10 if named else 11)
    os._exit(12 if named else 0)


def look(path: Path) -> None:
    """Ask for everything; each answer is right, or an error. Raise the first error when all has been asked."""
    store, errors = open_store(path), list[StoreError]()

    def ask(question: Callable[[], None]) -> None:
        try:
            question()
        except StoreError as error:
            errors.append(error)

    known = {document.key: document.records for document in DOCUMENTS}
    for document in DOCUMENTS:
        ask(lambda document=document: require(store, document.token_ids, document.records))
    ask(lambda: require(store, DOCUMENTS[3].token_ids[:200], DOCUMENTS[3].records[:199]))
    for number in range(len(store)):
        ask(lambda number=number: require_known(store.record(number), known))
    ask(lambda: require_equal(store.vocabulary, VOCABULARY))
    ask(lambda: require_equal(store.fidelity or FIDELITY, FIDELITY))
    ask(lambda: require_map(saved_vocabulary_map(store, MAP.student_fingerprint)))
    if path.is_dir():
        ask(lambda: take_over(store))
    if errors:
        raise errors[0]
    assert len(store) >= len(DOCUMENTS), "a document is lost"


def require(store: Store, token_ids: npt.NDArray[np.int32], records: npt.NDArray[np.uint8]) -> None:
    found, expected = store.get(token_ids), store.manifest.recipe.read(records)
    assert found is not None, "a document is lost"
    for name in ("ids", "weights", "head_count", "label_log_prob", "entropy", "log_tail_mass"):
        require_equal(getattr(found, name).tobytes(), getattr(expected, name).tobytes())


def require_map(found: VocabularyMap | None) -> None:
    for name in vars(MAP) if found is not None else ():
        assert np.array_equal(getattr(found, name), getattr(MAP, name)), "a map is wrong"


def require_known(record: DocumentRecord, known: Mapping[bytes, npt.NDArray[np.uint8]]) -> None:
    require_equal(record.records.tobytes(), known[record.key].tobytes())


def require_equal(found: object, expected: object) -> None:
    assert found == expected, "a number is wrong"


def take_over(store: Store) -> None:
    """A damaged journal loses what is behind the damage, as a miss; what it still says is right."""
    known = {document.key: document.records for document in PENDING}
    with store.writer("build") as writer:
        for document in writer.pending.values():
            require_known(document, known)
        writer.commit(list(writer.pending))
