"""Export a store as one Parquet file: a row for each document, for tools that know nothing of stores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.contract import Store
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError, StoreWriteError, first_line
from logitstore.manifest import Manifest
from logitstore.measures import unknown_labels
from logitstore.replaced import replaced
from logitstore.targets import SparseTargets

ROW_GROUP_POSITIONS = 65_536
METADATA = b"logitstore"
"""Under this name the file holds the store's manifest, as JSON."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    documents: int
    positions: int
    disk_bytes: int


def export(
    store: Store, out: Path, *, temperature: float | None = None, replica: int = 0, quiet: bool = False
) -> ExportReport:
    """Write columns token_ids [L]; ids and weights [L - 1, entries]; log_tail_mass, label_log_prob and entropy [L - 1].

    A position has its entries with a weight above 0; hidden states are left out. Null is what an imported cache did not
    know. Documents are in the store's order.
    Appears whole or not at all.

    Raises:
        ConfigError: `out` is there or no .parquet path, or the store has not the temperature or the replica.
        CorruptStoreError: the store is damaged.
        StoreWriteError: full disk or no permission.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    if out.suffix != ".parquet":
        raise ConfigError(f"{out} is not called .parquet; type a path that ends in .parquet")
    require_outside_stores(out)
    if out.exists():
        raise ConfigError(f"{out} is there already; type another path, or delete it")
    recipe = store.manifest.recipe
    recipe.set_number(temperature, replica)
    if not 0 <= replica < recipe.replicas:
        raise ConfigError(f"replica is {replica}, and the store has {recipe.replicas}; type --replica 0")
    schema = pyarrow.schema(
        [
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("ids", pyarrow.list_(pyarrow.list_(pyarrow.uint32()))),
            ("weights", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
            *((name, pyarrow.list_(pyarrow.float32())) for name in ("log_tail_mass", "label_log_prob", "entropy")),
        ],
        metadata={METADATA: json.dumps(store.manifest.to_json() | {"temperature": temperature, "replica": replica})},
    )
    rows: list[tuple[npt.NDArray[np.int32], SparseTargets]] = []
    room, documents, positions = ROW_GROUP_POSITIONS, len(store), 0
    try:
        with (
            replaced(out) as file,
            parquet.ParquetWriter(file, schema, compression="zstd") as writer,
            tqdm(total=store.positions, unit="tok", desc="export", delay=1, disable=quiet) as bar,
        ):
            for number in range(documents):
                rows.append(store.document(number, temperature, replica))
                room -= len(rows[-1][1])
                if room <= 0 or number == documents - 1:
                    writer.write_table(_table(rows, schema, store.manifest), row_group_size=len(rows))
                    written = sum(len(targets) for _, targets in rows)
                    positions += written
                    bar.update(written)
                    rows, room = [], ROW_GROUP_POSITIONS
    except pyarrow.ArrowException as error:
        raise StoreWriteError(f"{out} cannot be written: {first_line(error)}; type another path") from error
    return ExportReport(documents, positions, out.stat().st_size)


def _table(rows: list[tuple[npt.NDArray[np.int32], SparseTargets]], schema: Any, manifest: Manifest) -> Any:
    import pyarrow

    tokens = [token_ids for token_ids, _ in rows]
    targets = [found for _, found in rows]
    lengths = [len(found) for found in targets]
    kept = [found.weights > 0 for found in targets]
    entries = np.concatenate([mask.sum(axis=1) for mask in kept])

    def lists(values: Any, counts: Any) -> Any:
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pyarrow.ListArray.from_arrays(ends, values)

    def plain(name: str) -> Any:
        unknown = np.concatenate([_unknown(name, *row, manifest) for row in rows])
        return lists(pyarrow.array(np.concatenate([getattr(found, name) for found in targets]), mask=unknown), lengths)

    ids = np.concatenate([found.ids[mask] for found, mask in zip(targets, kept, strict=True)])
    weights = np.concatenate([found.weights[mask] for found, mask in zip(targets, kept, strict=True)])
    columns = [
        lists(np.concatenate(tokens).astype(np.int32), [len(token_ids) for token_ids in tokens]),
        lists(lists(ids, entries), lengths),
        lists(lists(weights, entries), lengths),
        *(plain(name) for name in ("log_tail_mass", "label_log_prob", "entropy")),
    ]
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _unknown(
    name: str, token_ids: npt.NDArray[np.int32], targets: SparseTargets, manifest: Manifest
) -> npt.NDArray[np.bool_]:
    """Of which positions the store has not what it is asked for, [P]."""
    if name == "entropy":
        return np.full(len(targets), "entropy" in manifest.unknown)
    if name == "label_log_prob":
        return unknown_labels(targets, token_ids[targets.positions + 1], manifest)
    return np.zeros(len(targets), np.bool_)
