"""Reading through a service on loopback beside reading the same store locally, and what the service's memory does.

    python -m tools.bench_serve OUT --store .demo/store.zarr --minutes 10

A million positions, real records and copies of them with renumbered tokens, in training's random order, in batches of
8 documents, by the clock; the service is a process of its own. First epoch: the overlay is empty, and all comes over
HTTP. Second: all lies in the overlay. By token ids: POST .../targets, where the service looks each document up.
"""

import argparse
import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from logitstore.contract import Store
from logitstore.figure import Table
from logitstore.reader import read_batches
from logitstore.served_store import open_served
from logitstore.service_client import ServiceClient
from logitstore.store import open_store
from logitstore.wire import Kind
from logitstore.zarr_store import ZarrStore
from tools.bench_parts import Target, Titled, aligned, scratch
from tools.bench_text import SEED, TokenIds, copies, write_store
from tools.service_process import Service

POSITIONS = 1 << 20
BATCH = 8
ROUNDS = 3
ASKED = 32
"""Documents in a request by token ids."""
TARGET_RATIO = 0.5
TARGET_GROWTH_MB = 16.0
SAMPLE_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--store", type=Path, default=Path(".demo/store.zarr"), help="whose records are copied")
    parser.add_argument("--positions", type=int, default=POSITIONS)
    parser.add_argument("--minutes", type=float, default=10, help="of load, while memory is watched; 0: none")
    config = parser.parse_args()
    config.out.mkdir(parents=True, exist_ok=True)
    like = open_store(config.store)
    with scratch(config.out) as folder:
        records = list(copies([like.record(i) for i in range(len(like))], like.manifest.recipe, config.positions))
        documents = [record.token_ids for record in records]
        write_store(folder / "million.zarr", like, iter(records))
        del records
        store = open_store(folder / "million.zarr")
        assert isinstance(store, ZarrStore)
        store.save_index()
        with Service([folder / "million.zarr", "--quiet"], folder / "log") as service:
            measured = speeds(store, documents, f"{service.url}/million", folder)
            if config.minutes:
                measured["memory"] = watch(service, documents, store, 60 * config.minutes)
    (config.out / "bench_serve.json").write_text(json.dumps(measured, indent=1) + "\n")
    show(measured)


def speeds(store: Store, documents: list[TokenIds], url: str, folder: Path) -> dict[str, object]:
    """Positions a second of each way to read, medians of rounds in turn."""
    order = np.random.default_rng(SEED).permutation(len(documents))
    batches = [[documents[i] for i in batch] for batch in np.array_split(order, range(BATCH, len(documents), BATCH))]
    positions = sum(len(document) - 1 for document in documents)
    times: dict[str, list[float]] = {name: [] for name in ("local", "first epoch", "second epoch", "by token ids")}
    network = 0

    def read(source: Store) -> None:
        answered = sum(int(batch.positions.sum()) for batch in read_batches(source, iter(batches)))
        assert answered == positions, "everything is answered"

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - started)

    read(store)
    for number in range(ROUNDS):
        timed("local", lambda: read(open_store(store.path)))  # type: ignore[arg-type]
        overlay = folder / f"overlay-{number}"
        opened: list[object] = []

        def first(overlay: Path = overlay, opened: list[object] = opened) -> None:
            served = open_served(url, overlay, 1 << 40)
            opened.append(served)
            read(served)

        timed("first epoch", first)
        network = opened[0].mirror.fetched_bytes  # type: ignore[attr-defined]
        timed("second epoch", lambda overlay=overlay: read(open_served(url, overlay, 1 << 40)))
        timed("by token ids", lambda: ask(url, documents, store))
        shutil.rmtree(overlay)
    return {
        "positions": positions,
        "documents": len(documents),
        "store_bytes": store.disk_bytes,
        "network_bytes": network,
        "per_s": {name: positions / float(np.median(of)) for name, of in times.items()},
    }


def ask(url: str, documents: list[TokenIds], store: Store) -> None:
    """Ask for every document by its token ids."""
    client = ServiceClient(url)
    for at in range(0, len(documents), ASKED):
        some = documents[at : at + ASKED]
        found = list(client.ask(some, store.manifest.recipe, store.manifest.fingerprint))
        assert len(found) == len(some) and all(answer.kind == Kind.HIT for answer in found)


def watch(service: Service, documents: list[TokenIds], store: ZarrStore, seconds: float) -> dict[str, object]:
    """The service's memory under four clients that read files, ask by token ids and look at its page's routes."""
    url, until = f"{service.url}/million", time.monotonic() + seconds
    files = [f"shards/{name}/{file}" for name in store.shard_names for file in store.shard(name).entry.files]
    requests = [0] * 4

    def load(number: int) -> None:
        client, rng = ServiceClient(url), random.Random(number)
        while time.monotonic() < until:
            match rng.randrange(4):
                case 0:
                    some = rng.sample(documents, 8)
                    assert len(list(client.ask(some, store.manifest.recipe, store.manifest.fingerprint))) == 8
                case 1:
                    client.facts()
                case 2:
                    client.json("GET", f"{client.api}/documents/{rng.randrange(len(documents))}")
                case _:
                    client.read(rng.choice(files))
            requests[number] += 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    samples = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(SAMPLE_S)
        samples.append(service.memory_bytes())
    for thread in threads:
        thread.join()
    quarter = max(1, len(samples) // 4)
    early, late = (float(np.mean(part)) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    return {
        "minutes": seconds / 60,
        "requests": sum(requests),
        "most_mb": max(samples) / 1e6,
        "early_mb": early / 1e6,
        "late_mb": late / 1e6,
        "connections": service.connections(),
    }


def show(measured: dict[str, object]) -> None:
    """The table and the targets."""
    per_s: dict[str, float] = measured["per_s"]  # type: ignore[assignment]
    rows = tuple((name, f"{speed:,.0f}", f"{speed / per_s['local']:.2f}") for name, speed in per_s.items())
    remark = (
        f"{measured['positions']:,} positions in {measured['documents']:,} documents, {measured['store_bytes']:,} "
        f"bytes, of which {measured['network_bytes']:,} came over HTTP in the first epoch; medians of {ROUNDS} rounds "
        "in turn."
    )
    print(Titled("Reading through a service", remark, Table(("", "positions/s", "of local"), rows)).text())
    targets = [Target.at_least("first epoch, of local", TARGET_RATIO, per_s["first epoch"] / per_s["local"], ".2f")]
    memory = measured.get("memory")
    if isinstance(memory, dict):
        print(
            f"{memory['requests']:,} requests in {memory['minutes']:.0f} minutes: {memory['early_mb']:.1f} MB in the "
            f"second quarter, {memory['late_mb']:.1f} MB in the last, {memory['most_mb']:.1f} MB at most, "
            f"{memory['connections']} connections"
        )
        growth = memory["late_mb"] - memory["early_mb"]
        targets.append(Target.at_most("growth of the service's memory, MB", TARGET_GROWTH_MB, growth))
    cells = tuple((t.what, t.target, t.reached, "met" if t.met else "MISSED") for t in targets)
    print("\n" + aligned(Table(("what", "target", "reached", ""), cells)))
    raise SystemExit(not all(target.met for target in targets))


if __name__ == "__main__":
    main()
