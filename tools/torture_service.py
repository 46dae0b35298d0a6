"""Kill a service at random moments under readers, learners and uploads, and start it again; ends with a table.

    python -m tools.torture_service --kills 50

One client reads the store through overlays of its own, two ask for documents that nobody has, one pushes shards. None
of them is told of the kills. What must hold: every read is right, `verify` is clean whenever the service is down, what
was answered or published is there at the end, as it was answered and once, and every client has gone on by itself. Exit
code 1 where it does not. Ends only processes that it has started, and leaves no file.
"""

import argparse
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import numpy as np

from logitstore import plan, service_client
from logitstore.key import document_key
from logitstore.places import push
from logitstore.recipe import DocumentRecord
from logitstore.served_store import open_served
from logitstore.service_client import ServiceClient
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.children import scratch
from tests.runs import World, make_world, write_jsonl
from tools.service_process import Service

NAME = "texts"
ROWS = 400
SHARD_POSITIONS = 128
FIRST_SHARDS = 5
PATIENCE_S = 120.0


class Clients:
    """What uses the service until it is told to stop; each in a thread of its own."""

    def __init__(self, url: str, folder: Path, whole: ZarrStore, first: ZarrStore) -> None:
        self.url, self.folder = url, folder
        self.bad: list[str] = []
        self.did: Counter[str] = Counter()
        self.acknowledged: dict[bytes, DocumentRecord] = {}
        self.published = set(first.shard_names)
        self._whole, self._first = whole, first
        self._stop = threading.Event()
        works = [self._read, self._learn, self._learn, self._push]
        self._threads = [threading.Thread(target=self._go_on, args=(work, number)) for number, work in enumerate(works)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _go_on(self, work: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            try:
                work(rng)
            except Exception as error:  # the client did not live through it
                self.bad.append(f"{work.__name__[1:]}: {type(error).__name__}: {error}")
                return

    def _read(self, rng: random.Random) -> None:
        """Read documents through a new overlay, and hold them against the store they are from."""
        store = open_served(self.url, self.folder / f"overlay-{self.did['read']}", 1 << 30)
        for number in rng.sample(range(len(self._first)), 5):
            token_ids, wanted = self._first.document(number)
            found = store.get(token_ids)
            if found is None or not np.array_equal(found.weights, wanted.weights):
                self.bad.append(f"read: document {number} is {'missing' if found is None else 'another'}")
        self.did["read"] += 1

    def _learn(self, rng: random.Random) -> None:
        """Ask for documents that nobody has, and for some that were answered before."""
        client = ServiceClient(self.url, patience_s=PATIENCE_S)
        manifest = self._first.manifest
        fresh = [
            np.array([rng.randrange(3, 259) for _ in range(rng.randrange(2, 60))], np.int32)
            for _ in range(rng.randrange(1, 5))
        ]
        known = list(self.acknowledged.values())
        before = rng.sample(known, min(2, len(known)))
        asked = [*fresh, *(record.token_ids for record in before)]
        for answer in client.ask(asked, manifest.recipe, manifest.fingerprint):
            if answer.record is None:
                self.bad.append(f"learn: {answer.kind.name}: {answer.reason}")
                continue
            key = answer.record.key
            held = self.acknowledged.setdefault(key, answer.record)
            if not np.array_equal(held.records, answer.record.records):
                self.bad.append("learn: another answer than before")
            self.did["learn"] += 1
        client.close()

    def _push(self, rng: random.Random) -> None:
        """Push a store that has a shard more than the service was given before."""
        left = [name for name in self._whole.shard_names if name not in self.published]
        if not left:
            time.sleep(0.2)
            return
        source = self.folder / f"push-{len(left)}"
        shutil.copytree(self._first.folder, source)
        name = rng.choice(left)
        shutil.copytree(self._whole.folder / "shards" / name, source / "shards" / name)
        push(str(source), self.url, quiet=True)
        shutil.rmtree(source)
        self.published.add(name)
        self.did["push"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    rng, begun = random.Random(config.seed), time.monotonic()
    # A store that is opened while the service is down waits for it here, as a run does on its way, and not 10 s.
    patient = patch.object(service_client, "PATIENCE_S", PATIENCE_S)
    with patient, tempfile.TemporaryDirectory(dir=scratch()) as name:
        folder = Path(name)
        world, whole, first = stores(folder, rng)
        served = folder / "served" / f"{NAME}.zarr"
        shutil.copytree(first.folder, served)
        service = Service([served, "--teacher", world.teacher], folder / "log")
        service.start()
        clients = Clients(f"{service.url}/{NAME}", folder, whole, first)
        clients.start()
        for number in range(config.kills):
            time.sleep(rng.uniform(0.05, 4))
            service.kill()
            clients.bad += [f"kill {number + 1}: {p.file}: {p.fault}" for p in verify(served, quiet=True).problems]
            service.start("health")
            print(f"{number + 1} kills; {dict(clients.did)}", flush=True)
        clients.stop()
        code = service.stop()
        bad = [*clients.bad, *([f"the service ended with {code}"] if code else []), *at_the_end(served, clients)]
    print("\n".join(bad))
    did = ", ".join(f"{count:,} times {what}" for what, count in sorted(clients.did.items()))
    print(f"{config.kills} kills in {time.monotonic() - begun:.0f} s; {did}; {len(bad)} bad endings")
    raise SystemExit(bool(bad))


def stores(folder: Path, rng: random.Random) -> tuple[World, ZarrStore, ZarrStore]:
    """A world, a store of many small shards, and one that has the first of them."""
    world = make_world(folder / "world", store=False)
    words = ["teacher", "student", "store", "shard", "token", "weight", "tail", "head", "draw", "mass"]
    rows = [{"text": " ".join(rng.choice(words) for _ in range(rng.randrange(3, 30)))} for _ in range(ROWS)]
    write_jsonl(world.data, rows)
    with patch.object(plan, "SHARD_POSITIONS", SHARD_POSITIONS):
        world.build(folder / "whole.zarr")
    whole = open_store(folder / "whole.zarr")
    assert isinstance(whole, ZarrStore)
    shutil.copytree(whole.folder, folder / "first.zarr")
    for name in whole.shard_names[FIRST_SHARDS:]:
        shutil.rmtree(folder / "first.zarr" / "shards" / name)
    shutil.rmtree(folder / "first.zarr" / "index")
    first = open_store(folder / "first.zarr")
    assert isinstance(first, ZarrStore)
    first.save_index()
    return world, whole, first


def at_the_end(path: Path, clients: Clients) -> list[str]:
    """What is wrong with the store when all is over."""
    bad = [f"at the end: {problem.file}: {problem.fault}" for problem in verify(path, quiet=True).problems]
    store = open_store(path)
    assert isinstance(store, ZarrStore)
    for record in clients.acknowledged.values():
        found = store.answer(record.token_ids)
        if found is None or not np.array_equal(found.records, record.records):
            bad.append(f"a document that was answered is {'lost' if found is None else 'another'}")
    missing = clients.published - set(store.shard_names)
    bad += [f"shard {name} was published and is lost" for name in missing]
    keys = [document_key(store.token_ids(number)) for number in range(len(store))]
    held = sum(store.shard(name).entry.documents for name in store.shard_names)
    if held != len(set(keys)):
        bad.append(f"{held - len(set(keys))} documents are there twice")
    print(
        f"{held:,} documents in {store.shard_count} shards, {len(clients.acknowledged):,} of them answered to clients"
    )
    return bad


if __name__ == "__main__":
    main()
