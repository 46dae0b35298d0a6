"""Part of `torture_store`: SIGKILL at random moments of everything that writes, then the same command once more.

After each kill every row that a reader finds is right, every row that was acknowledged is there, and when the command
has been run again the bytes are those of a run that nobody disturbed.
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import numpy as np
import numpy.typing as npt

from logitstore import plan
from logitstore.build import BuildConfig, build
from logitstore.journal import WRITE_BACK
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.merge import convert, merge
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.repair import repair
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from tests.children import finish, forked, killed, scratch
from tests.stores import VOCAB, VOCABULARY, contents, manifest, records
from tests.test_build import write_dataset
from tests.tiny import save_tiny_model

SEEDS = range(10, 60)
LENGTHS = [40, 5]
TRIES = 20


@dataclass
class Scene:
    """Something that writes, in a folder of its own."""

    name: str
    run: Callable[[Path, int], None]
    """Do it; a line goes into the pipe for each batch that is acknowledged."""
    out: str
    """What it writes."""
    prepare: Callable[[Path], None] = lambda _folder: None
    acknowledged: bool = False
    duration: float = 0.0
    kills: int = 0
    bad: list[str] = field(default_factory=list)


@cache
def batch(seed: int) -> list[DocumentRecord]:
    return records(LENGTHS, seed=seed)


def write_all(path: Path, pipe: int, name: str = WRITE_BACK) -> None:
    """What `distill-train --write-back` does to a store: append what a teacher answered, now and then commit."""
    store = open_store(path) if path.exists() else create_store(path, manifest(), VOCABULARY)
    with store.writer(name) as writer:
        for seed in SEEDS:
            fresh = [document for document in batch(seed) if document.key not in writer]
            if fresh:
                writer.append(fresh)
            os.write(pipe, b"%d\n" % seed)
            if seed % 10 == 9:
                mine = [document.key for s in range(seed - 9, seed + 1) for document in batch(s)]
                writer.commit([key for key in mine if key in writer.pending])


class Answers:
    """In place of a teacher, what it answered when the store was built."""

    tokenizer: Any = None
    vocab_size = VOCAB

    def manifest(self, _recipe: Recipe) -> Manifest:
        return manifest()

    def submit(
        self, sequences: Sequence[npt.NDArray[np.int32]], _recipe: Recipe, _run: object
    ) -> list[Callable[[], DocumentRecord]]:
        known = {d.key: d for s in SEEDS for d in batch(s)}
        return [partial(known.__getitem__, document_key(token_ids)) for token_ids in sequences]


def scenes(home: Path) -> Iterator[Scene]:
    """Everything that writes."""

    def one_build(folder: Path, _pipe: int) -> None:
        build(
            BuildConfig(str(home / "tiny"), str(home / "train.jsonl"), folder / "s.zarr", batch_tokens=100, quiet=True)
        )

    def parts(folder: Path) -> list[Path]:
        return [folder / "part0.zarr", folder / "part1.zarr"]

    def copied(folder: Path) -> None:
        for part in parts(home):
            shutil.copytree(part, folder / part.name)

    def broken(folder: Path) -> None:
        shutil.copytree(home / "part0.zarr", folder / "s.zarr")
        file = min((folder / "s.zarr" / "shards").glob("*/entries-0/c/0/0"))
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])

    yield Scene("build", one_build, "s.zarr")
    for suffix in (".zarr", ".lmdb"):
        out = f"s{suffix}"
        yield Scene(f"write-back to {suffix}", lambda f, p, out=out: write_all(f / out, p), out, acknowledged=True)
    for suffix in (".zarr", ".lmdb", ".zip"):
        out = f"s{suffix}"
        yield Scene(
            f"convert to {suffix}", lambda f, _p, out=out: convert(parts(f)[0], f / out, quiet=True), out, copied
        )
        yield Scene(f"merge to {suffix}", lambda f, _p, out=out: merge(parts(f), f / out, quiet=True), out, copied)
    yield Scene("repair", lambda f, _p: repair(f / "s.zarr", Answers(), quiet=True), "s.zarr", broken)


def make(home: Path) -> None:
    """What the scenes begin with."""
    for shard in range(2):
        store = create_store(home / f"part{shard}.zarr", manifest(), VOCABULARY)
        with store.writer("build") as writer:
            for seed in (s for s in SEEDS if s % 3 != shard):  # a third of all in both
                writer.append(batch(seed))
                if seed % 10 == 9:
                    writer.commit(list(writer.pending))
            writer.commit(list(writer.pending))
    save_tiny_model(home / "tiny", layers=1)
    write_dataset(home / "train.jsonl", 24)


def kills(count: int, seed: int, say: Callable[[str], object]) -> list[Scene]:
    """Kill what there is `count` times in all, at random moments."""
    plan.SHARD_POSITIONS = 150
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        home = Path(folder)
        finish(forked(lambda: make(home)))
        found = list(scenes(home))
        for s in SEEDS:
            batch(s)
        rights = {scene.name: undisturbed(scene, home / "whole") for scene in found}
        for number in range(count):
            scene = found[number % len(found)]
            problem = one_kill(scene, home / "trial", rights[scene.name], rng)
            scene.kills += 1
            if problem:
                scene.bad.append(problem)
                say(f"{scene.name}: {problem}")
    return found


def undisturbed(scene: Scene, folder: Path) -> dict[str, bytes]:
    """The bytes of a run to its end, and how long it takes."""
    folder.mkdir()
    scene.prepare(folder)
    begun = time.perf_counter()
    finish(forked(lambda: scene.run(folder, os.open(os.devnull, os.O_WRONLY))))
    scene.duration = time.perf_counter() - begun
    found = asked(lambda: rows(folder / scene.out)) if is_lmdb(scene) else contents_of(folder / scene.out)
    shutil.rmtree(folder)
    return found


def one_kill(scene: Scene, folder: Path, right: Mapping[str, bytes], rng: random.Random) -> str:
    """Kill it once, look, and let it run to its end; what is wrong, if anything."""
    moment = rng.uniform(0, scene.duration)
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        scene.prepare(folder)
        reading, writing = os.pipe()
        child = forked(partial(scene.run, folder, writing))
        os.close(writing)
        time.sleep(moment)
        if killed(child):
            break
        os.close(reading)
        moment *= 0.9  # it had ended: this run was faster
    else:
        return "it always ended before it was killed"
    with os.fdopen(reading, "rb") as pipe:
        acknowledged = [int(line) for line in pipe.read().split()]
    try:
        finish(forked(lambda: look(scene, folder / scene.out, acknowledged)))
        finish(forked(lambda: scene.run(folder, os.open(os.devnull, os.O_WRONLY))))
        if is_lmdb(scene):
            found = asked(lambda: rows(folder / scene.out))
            finish(forked(lambda: require_good(folder / scene.out)))
        else:
            found = contents_of(folder / scene.out)
    except SystemExit as error:
        return f"killed after {moment:.3f} of {scene.duration:.3f} s: {error}"
    different = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if different or left:
        return f"killed after {moment:.3f} of {scene.duration:.3f} s: other bytes in {different[:4]}, left over {left}"
    return ""


def look(scene: Scene, path: Path, acknowledged: Sequence[int]) -> None:
    """What a reader finds after a kill is right, and what was acknowledged is there, at the latest for the writer."""
    if not path.exists():
        assert not acknowledged, "a row that was acknowledged is lost"
        return
    if scene.name != "repair":
        require_good(path)
    if scene.acknowledged:
        with suppress(KeyboardInterrupt), open_store(path).writer(WRITE_BACK) as writer:
            assert all(d.key in writer for s in acknowledged for d in batch(s)), "an acknowledged row is lost"
            known = {d.key: d.records.tobytes() for s in SEEDS for d in batch(s)}
            assert all(d.records.tobytes() == known[d.key] for d in writer.pending.values()), "a pending row is wrong"
            raise KeyboardInterrupt


def require_good(path: Path) -> None:
    problems = verify(path, quiet=True).problems
    assert not problems, problems
    store = open_store(path)
    known = {d.key: d.records.tobytes() for s in SEEDS for d in batch(s)}
    for number in range(len(store)):
        record = store.record(number)
        assert record.records.tobytes() == known.get(record.key, record.records.tobytes()), "a row is wrong"


def contents_of(path: Path) -> dict[str, bytes]:
    return contents(path) if path.is_dir() else {path.name: path.read_bytes()}


def is_lmdb(scene: Scene) -> bool:
    return scene.out.endswith(".lmdb")


def rows(path: Path) -> dict[str, bytes]:
    """Of an LMDB file, whose pages tell in which transactions it was written: every row, by number."""
    store = open_store(path)
    found = [store.record(number) for number in range(len(store))]
    return {f"document {n}": r.token_ids.tobytes() + r.records.tobytes() for n, r in enumerate(found)}


def asked(question: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """An answer of a process of its own: this one opens no LMDB, which may not be inherited."""
    reading, writing = os.pipe()
    child = forked(lambda: tell(writing, question()))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    finish(child)
    return {name.decode(): bytes.fromhex(value.decode()) for name, value in (line.split(b"\t") for line in lines)}


def tell(pipe: int, answer: Mapping[str, bytes]) -> None:
    with os.fdopen(pipe, "wb") as out:
        out.writelines(f"{name}\t{value.hex()}\n".encode() for name, value in answer.items())
