"""Cost against size, on one core: writing, verifying, opening and looking up at 10 thousand to a million tokens of real
records, and opening and looking up where the index is that of a thousand million.

That index is simulated: the million's own shards, and after them 3,800 that exist in the index only, of 1.5 million
documents of 682 tokens with random hashes. A lookup searches all of it and then reads a real shard.

    .venv/bin/python tools/bench_store.py OUT_DIR --only scale
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from logitstore.contract import Store
from logitstore.figure import Table
from logitstore.files import LocalFiles
from logitstore.index import Table as IndexTable
from logitstore.index import block_ends
from logitstore.plots import Axis, Series, chart
from logitstore.store import create_store, open_store
from logitstore.stored_index import FOLDER, read_index, write_index
from logitstore.verify import verify
from tools.bench_parts import Found, Measured, Target, Titled, scratch, spent
from tools.bench_text import SEED, Taught, TokenIds, copies, write_store

SELECT = "threshold:16"
SIZES = (10_000, 100_000, 1_000_000)
SIMULATED = 1_000_000_000
DOCUMENT_TOKENS = 682
SHARD_DOCUMENTS = 384
LOOKUPS = 1_000
OPENINGS = 20
EXPECTED = {"write": 1, "verify": 1, "open": 0, "key": 0, "prefix": 0}
NAMES = {
    "write": "write",
    "verify": "verify",
    "open": "open",
    "key": "look up a document",
    "prefix": "look up a beginning",
}
TARGET_OPEN_S = 1.0
LINEAR, FLAT = 1.1, 0.1
"""Exponents that still count as such."""


def measure(out: Path, tokens: int) -> Measured:
    """Every size in turn."""
    taught = Taught.of(out, tokens)
    like, records = open_store(taught.path(SELECT)), taught.records(SELECT)
    rows = []
    with scratch(out) as folder:
        for size in SIZES:
            some = list(copies(records, like.manifest.recipe, size))
            path = folder / f"{size}.zarr"
            create_store(path, like.manifest, like.vocabulary)  # which packs the vocabulary, once for good
            writing = spent(lambda path=path, some=some: write_store(path, like, iter(some)))
            verifying = spent(lambda path=path: verify(path, quiet=True))
            documents = [record.token_ids for record in some]
            positions = sum(len(document) - 1 for document in documents)
            costs = {"write": writing.cpu_s, "verify": verifying.cpu_s} | reading(path, documents)
            rows.append({"tokens": positions, "documents": len(documents), "costs_s": costs})
        count = simulate_index(path, SIMULATED)
        rows.append({"tokens": SIMULATED, "documents": count, "costs_s": reading(path, documents)})
    exponents = {name: slope(rows, name) for name in EXPECTED}
    return {"rows": rows, "exponents": exponents}


def slope(rows: list[Measured], name: str) -> float:
    """Exponent of a cost in tokens: the least squares line through their logarithms."""
    points = [(row["tokens"], row["costs_s"][name]) for row in rows if name in row["costs_s"]]
    tokens, costs = np.log(points).T
    return float(np.polyfit(tokens, costs, 1)[0])


def reading(path: Path, documents: list[TokenIds]) -> Measured:
    """Seconds of opening and of lookups: medians, by the clock, warm."""
    opening = _median_s([lambda: open_store(path)] * OPENINGS)
    store = open_store(path)
    rng = np.random.default_rng(SEED)
    chosen = [documents[i] for i in rng.integers(0, len(documents), LOOKUPS).tolist()]
    cut = [document[: rng.integers(32, len(document))] for document in chosen if len(document) > 32]
    assert all(store.answered(document) == len(document) - 1 for document in documents + cut)
    return {
        "open": opening,
        "key": _median_s([_lookup(store, document) for document in chosen]),
        "prefix": _median_s([_lookup(store, document) for document in cut]),
    }


def _lookup(store: Store, document: TokenIds) -> Callable[[], int]:
    return lambda: store.answered(document)


def _median_s(works: list[Callable[[], object]]) -> float:
    times = []
    for work in works:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def simulate_index(path: Path, tokens: int) -> int:
    """Give a store the index of one with so many tokens; how many documents it then seems to hold."""
    index = read_index(LocalFiles(path), path)
    assert index is not None
    rng = np.random.default_rng(SEED)
    real, more = int(index.counts[:, 0].sum()), (tokens - int(index.counts.sum())) // DOCUMENT_TOKENS
    shards = -(-more // SHARD_DOCUMENTS)
    names = [row.tobytes().hex() for row in rng.integers(0, 256, (shards, 8), np.uint8)]
    held = np.minimum(SHARD_DOCUMENTS, more - SHARD_DOCUMENTS * np.arange(shards))
    counts = np.concatenate([index.counts, np.stack([held, held * (DOCUMENT_TOKENS - 1)], axis=1)])
    for name in names:
        (path / "shards" / name).mkdir()

    def grown(table: IndexTable, each: int) -> IndexTable:
        hashes = rng.integers(0, 1 << 64, each * more, np.uint64)
        documents = np.repeat(np.arange(real, real + more, dtype=np.uint32), each)
        return IndexTable.of(np.concatenate([table.hashes, hashes]), np.concatenate([table.documents, documents]))

    keys, blocks = grown(index.keys, 1), grown(index.blocks, len(block_ends(DOCUMENT_TOKENS)))
    partial = path / ".partial-index"
    partial.mkdir()
    write_index(partial, [*index.shards, *names], counts, keys, blocks, index.duplicates)
    shutil.rmtree(path / FOLDER)
    partial.rename(path / FOLDER)
    return real + more


def found(measured: Measured) -> Found:
    """A table and a plot."""
    rows, exponents = measured["rows"], measured["exponents"]
    cells = [
        (
            f"{row['tokens']:,}" + (" (simulated)" if row["tokens"] == SIMULATED else ""),
            f"{row['documents']:,}",
            *(_duration(row["costs_s"].get(name)) for name in EXPECTED),
        )
        for row in rows
    ]
    cells.append(("exponent, fitted", "", *(f"{exponents[name]:.2f}" for name in EXPECTED)))
    cells.append(("exponent, expected", "", *(str(EXPECTED[name]) for name in EXPECTED)))
    remark = (
        f"{SELECT}, a Zarr folder. Write and verify: one run, processor time of one core. Opening: median of "
        f"{OPENINGS}; lookups: medians of {LOOKUPS}, warm, no values read. An exponent is the slope in the plot."
    )
    targets = [Target.at_most(f"opening at {SIMULATED:,} tokens, s", TARGET_OPEN_S, rows[-1]["costs_s"]["open"], ".3f")]
    targets += (
        Target.at_most(f"{NAMES[name]}, exponent in tokens", LINEAR if EXPECTED[name] else FLAT, exponents[name], ".2f")
        for name in EXPECTED
    )
    series = [
        Series(NAMES[name], [(r["tokens"], 1e3 * r["costs_s"][name]) for r in rows if name in r["costs_s"]])
        for name in EXPECTED
    ]
    figure = chart(series, "Cost against size", Axis("tokens", log=True), Axis("time", "ms", log=True))
    header = ("tokens", "documents", *(NAMES[name] for name in EXPECTED))
    return Found([Titled("Cost against size", remark, Table(header, tuple(cells)))], targets, (figure,))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / size:.3g} {unit}"
