"""Verify a store: hold every byte against what was written, then decode every document. Names what is bad and goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from logitstore.errors import CorruptStoreError
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.recipe import Recipe
from logitstore.zarr_store import GROUP, Problem, Shard, file_problems, read_entry, read_root

DAMAGED = "its bytes are not those that were written"


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was bad."""

    files: int
    documents: int
    positions: int
    problems: list[Problem]


def verify(path: Path, *, quiet: bool = False) -> VerifyReport:
    """Check all of a store.

    A store is good when each file has the digest that its shard's entry (or the root) names, no file is there that nobody names,
    each document's key is the hash of its tokens, and each record decodes.

    Raises:
        StoreNotFoundError, StoreFormatError: there is nothing here to verify.
    """
    problems: list[Problem] = []
    known, documents, positions = {GROUP}, 0, 0
    recipe: Recipe | None = None
    try:
        root = read_root(path)
        manifest = Manifest.from_json(root["logitstore"], path)
        recipe = manifest.recipe
        known.update(root["files"])
        problems += file_problems(path, root["files"])
    except CorruptStoreError:
        problems.append(Problem(GROUP, DAMAGED))
        known.update(_names(path, path / "vocabulary"), [f"shards/{GROUP}"])

    shards = sorted(p for p in (path / "shards").glob("[!.]*") if p.is_dir())
    for folder in tqdm(shards, desc="verify", unit="shard", delay=1, disable=quiet):
        known.update(_names(path, folder))
        prefix = folder.relative_to(path).as_posix()
        try:
            entry = read_entry(folder)
        except CorruptStoreError:
            problems.append(Problem(f"{prefix}/{GROUP}", DAMAGED))
            continue
        listed = {f"{prefix}/{name}" for name in [*entry["files"], GROUP]}
        problems += (Problem(name, "is not part of the store") for name in sorted(_names(path, folder) - listed))
        broken = [Problem(f"{prefix}/{p.file}", p.fault) for p in file_problems(folder, entry["files"])]
        problems += broken
        if not broken and recipe:
            if entry["fingerprint"] != manifest.fingerprint:
                problems.append(Problem(f"{prefix}/{GROUP}", "belongs to another store"))
            problems += _content_problems(Shard(folder, entry, checked=True), recipe, prefix)
        documents += entry["documents"]
        positions += entry["positions"]
    unknown = sorted(name for name in _names(path, path) - known if not name.startswith("."))
    problems += (Problem(name, "is not part of the store") for name in unknown)
    return VerifyReport(len(known), documents, positions, problems)


def _content_problems(shard: Shard, recipe: Recipe, prefix: str) -> Iterator[Problem]:
    """Whether the bytes that were written make sense: a fault here is the builder's, not the disk's."""
    for document, key in enumerate(shard.keys):
        if document_key(shard.token_ids(document)) != key.tobytes():
            yield Problem(f"{prefix}/keys", f"the key of document {document} is not the hash of its tokens")
        try:
            targets = recipe.read(shard.records(document))
        except ValueError as error:
            yield Problem(f"{prefix}/records", f"document {document} does not decode: {error}")
            continue
        if not (np.isfinite(targets.weights).all() and (targets.weights.sum(axis=1) < 1 + 1e-3).all()):
            yield Problem(f"{prefix}/records", f"document {document} has weights that no distribution has")


def _names(root: Path, folder: Path) -> set[str]:
    """Every file below a folder, by its path from the root."""
    return {file.relative_to(root).as_posix() for file in folder.rglob("*") if file.is_file()}


def to_json(report: VerifyReport) -> dict[str, Any]:
    """The report as JSON values."""
    problems = [{"file": p.file, "fault": p.fault} for p in report.problems]
    return {
        "ok": not problems,
        "files": report.files,
        "documents": report.documents,
        "positions": report.positions,
        "problems": problems,
    }
