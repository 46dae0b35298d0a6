"""Verify a store: hold every byte against what was written, then decode every document.

Names what is bad and goes on. What is being written (names that begin with a dot) is left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from logitstore.entries import read_root, shard_name, shard_names
from logitstore.errors import CorruptStoreError
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.sealed import DAMAGED, GROUP, Problem, file_problems, files_below
from logitstore.zarr_store import Shard


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was bad."""

    files: int
    documents: int
    positions: int
    problems: list[Problem]


def verify(path: Path, *, quiet: bool = False) -> VerifyReport:
    """Check all of a store.

    A store is good when each file has the digest that its shard's entry (or the root) names, no file is there that
    nobody names, each document's key is the hash of its tokens, and each record decodes.

    Raises:
        StoreNotFoundError, StoreFormatError: there is nothing here to verify.
    """
    problems: list[Problem] = []
    documents, positions = 0, 0
    manifest: Manifest | None = None
    files = files_below(path)
    shards: dict[str, set[str]] = {name: set() for name in shard_names(path)}
    for file in files:
        match file.split("/"):
            case ["shards", name, _, *_]:
                shards[name].add(file)
    try:
        root = read_root(path)
        manifest = root.manifest
        problems += file_problems(path, root.files)
        problems += _strays(files.difference(*shards.values()), {GROUP, *root.files})
    except CorruptStoreError:
        problems.append(Problem(GROUP, DAMAGED))

    for name in tqdm(sorted(shards), desc="verify", unit="shard", delay=1, disable=quiet):
        prefix = f"shards/{name}"
        try:
            shard = Shard(path / prefix, manifest.recipe.record_width if manifest else 0)
        except CorruptStoreError:
            problems.append(Problem(f"{prefix}/{GROUP}", DAMAGED))
            continue
        listed = {f"{prefix}/{file}" for file in (*shard.entry.files, GROUP)}
        broken = [*_strays(shards[name], listed)]
        broken += (Problem(f"{prefix}/{p.file}", p.fault) for p in file_problems(shard.path, shard.entry.files))
        problems += broken
        if manifest and not broken:
            problems += _content_problems(shard, manifest, prefix)
        documents += shard.entry.documents
        positions += shard.entry.positions
    return VerifyReport(len(files), documents, positions, problems)


def _strays(found: set[str], expected: set[str]) -> Iterator[Problem]:
    for name in sorted(found - expected):
        yield Problem(name, "is not part of the store")


def _content_problems(shard: Shard, manifest: Manifest, prefix: str) -> Iterator[Problem]:
    """Whether the bytes that were written make sense: a fault here is the builder's, not the disk's."""
    if shard.entry.fingerprint != manifest.fingerprint:
        yield Problem(f"{prefix}/{GROUP}", "belongs to another store")
        return
    try:
        token_ids, records = shard.values("token_ids"), shard.values("records")
        keys, lengths = shard.keys, np.diff(shard.ends, prepend=0)
    except CorruptStoreError as error:
        yield Problem(f"{prefix}/{GROUP}", f"does not fit its arrays: {error}")
        return
    if shard_name(keys.tobytes()) != shard.path.name:
        yield Problem(f"{prefix}/keys", "the shard's name is not the hash of its keys")
    if lengths.sum() != len(token_ids) or (lengths < 2).any():
        yield Problem(f"{prefix}/ends", "the documents' lengths are not those of the tokens")
        return
    if token_ids.max(initial=0) >= manifest.recipe.vocab_size:
        yield Problem(f"{prefix}/token_ids", f"token {token_ids.max()} of {manifest.recipe.vocab_size:,}")
        return
    for document, key in enumerate(keys):
        if document_key(token_ids[shard.token_span(document)]) != key.tobytes():
            yield Problem(f"{prefix}/keys", f"the key of document {document} is not the hash of its tokens")
        try:
            targets = manifest.recipe.read(records[shard.record_span(document)])
        except ValueError as error:
            yield Problem(f"{prefix}/records", f"document {document} does not decode: {error}")
            continue
        if not (np.isfinite(targets.weights).all() and (targets.weights.sum(axis=1) < 1 + 1e-3).all()):
            yield Problem(f"{prefix}/records", f"document {document} has weights that no distribution has")


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
