"""Larger vocabularies than the demo's teacher has, on made-up logits: size, error and codec speed, on one core.

A row of logits is a Zipf law over the whole vocabulary, noise, and 64 tokens that the context favours: about as peaked
as a small language model's. What it cannot show is how often real text repeats its tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstore.figure import Table
from logitstore.manifest import Manifest, TeacherIdentity, TokenizerIdentity
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.selection import Selection
from logitstore.store import create_store
from logitstore.vocabulary import Vocabulary
from tools.bench_layouts import (
    DECODE_BASELINE,
    SPEED_HEADER,
    TARGET_L1,
    Sums,
    decode_all,
    file_bytes,
    log_softmax,
    ours,
    peer,
    speed_cells,
)
from tools.bench_parts import Found, Measured, Target, Titled, median_spent, scratch, spent
from tools.bench_text import SEED
from tools.peer_layouts import PEERS

VOCAB_SIZES = (151_936, 262_144)
SELECT = "threshold:16"
POSITIONS = 8_192
PEER_POSITIONS = 2_048
ROWS = 256
FAVOURED = 64

Floats = npt.NDArray[np.float32]


def synthetic_logits(vocab_size: int, positions: int) -> Iterator[tuple[Floats, npt.NDArray[np.int32]]]:
    """Blocks of logits [ROWS, V], and labels [ROWS] drawn from them by the Gumbel trick on what the context favours."""
    rng = np.random.default_rng(SEED)
    frequent = rng.permutation(vocab_size)
    base = np.empty(vocab_size, np.float32)
    base[frequent] = -1.1 * np.log(np.arange(1.0, vocab_size + 1))
    noise = rng.standard_normal(4 * vocab_size, np.float32)
    for _ in range(0, positions, ROWS):
        logits = np.empty((ROWS, vocab_size), np.float32)
        for row, at in zip(logits, rng.integers(0, 3 * vocab_size, ROWS).tolist(), strict=True):
            np.add(base, noise[at : at + vocab_size], out=row)
        # The ids that a context favours are frequent ones: ranks by a Zipf law, too.
        ranks = np.exp(rng.random((ROWS, FAVOURED)) * np.log(vocab_size)).astype(np.int64) - 1
        favoured = frequent[ranks]
        boosts = 5.0 + rng.normal(0, 0.5, (ROWS, 1)) - 1.6 * np.log(np.arange(1.0, FAVOURED + 1))
        np.put_along_axis(logits, favoured, (boosts + 1.5).astype(np.float32), axis=1)
        drawn = (np.take_along_axis(logits, favoured, axis=1) + rng.gumbel(size=favoured.shape)).argmax(axis=1)
        yield logits, favoured[np.arange(ROWS), drawn].astype(np.int32)


def measure(out: Path, _tokens: int) -> Measured:
    """Each vocabulary in turn."""
    return {"vocabularies": [_vocabulary(out, vocab_size) for vocab_size in VOCAB_SIZES]}


def _vocabulary(out: Path, vocab_size: int) -> Measured:
    recipe = Recipe(Selection.parse(SELECT), (1.0,), SEED, vocab_size)
    vocabulary = Vocabulary(tuple(b"%d" % i for i in range(vocab_size)), frozenset(), None, None)
    teacher = TeacherIdentity("synthetic", "0" * 32, None, None, None, "float32")
    manifest = Manifest(teacher, TokenizerIdentity(vocabulary.fingerprint(), vocab_size, None), recipe)
    sums, records = Sums(), list[DocumentRecord]()
    baseline, entropy = 0.0, 0.0
    for logits, labels in synthetic_logits(vocab_size, POSITIONS):
        records.append(ours(recipe, labels, logits, sums))
        entropy += float(recipe.read(records[-1].records).entropy.sum())
        if sums.positions <= PEER_POSITIONS:
            baseline += spent(lambda z=logits: log_softmax(z)).cpu_s
    with scratch(out) as folder:
        store = create_store(folder / "store.zarr", manifest, vocabulary)
        sums.encode_s += spent(lambda: store.write_documents(records)).cpu_s
        planes = store.plane_bytes()
        size = file_bytes(folder / "store.zarr") - planes["vocabulary"]
        decoding = median_spent({"decode": decode_all(store)})["decode"]
    own = sums.means() | {
        "name": SELECT,
        "bytes_per_token": size / POSITIONS,
        "entries_and_positions": (planes["entries-0"] + planes["positions"]) / POSITIONS,
        "decode_per_s": POSITIONS / decoding.cpu_s,
    }
    rows = [own]
    for name, layout in PEERS:
        blocks = (logits for logits, _ in synthetic_logits(vocab_size, PEER_POSITIONS))
        rows.append({"name": name} | peer(layout, blocks))
    return {
        "vocab_size": vocab_size,
        "entropy": entropy / POSITIONS,
        "log_softmax_per_s": PEER_POSITIONS / baseline,
        "layouts": rows,
    }


def found(measured: Measured) -> Found:
    """A table for each vocabulary."""
    tables, targets = [], []
    for part in measured["vocabularies"]:
        rows = part["layouts"]
        decode_baseline = next(row["decode_per_s"] for row in rows if row["name"] == DECODE_BASELINE)
        cells = tuple(
            (
                row["name"],
                f"{row['positions']:,}",
                f"{row['bytes_per_token']:,.1f}",
                f"{row['l1']:.4f}",
                f"{row['weight_sum']:.4f}",
                *speed_cells(row, part["log_softmax_per_s"], decode_baseline),
            )
            for row in rows
        )
        remark = (
            f"Mean entropy {part['entropy']:.2f} nats. Ours: everything on disk but the vocabulary, which is made up; "
            f"{rows[0]['entries_and_positions']:.1f} of it grows with the positions, the rest is one shard's metadata. "
            f"Numbers are means over the positions of the second column. Log-softmax alone: "
            f"{part['log_softmax_per_s']:,.0f}/s."
        )
        header = ("layout", "positions", "bytes/token", "L1", "sum of weights", *SPEED_HEADER)
        title = f"Synthetic logits, V = {part['vocab_size']:,}"
        tables.append(Titled(title, remark, Table(header, cells)))
        l1 = f"{SELECT}, V = {part['vocab_size']:,}: L1 of stored entries"
        targets.append(Target.at_most(l1, TARGET_L1, rows[0]["l1"], ".4f"))
    return Found(tables, targets)
