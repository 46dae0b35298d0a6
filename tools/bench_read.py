"""Reading a million positions in training's random order, on one core, against the same targets as Parquet columns.

Both end in the same padded arrays: ids [B, T, k] and weights [B, T, k] of 8 documents. Parquet has one row for each
document, `ids` list<uint32> and `weights` list<float32>, zstd, in row groups of 8 or of 128 documents: what reads
faster is held against ours. A row of its own says what a decoder that takes no time would reach, and one what
`Store.get` takes, which a training run asks: labels, entropies and all, a document at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.contract import Store
from logitstore.figure import Table
from logitstore.reader import read_batches
from logitstore.recipe import DocumentRecord
from logitstore.store import open_store
from logitstore.zarr_store import ZarrStore
from tools.bench_layouts import file_bytes, in_lmdb, zipped
from tools.bench_parts import ROUNDS, Found, Measured, Target, Titled, median_spent, scratch
from tools.bench_text import SEED, Taught, TokenIds, copies, write_store

SELECT = "threshold:16"
POSITIONS = 1 << 20
BATCH = 8
ROW_GROUPS = (8, 128)
TARGET_PER_S = 1e6
TARGET_RATIO = 10.0


def measure(out: Path, tokens: int) -> Measured:
    """Write the same records to every place, then read all places in turn, in random order and in the text's."""
    taught = Taught.of(out, tokens)
    like = open_store(taught.path(SELECT))
    k = like.manifest.recipe.selection.k
    with scratch(out) as folder:
        records = list(copies(taught.records(SELECT), like.manifest.recipe, POSITIONS))
        documents = [record.token_ids for record in records]
        lengths = np.array([len(document) - 1 for document in documents])
        store = write_store(folder / "store.zarr", like, iter(records))
        assert isinstance(store, ZarrStore)
        stores = {
            "Zarr folder": store,
            "zip": open_store(zipped(folder / "store.zarr", folder / "store.zip")),
            "LMDB": in_lmdb(folder / "store.lmdb", like, records),
        }
        sizes = {name: file_bytes(Path(place.path)) / lengths.sum() for name, place in stores.items()}
        tables = {f"Parquet, row groups of {n}": folder / f"{n}.parquet" for n in ROW_GROUPS}
        for path in tables.values():
            write_parquet(path, records, like, int(path.stem))
        sizes |= {name: file_bytes(path) / lengths.sum() for name, path in tables.items()}
        del records
        orders = {"random": np.random.default_rng(SEED).permutation(len(documents)), "sequential": None}
        speeds = {}
        for order, numbers in orders.items():
            batches = np.array_split(
                np.arange(len(documents)) if numbers is None else numbers, range(BATCH, len(documents), BATCH)
            )
            works: dict[str, Callable[[], object]] = {
                name: reading(place, documents, batches) for name, place in stores.items()
            }
            works["Zarr folder, not decoded"] = one_by_one(partial(unpacked, store), documents, batches)
            works["Zarr folder, all that is kept"] = one_by_one(store.get, documents, batches)
            works |= {name: reading_parquet(path, lengths, batches, k) for name, path in tables.items()}
            speeds[order] = {
                name: {"per_s": int(lengths.sum()) / time.cpu_s, "wall_per_s": int(lengths.sum()) / time.wall_s}
                for name, time in median_spent(works).items()
            }
    return {
        "positions": int(lengths.sum()),
        "documents": len(documents),
        "shards": store.shard_count,
        "bytes_per_token": sizes,
        **speeds,
    }


def reading(
    store: Store, documents: Sequence[TokenIds], batches: Sequence[npt.NDArray[np.integer]]
) -> Callable[[], None]:
    """Read all batches as a trainer does."""

    def read() -> None:
        asked = ([documents[number] for number in batch] for batch in batches)
        answered = sum(int(batch.positions.sum()) for batch in read_batches(store, asked))
        assert answered == sum(len(document) - 1 for document in documents)

    return read


def one_by_one(
    ask: Callable[[TokenIds], object], documents: Sequence[TokenIds], batches: Sequence[npt.NDArray[np.integer]]
) -> Callable[[], None]:
    """Ask for the documents of all batches, one at a time."""

    def read() -> None:
        for number in np.concatenate(batches).tolist():
            assert ask(documents[number]) is not None

    return read


def unpacked(store: ZarrStore, document: TokenIds) -> object:
    """Find, read, check and decompress what a document needs, and decode nothing of it; None is a miss."""
    place = store.catalog.locate(document)
    return None if place is None else place[0].parts(0, [place[0].span(place[1])])


def write_parquet(path: Path, records: Sequence[DocumentRecord], like: Store, row_group: int) -> None:
    """The decoded targets, a row for each document."""
    schema = pa.schema([("ids", pa.list_(pa.uint32())), ("weights", pa.list_(pa.float32()))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for at in range(0, len(records), row_group):
            targets = [like.manifest.recipe.read(record.records) for record in records[at : at + row_group]]
            ends = pa.array(np.cumsum([0, *(t.ids.size for t in targets)]), pa.int32())
            columns = [np.concatenate([getattr(t, name).ravel() for t in targets]) for name in ("ids", "weights")]
            lists = [pa.ListArray.from_arrays(ends, pa.array(column)) for column in columns]
            writer.write_table(pa.table(lists, schema), row_group_size=row_group)


def reading_parquet(
    path: Path, lengths: npt.NDArray[np.int64], batches: Sequence[npt.NDArray[np.integer]], k: int
) -> Callable[[], None]:
    """Read all batches from a Parquet file, each row group once for all documents of a batch that lie in it."""
    row_group = int(path.stem)
    file = pq.ParquetFile(path, memory_map=True)

    def read() -> None:
        last: tuple[int, list[npt.NDArray[Any]]] = -1, []  # the group read last is kept, for who reads in order
        for batch in batches:
            shape = len(batch), int(lengths[batch].max()), k
            padded = np.zeros(shape, np.uint32), np.zeros(shape, np.float32)
            by_group = defaultdict(list)
            for row, number in enumerate(batch.tolist()):
                by_group[number // row_group].append((row, number))
            for group, rows in sorted(by_group.items()):
                if group != last[0]:
                    last = group, _columns(file, group)
                first = group * row_group
                ends = np.cumsum(lengths[first : first + row_group]) * k
                for row, number in rows:
                    n, end = int(lengths[number]), int(ends[number - first])
                    for into, column in zip(padded, last[1], strict=True):
                        into[row, :n] = column[end - n * k : end].reshape(n, k)

    return read


def _columns(file: pq.ParquetFile, group: int) -> list[npt.NDArray[Any]]:
    """The values of both columns, one after another."""
    table = file.read_row_group(group, use_threads=False)
    return [table.column(name).combine_chunks().flatten().to_numpy() for name in ("ids", "weights")]


def fastest_parquet(speeds: Measured) -> str:
    """Which row groups read faster."""
    return max((name for name in speeds if name.startswith("Parquet")), key=lambda name: speeds[name]["per_s"])


def found(measured: Measured) -> Found:
    """One table."""
    orders = ("random", "sequential")
    sizes = measured["bytes_per_token"]
    best = {order: measured[order][fastest_parquet(measured[order])]["per_s"] for order in orders}
    cells = tuple(
        (
            name,
            f"{sizes[name]:.1f}" if name in sizes else "",
            *(
                cell
                for order in orders
                for cell in (
                    f"{measured[order][name]['per_s']:,.0f}",
                    f"{measured[order][name]['wall_per_s']:,.0f}",
                    f"{measured[order][name]['per_s'] / best[order]:.1f}",
                )
            ),
        )
        for name in measured["random"]
    )
    header = ("place", "bytes/token")
    header += tuple(text for order in orders for text in (f"{order}/s", "by the clock", "x Parquet"))
    remark = (
        f"{SELECT}: {measured['positions']:,} positions in {measured['documents']:,} documents and "
        f"{measured['shards']} shards, real records and copies with renumbered tokens (which compress less), read warm "
        f"in batches of {BATCH} documents. Positions per second of one core's processor time, and by the clock beside "
        f"it; each the median of {ROUNDS} readings of everything."
    )
    ours = measured["random"]["Zarr folder"]["per_s"]
    targets = (
        Target.at_least("random reading, positions/s on one core", TARGET_PER_S, ours),
        Target.at_least("random reading, ratio to Parquet", TARGET_RATIO, ours / best["random"], ".1f"),
    )
    return Found([Titled("Reading into padded batches", remark, Table(header, cells))], targets)
