"""FORMAT.md is enough: `page_reader`, written from that page alone, agrees with the package on every number."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorstore
import zarr

from logitstore.codec import Codes, to_record
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.page_reader import Ints, Position, Streams, read_page
from tests.stores import VOCABULARY, contents, guessed_hidden, manifest, records

GOLDEN = Path(__file__).parent / "golden"

KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "threshold": ({"select": "threshold:4"}, [7, 2, 300, 40]),
    "threshold in two chunks": ({"select": "threshold:2"}, [2_000, 200]),
    "tiny vocabulary": ({"select": "threshold:8", "vocab_size": 100}, [20, 3]),
    "tail log-probs": ({"select": "threshold:6", "vocab_size": 50_000, "tail_log_probs": True}, [30, 9]),
    "top-k": ({"select": "top-k:5", "log_z": (1.0, 2.0, 4.0)}, [30, 9]),
    "top-p": ({"select": "top-p:0.9:8", "vocab_size": 50_000}, [30, 9]),
    "random": ({"select": "random:20"}, [30, 9]),
    "random with exponent": ({"select": "random:20:0.8"}, [30, 9]),
    "two temperatures, two replicas": (
        {"select": "threshold:4", "temperatures": (2.0, 1.0), "replicas": 2, "log_z": (1.0, 3.0)},
        [30, 9],
    ),
    "rare ids": ({"select": "top-k:2", "vocab_size": 600_000}, [4_000, 400]),
    "heads of two bytes": ({"select": "top-k:30000", "vocab_size": 50_000}, [37, 3]),
    "heads of four bytes": ({"select": "top-p:0.999:70000", "vocab_size": 600_000}, [11, 2]),
    "hidden states": ({"select": "top-k:5", "hidden_layers": (6, 2), "hidden_size": 20, "log_z": (2.0,)}, [30, 9]),
    "hidden states in two chunks": ({"select": "threshold:4", "hidden_layers": (0,), "hidden_size": 4_000}, [60, 9]),
    "more entries than tokens": ({"select": "threshold:4"}, [5]),
}


def likely_labels(lengths: list[int], recipe: Recipe) -> list[DocumentRecord]:
    """Documents of a teacher that is often right, so that labels are found among the entries, in head and tail."""
    rng = np.random.default_rng(1)
    made = []
    for length in lengths:
        token_ids = rng.integers(0, recipe.vocab_size, length).astype(np.int32)
        logits = rng.normal(0, 3, (length - 1, recipe.vocab_size)).astype(np.float32)
        logits[np.arange(length - 1), token_ids[1:]] += rng.choice([0, 6, 12, 25], length - 1)
        hidden = guessed_hidden(recipe, length - 1, rng)
        made.append(DocumentRecord(token_ids, recipe.record(token_ids, logits, hidden=hidden)))
    return made


def rare(lengths: list[int], recipe: Recipe) -> list[DocumentRecord]:
    """Documents of which every position has other ids, more of them than have a rank of their own."""
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        n = length - 1
        ids = np.sort(rng.choice(recipe.vocab_size, (n, 2), replace=False).astype(np.uint32), axis=1)
        codes = np.stack([np.zeros(n), rng.integers(16, 255, n)], axis=1).astype(np.uint8)
        entries = Codes(ids, codes, np.full(n, 2, np.uint32), rng.integers(16, 256, n).astype(np.uint8))
        labels = np.where(rng.random(n) < 0.5, ids[:, 1], rng.integers(0, recipe.vocab_size, n))
        beside = rng.integers(0, 255, (n, 2)).astype(np.uint8)
        token_ids = np.append(7, labels).astype(np.int32)
        made.append(DocumentRecord(token_ids, np.concatenate([to_record(entries, recipe.form), beside], axis=1)))
    return made


def make(path: Path, kind: str) -> ZarrStore:
    options, lengths = KINDS[kind]
    store = ZarrStore.create(path, manifest(**options), VOCABULARY)
    recipe = store.manifest.recipe
    if kind == "more entries than tokens":
        ids = np.array([0, 7, 7, 0, 9], np.int32)
        logits = np.full((4, 300), -np.inf, np.float32)
        logits[:, [7, 9]], logits[:, 0] = 0, [-np.inf, 0, -20, 0]
        logits[:, ids[1:]] = np.maximum(logits[:, ids[1:]], -60)
        store.write_documents([DocumentRecord(ids, recipe.record(ids, logits))])
    elif kind == "rare ids":
        store.write_documents(rare(lengths, recipe))
    else:
        store.write_documents(likely_labels(lengths, recipe))
        store.write_documents(records(lengths[1:], seed=2, recipe=recipe))
    store.save_index()
    return store


def assert_equal(found: SparseTargets, positions: list[Position], number: int, *, own: bool) -> None:
    assert len(found) == len(positions)
    for t, position in enumerate(positions):
        entries = position.sets[number]
        assert found.head_count[t] == entries.head
        assert found.ids[t, : len(entries.ids)].tolist() == entries.ids.tolist()
        assert np.allclose(found.weights[t, : len(entries.ids)], entries.weights, rtol=2e-4, atol=1e-6)
        assert not found.weights[t, len(entries.ids) :].any()
        assert math.exp(found.log_tail_mass[t]) == pytest.approx(entries.tail, rel=2e-4, abs=1e-6)
        if own:
            assert found.log_probs is not None
            assert np.allclose(np.exp(found.log_probs[t]), np.exp(entries.log_probs), rtol=2e-4, atol=1e-6)
    assert found.label_log_prob.tolist() == [p.label_log_prob for p in positions]
    assert found.entropy.tolist() == [p.entropy for p in positions]
    assert found.log_z is None or found.log_z.tolist() == [p.log_z for p in positions]
    assert found.hidden is None or np.array_equal(found.hidden, [p.hidden for p in positions])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_the_page_alone_agrees_on_every_number(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "s", kind)
    store, read = open_store(tmp_path / "s"), read_page(tmp_path / "s")
    recipe = store.manifest.recipe
    assert len(store) == len(read) and store.positions >= sum(len(positions) for _, positions in read.values())
    for tokens, positions in read.values():
        for number in range(recipe.sets):
            temperature, replica = recipe.temperatures[number // recipe.replicas], number % recipe.replicas
            found = store.get(tokens, temperature, replica)
            assert found is not None and (found.log_z is not None) == bool(recipe.log_z)
            assert (found.hidden is not None) == bool(recipe.hidden_layers)
            assert_equal(found, positions, number, own=recipe.tail_log_probs)


class Watching(Streams):
    """Remembers which first bytes of varints it has seen."""

    seen: ClassVar[set[int]] = set()

    def varints(self, n: int) -> Ints:
        self.seen.update(self.row[self.at : self.at + n].tolist())
        return super().varints(n)


def test_these_stores_hold_every_form_of_varint_and_of_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.page_reader.Streams", Watching)
    places = set()
    for kind in ("threshold", "rare ids"):
        make(tmp_path / kind, kind)
        for tokens, positions in read_page(tmp_path / kind).values():
            for label, first in zip(tokens[1:], (p.sets[0] for p in positions), strict=True):
                where = np.flatnonzero(first.ids == label)
                places.add("none" if not len(where) else "head" if where[0] < first.head else "tail")
    assert places == {"none", "head", "tail"}
    assert {int(np.searchsorted([128, 248, 255], first, "right")) for first in Watching.seen} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "kind", ["threshold in two chunks", "two temperatures, two replicas", "hidden states", "more entries than tokens"]
)
def test_tensorstore_reads_the_same_bytes_of_every_array(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "s", kind)
    arrays = dict(zarr.open_group(tmp_path / "s", mode="r").members(max_depth=None))
    names = [name for name, array in arrays.items() if isinstance(array, zarr.Array)]
    assert {name.split("/")[-1] for name in names} >= {"bytes", "documents", "blocks", "ranks", "positions", "keys"}
    for name in names:
        where = {"driver": "file", "path": str(tmp_path / "s" / name)}
        found = tensorstore.open({"driver": "zarr3", "kvstore": where}, read=True).result()
        expected = arrays[name][...]
        assert found.dtype.numpy_dtype == expected.dtype and found.shape == expected.shape
        assert (np.asarray(found.read().result()) == expected).all()
        assert found.fill_value == np.iinfo(expected.dtype).max


def test_every_array_says_in_its_metadata_what_the_page_says(tmp_path: Path) -> None:
    store = make(tmp_path / "s", "threshold in two chunks")
    shard = min((tmp_path / "s" / "shards").glob("*/"), key=lambda path: len((path / "zarr.json").read_bytes()))
    metadata = {path.parent.name: json.loads(path.read_text()) for path in shard.glob("*/zarr.json")}
    assert metadata.keys() == {"documents", "blocks", "ranks", "entries-0", "positions"}
    for name in ("entries-0", "positions"):
        (sharding,) = metadata[name]["codecs"]
        assert sharding["name"] == "sharding_indexed" and sharding["configuration"]["chunk_shape"][0] == 1
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
        assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    for name in ("documents", "blocks", "ranks"):
        assert [codec["name"] for codec in metadata[name]["codecs"]] == ["bytes", "zstd", "crc32c"]
    column = json.loads((store.folder / "index" / "keys" / "zarr.json").read_text())
    assert [codec["name"] for codec in column["codecs"]] == ["bytes", "crc32c"]


def test_the_index_is_what_the_page_says(tmp_path: Path) -> None:
    make(tmp_path / "s", "threshold")
    root = zarr.open_group(tmp_path / "s", mode="r")
    index = root["index"]
    names = [bytes(row).hex() for row in index["shards"][:]]
    assert names == sorted(name for name, _ in root["shards"].groups())
    shards = [root["shards"][name] for name in names]
    assert index["counts"][:].tolist() == [[s.attrs["documents"], s.attrs["positions"]] for s in shards]
    keys = [bytes(row[:16]) for shard in shards for row in shard["documents"][:]]
    hashes, documents = index["keys"][:], index["keys-documents"][:]
    assert (hashes[1:] >= hashes[:-1]).all() and len(keys) == len(hashes)
    assert [int.from_bytes(keys[d][:8], "little") for d in documents] == hashes.tolist()
    blocks = [hash_ for shard in shards for hash_ in shard["blocks"][:].tolist()]
    assert index["blocks"][:].tolist() == sorted(blocks) and index["blocks-documents"].shape == (len(blocks),)


def golden_documents() -> list[list[DocumentRecord]]:
    """The documents of each shard of the golden store, as they were given to the writer."""
    shards = json.loads((GOLDEN / "v1.json").read_text())
    return [
        [
            DocumentRecord(
                np.array(d["token_ids"], np.int32),
                np.frombuffer(bytes.fromhex("".join(d["records"])), np.uint8).reshape(len(d["token_ids"]) - 1, -1),
            )
            for d in shard
        ]
        for shard in shards
    ]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The golden store, unpacked. Its zip file is compressed, so it is none that a store could be read from."""
    with zipfile.ZipFile(GOLDEN / "v1.zip") as archive:
        archive.extractall(tmp_path / "golden")
    return tmp_path / "golden"


def test_the_golden_store_is_read_for_good(golden: Path) -> None:
    assert verify(golden, quiet=True).problems == []
    store, by_page = open_store(golden), read_page(golden)
    recipe = store.manifest.recipe
    documents = [document for shard in golden_documents() for document in shard]
    assert len(store) == len(documents) == len(by_page) == 4 and store.vocabulary == VOCABULARY
    for document in documents:
        tokens, positions = by_page[document.key]
        assert tokens == document.token_ids.tolist()
        for number, temperature in enumerate(recipe.temperatures):
            found = store.get(tokens, temperature)
            assert found is not None and store.answered(document.token_ids) == len(found)
            assert_equal(found, positions, number, own=True)
    records_of = {store.record(n).key: store.record(n).records.tobytes() for n in range(4)}
    assert records_of == {document.key: document.records.tobytes() for document in documents}


def test_numbers_of_the_golden_store_spelled_out(golden: Path) -> None:
    targets = open_store(golden).get(golden_documents()[0][0].token_ids)
    assert targets is not None and targets.log_probs is not None and targets.log_z is not None
    assert (targets.ids[1].tolist(), targets.head_count[1]) == ([226, 99, 145, 220], 1)
    assert targets.weights[1] == pytest.approx([0.2528396, *[0.24905348] * 3], rel=1e-6)
    assert (targets.label_log_prob[1], targets.entropy[1]) == (-1.375, 3.0625)
    assert targets.log_probs[1].tolist() == [-1.375, -3.5, -3.0625, -2.5625]
    assert targets.log_z[1].tolist() == [0, 8409 / 4096]


def spelled_alike(name: str, data: bytes) -> Any:
    """A file's bytes; of Zarr's own metadata, which zarr may spell in another way one day, what it says."""
    if Path(name).name != "zarr.json":
        return data
    metadata = json.loads(data)
    if metadata["node_type"] == "group":
        metadata["attributes"].pop("digest")
        files = metadata["attributes"].get("files", {})
        metadata["attributes"]["files"] = {n: e for n, e in files.items() if not n.endswith("zarr.json")}
    return metadata


def test_the_golden_store_is_written_again_byte_for_byte(golden: Path, tmp_path: Path) -> None:
    before = open_store(golden)
    store = ZarrStore.create(tmp_path / "s", before.manifest, before.vocabulary)
    for shard in golden_documents():
        store.write_documents(shard)
    store.save_index()
    expected, found = contents(golden), contents(tmp_path / "s")
    assert found.keys() == expected.keys()
    for name in expected:
        assert spelled_alike(name, found[name]) == spelled_alike(name, expected[name]), name
