"""Size, error, gradient angle and codec speed of our recipes and the peers' layouts, on the same positions.

All on one core. A peer's payload is counted without any container and decoded from memory; ours is counted with
everything on disk and decoded from a store, checksums included: both favour the peer.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.codec import concatenated, weights
from logitstore.contract import Store
from logitstore.fidelity import Fidelity, FidelityMeter
from logitstore.figure import Figure, Table
from logitstore.plots import Axis, Series, chart
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.store import create_store, open_store
from logitstore.targets import SparseTargets
from tools.bench_parts import Found, Measured, Target, Titled, median_spent, scratch, spent
from tools.bench_text import SEED, SELECTIONS, Taught, write_store
from tools.peer_layouts import PEERS, Layout

Floats = npt.NDArray[np.float32]
ROWS = 512
"""Positions that are encoded at once."""
DECODE_BASELINE = "top-50, bf16"
TARGET_BYTES = {"threshold:16": 28.0, "threshold:12": 22.0, "top-k:50": 90.0}
TARGET_L1 = 0.015
CURVES = ("threshold:16", "random:50", "top-k:50", "RS-KD, 50 draws", "DistillKit budget", "DistillKit recommended")


@dataclass
class Sums:
    """What is added up over positions."""

    positions: int = 0
    l1: float = 0.0
    """sum |stored - p| over stored entries; a threshold's sampled tail is not an estimate of its own p, and left out"""
    weight: float = 0.0
    worst: float = 0.0
    """largest |sum of weights - 1|"""
    encode_s: float = 0.0

    def add(self, logits: Floats, targets: SparseTargets, stored: Floats) -> None:
        """Positions and what is kept of them; `stored` [n, k] estimates p before any renormalisation."""
        z = logits - logits.max(axis=1, keepdims=True)
        kept = np.take_along_axis(z, targets.ids.astype(np.int64), axis=1)
        p = np.exp(kept, dtype=np.float64) / np.exp(z, out=z).sum(axis=1, dtype=np.float64)[:, None]
        slots = np.arange(stored.shape[1])
        in_head = (slots < targets.head_count[:, None]) & (stored > 0)
        sums = targets.weights.sum(axis=1, dtype=np.float64)
        self.positions += len(targets)
        self.l1 += float((np.abs(stored - p) * in_head).sum())
        self.weight += float(sums.sum())
        self.worst = max(self.worst, float(np.abs(sums - 1).max()))

    def means(self) -> Measured:
        """Per position."""
        n = self.positions
        return {
            "positions": n,
            "l1": self.l1 / n,
            "weight_sum": self.weight / n,
            "weight_sum_error": self.worst,
            "encode_per_s": n / self.encode_s,
        }


def peer(layout: Layout, blocks: Iterator[Floats], meter: FidelityMeter | None = None) -> Measured:
    """A peer's layout on some logits."""
    rng, sums, payloads = np.random.default_rng(SEED), Sums(), []
    for logits in blocks:
        sums.encode_s += spent(lambda z=logits: payloads.append(layout.encode(z, rng))).cpu_s
        targets = bare_targets(*layout.decode(payloads[-1]))
        sums.add(logits, targets, layout.stored_probs(payloads[-1])[1])
        if meter:
            meter.add(logits, targets)
    size = sum(payload.nbytes for payload in payloads) / sums.positions
    time = median_spent({"decode": lambda: [layout.decode(payload) for payload in payloads]})["decode"]
    return sums.means() | {"bytes_per_token": size, "decode_per_s": sums.positions / time.cpu_s}


def bare_targets(ids: npt.NDArray[np.uint32], values: Floats) -> SparseTargets:
    """Ids and weights [n, k] as targets that know nothing of a tail or of labels."""
    n = len(ids)
    nothing = np.zeros(n, np.float32)
    head = (values > 0).sum(axis=1).astype(np.int32)
    return SparseTargets(np.arange(n, dtype=np.int32), ids, values, head, nothing - np.inf, nothing, nothing)


def ours(recipe: Recipe, labels: npt.NDArray[np.int32], logits: Floats, sums: Sums) -> DocumentRecord:
    """Encode a block of logits [n, V] with the labels [n] as if it were a document, and add up what is kept."""
    token_ids = np.concatenate([np.zeros(1, np.int32), labels])
    records = []
    sums.encode_s += spent(lambda: records.append(recipe.record(token_ids, logits))).cpu_s
    targets = recipe.read(records[0])
    sums.add(logits, targets, targets.weights)
    return DocumentRecord(token_ids, records[0])


def decode_all(store: Store) -> Callable[[], None]:
    """Read and decode every document of a store, 8 at a time."""
    documents = [store.token_ids(number) for number in range(len(store))]

    def decode() -> None:
        for at in range(0, len(documents), 8):
            found = [codes for codes in store.codes(documents[at : at + 8]) if codes is not None]
            weights(concatenated(found), store.manifest.recipe.form)

    return decode


def file_bytes(path: Path) -> int:
    """All of a store on disk: a folder's files, or one file."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def zipped(folder: Path, path: Path) -> Path:
    """A store's folder as one zip file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(folder))
    return path


def in_lmdb(path: Path, like: Store, records: list[DocumentRecord]) -> Store:
    """The same records in an LMDB file, a few documents a transaction as a build writes them."""
    store = create_store(path, like.manifest, like.vocabulary)
    with store.writer("bench") as writer:
        for at in range(0, len(records), 4):
            writer.append(records[at : at + 4])
        writer.commit([record.key for record in records])
    return store


def measure(out: Path, tokens: int) -> Measured:
    """Every recipe and peer on the sampled positions of the text."""
    taught = Taught.of(out, tokens)
    logits, rows = taught.logits, []

    def blocks() -> Iterator[Floats]:
        return (np.array(logits[at : at + ROWS]) for at in range(0, len(logits), ROWS))

    baseline = sum(spent(lambda z=block: log_softmax(z)).cpu_s for block in blocks())
    for select in SELECTIONS:
        with scratch(out) as folder:
            rows.append(_measure_ours(taught, select, blocks, folder))
    for name, layout in PEERS:
        meter = FidelityMeter(logits.shape[1])
        sums_of_peer = peer(layout, blocks(), meter)
        rows.append({"name": name, "ours": False} | sums_of_peer | {"fidelity": meter.result().to_json()})
    return {"vocab_size": logits.shape[1], "log_softmax_per_s": len(logits) / baseline, "layouts": rows}


def _measure_ours(taught: Taught, select: str, blocks: Callable[[], Iterator[Floats]], folder: Path) -> Measured:
    """One recipe: written again from the records of the pass, so that packing is timed, to a folder, a zip, an LMDB."""
    like, records = open_store(taught.path(select)), taught.records(select)
    recipe, labels = like.manifest.recipe, np.concatenate([document[1:] for document in taught.documents])
    every = np.concatenate([record.records for record in records])
    timed, sums, meter = Sums(), Sums(), FidelityMeter(recipe.vocab_size)
    for number, block in enumerate(blocks()):
        chosen = taught.sample[number * ROWS : number * ROWS + len(block)]
        ours(recipe, labels[chosen], block, timed)
        targets = recipe.read(every[chosen])
        sums.add(block, targets, targets.weights)
        meter.add(block, targets)
    fidelity = meter.result().to_json()
    create_store(folder / "store.zarr", like.manifest, like.vocabulary)  # which packs the vocabulary, once for good
    packing = spent(partial(write_store, folder / "store.zarr", like, iter(records)))
    store = open_store(folder / "store.zarr")
    store.save_fidelity(fidelity | {"documents": len(store)})
    places = {
        "folder": store,
        "zip": open_store(zipped(folder / "store.zarr", folder / "store.zip")),
        "LMDB": in_lmdb(folder / "store.lmdb", like, records),
    }
    disk = {
        name: {"bytes": file_bytes(Path(place.path)), "planes": place.plane_bytes()} for name, place in places.items()
    }
    decoding = median_spent({"decode": decode_all(store)})["decode"]
    sums.encode_s = timed.encode_s + packing.cpu_s * sums.positions / store.positions
    speed_and_size = {
        "bytes_per_token": disk["folder"]["bytes"] / store.positions,
        "decode_per_s": store.positions / decoding.cpu_s,
    }
    kept = {"name": select, "ours": True, "store_positions": store.positions, "disk": disk, "fidelity": fidelity}
    return kept | sums.means() | speed_and_size


def log_softmax(logits: Floats) -> Floats:
    """The least that any layout has to do: the baseline of encoding. In place, 16 rows at a time."""
    for at in range(0, len(logits), 16):
        z = logits[at : at + 16]
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return logits


def speed_cells(row: Measured, log_softmax_per_s: float, decode_baseline: float) -> tuple[str, ...]:
    """Encode and decode, each with its ratio to a baseline."""
    return (
        f"{row['encode_per_s']:,.0f}",
        f"{row['encode_per_s'] / log_softmax_per_s:.2f}",
        f"{row['decode_per_s'] / 1e3:,.0f}k",
        f"{row['decode_per_s'] / decode_baseline:.2f}",
    )


SPEED_HEADER = ("encode/s", "x log-softmax", "decode/s", f"x {DECODE_BASELINE}")


def found(measured: Measured) -> Found:
    """Tables and figures."""
    rows = measured["layouts"]
    sampled, stored = rows[0]["positions"], rows[0]["store_positions"]
    decode_baseline = next(row["decode_per_s"] for row in rows if row["name"] == DECODE_BASELINE)
    shown = [n for n, _ in rows[0]["fidelity"]["angles"] if n in (16, 256)] + [sampled]
    header = ("layout", "bytes/token", "L1", "sum of weights", *(f"angle at {n:,}" for n in shown), *SPEED_HEADER)
    cells = tuple(
        (
            row["name"],
            f"{row['bytes_per_token']:,.1f}",
            f"{row['l1']:.4f}",
            f"{row['weight_sum']:.4f}",
            *(f"{dict(map(tuple, row['fidelity']['angles']))[n]:.2f}°" for n in shown),
            *speed_cells(row, measured["log_softmax_per_s"], decode_baseline),
        )
        for row in rows
    )
    remark = (
        f"V = {measured['vocab_size']:,}. Ours: bytes of a Zarr folder of {stored:,} positions, everything included; "
        f"L1 of stored entries, sum of weights and the angle between full and stored gradient: {sampled:,} positions, "
        f"spread over the text. Speeds are positions per second of one core's processor time: encode once over the "
        f"{sampled:,}, decode the median of 3 (ours from disk, all {stored:,}; peers from memory). Log-softmax alone: "
        f"{measured['log_softmax_per_s']:,.0f}/s."
    )
    own = [row for row in rows if row["ours"]]
    targets = [
        Target.at_most(f"{row['name']}: bytes per token, everything", TARGET_BYTES[row["name"]], row["bytes_per_token"])
        for row in own
        if row["name"] in TARGET_BYTES
    ]
    for row in own:
        if row["name"].startswith("threshold"):
            targets.append(Target.at_most(f"{row['name']}: L1 of stored entries", TARGET_L1, row["l1"], ".4f"))
            most = "largest |sum of weights - 1|"
            targets.append(Target.at_most(f"{row['name']}: {most}", 1e-3, row["weight_sum_error"], ".1e"))
    tables = (Titled("Size, error and codec speed", remark, Table(header, cells)), *_disk_tables(own))
    return Found(tables, targets, _figures(rows, sampled))


def _disk_tables(own: list[Measured]) -> tuple[Titled, Titled]:
    places, planes, names = [], [], list(own[0]["disk"]["folder"]["planes"])
    for row in own:
        n, folder = row["store_positions"], row["disk"]["folder"]["planes"]
        planes.append((row["name"], *(f"{folder.get(name, 0) / n:.2f}" for name in names)))
        sizes = [
            (disk["bytes"] / n, (disk["bytes"] - disk["planes"]["vocabulary"]) / n) for disk in row["disk"].values()
        ]
        places.append((row["name"], *(f"{size:.2f}" for pair in sizes for size in pair)))
    header = ("recipe", *(text for name in own[0]["disk"] for text in (name, "without vocabulary")))
    of = f"Bytes per token, of {own[0]['store_positions']:,} positions."
    remark = f"{of} The vocabulary is kept once, however many tokens a store has. The zip file is uncompressed."
    return (
        Titled("Size by backend", remark, Table(header, tuple(places))),
        Titled("Size by plane", f"{of} A Zarr folder.", Table(("recipe", *names), tuple(planes))),
    )


def _figures(rows: list[Measured], sampled: int) -> tuple[Figure, ...]:
    def dots(ours: bool, of: Callable[[Measured], float]) -> Series:
        chosen = [row for row in rows if row["ours"] == ours]
        points = [(row["bytes_per_token"], of(row)) for row in chosen]
        names = [row["name"].split(",")[0] for row in chosen]
        return Series("logitstore" if ours else "others, payload alone", points, names, joined=False)

    size = Axis("size", "bytes per token", log=True)
    angle = [dots(ours, lambda row: row["fidelity"]["angles"][-1][1]) for ours in (True, False)]
    error = [dots(ours, lambda row: row["l1"]) for ours in (True, False)]
    by_name = {row["name"]: Fidelity.from_json(row["fidelity"]) for row in rows}
    growth = [Series(name, by_name[name].angles) for name in CURVES]
    return (
        chart(
            angle, f"Size against error over {sampled:,} positions", size, Axis("gradient angle", "degrees", log=True)
        ),
        chart(error, f"Size against L1 of stored entries, {sampled:,} positions", size, Axis("L1", log=True)),
        chart(
            growth,
            "Gradient angle over more and more positions",
            Axis("positions", log=True),
            Axis("angle", "degrees", log=True),
        ),
    )
