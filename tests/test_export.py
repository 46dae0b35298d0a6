"""A Parquet file of a store says what the store says, and is there whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitstore import export as module
from logitstore.errors import ConfigError, CorruptStoreError
from logitstore.export import export
from logitstore.manifest import Manifest
from logitstore.store import create_store, open_store
from tests.stores import VOCABULARY, contents, manifest, records, shard_folder, small_store


@pytest.mark.parametrize("suffix", ["zarr", "lmdb"])
@pytest.mark.parametrize("select", ["threshold:4", "top-p:0.9:6", "random:8"])
def test_a_row_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, suffix: str) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_POSITIONS", 50)
    made = manifest(select, temperatures=(2.0, 1.0))
    store = create_store(tmp_path / f"s.{suffix}", made, VOCABULARY)
    with store.writer("build") as writer:
        writer.append(records([30, 2, 40, 7], recipe=made.recipe))
        writer.commit(list(writer.pending))
    for temperature in (None, 1.0):
        out = tmp_path / f"{temperature}.parquet"
        report = export(store, out, temperature=temperature, quiet=True)
        assert (report.documents, report.positions, report.disk_bytes) == (4, 75, out.stat().st_size)
        file = pq.ParquetFile(out)
        assert file.num_row_groups == 2
        assert [str(field.type) for field in file.schema_arrow] == [
            "list<element: int32>",
            "list<element: list<element: uint32>>",
            "list<element: list<element: float>>",
            *["list<element: float>"] * 3,
        ]
        told = json.loads(file.schema_arrow.metadata[b"logitstore"])
        assert (Manifest.from_json(told, "x"), told["temperature"], told["replica"]) == (made, temperature, 0)
        for number, row in enumerate(file.read().to_pylist()):
            token_ids, targets = store.document(number, temperature)
            assert row["token_ids"] == token_ids.tolist()
            for name in ("log_tail_mass", "label_log_prob", "entropy"):
                np.testing.assert_array_equal(np.array(row[name], np.float32), getattr(targets, name))
            for t in range(len(targets)):
                kept = targets.weights[t] > 0
                assert row["ids"][t] == targets.ids[t][kept].tolist()
                np.testing.assert_array_equal(np.array(row["weights"][t], np.float32), targets.weights[t][kept])


def test_a_store_without_documents_is_a_file_without_rows(tmp_path: Path) -> None:
    export(create_store(tmp_path / "s.zarr", manifest(), VOCABULARY), tmp_path / "o.parquet", quiet=True)
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0


def test_no_more_than_a_row_group_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_POSITIONS", 40)
    store, held = small_store(tmp_path / "s.zarr", 4), []
    table = module._table
    monkeypatch.setattr(module, "_table", lambda rows, *rest: held.append(len(rows)) or table(rows, *rest))
    export(store, tmp_path / "o.parquet", quiet=True)
    assert sum(held) == 12 and max(held) <= 5


def test_what_cannot_be_written_or_read_leaves_nothing(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr")
    (tmp_path / "there.parquet").write_text("mine")
    for name, says in (
        ("o.csv", "ends in .parquet"),
        ("there.parquet", "is there already"),
        ("s.zarr/o.parquet", "lies inside"),
    ):
        with pytest.raises(ConfigError, match=says):
            export(store, tmp_path / name, quiet=True)
    with pytest.raises(ConfigError, match="serves temperature 1"):
        export(store, tmp_path / "o.parquet", temperature=3.0, quiet=True)
    with pytest.raises(ConfigError, match="replica is 1, and the store has 1"):
        export(store, tmp_path / "o.parquet", replica=1, quiet=True)
    file = shard_folder(store, 1) / "positions" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1])
    before = contents(tmp_path)
    with pytest.raises(CorruptStoreError):
        export(open_store(tmp_path / "s.zarr"), tmp_path / "o.parquet", quiet=True)
    assert contents(tmp_path) == before
