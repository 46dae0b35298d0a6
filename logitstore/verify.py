"""Verify a store: hold every byte against what was written, then decode every document.

Names what is bad and goes on. What is being written (names that begin with a dot) is left alone.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from logitstore.entries import read_entry, read_root, shard_name
from logitstore.errors import CorruptStoreError, StoreFormatError
from logitstore.files import CannotList, Files, require_damage
from logitstore.index import block_counts, block_hashes
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.saved_maps import map_folders, map_problems
from logitstore.sealed import (
    DAMAGED,
    GROUP,
    FileEntries,
    Problem,
    are_file_entries,
    file_problems,
    read_group,
    unseal_group,
)
from logitstore.shard import Shard
from logitstore.store import files_at, is_lmdb_store, is_url
from logitstore.stored_index import FOLDER, read_index

STRAY = "is not part of the store"


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was bad."""

    files: int
    documents: int
    positions: int
    problems: list[Problem]


def verify(path: str | Path, *, quiet: bool = False) -> VerifyReport:
    """Check all of a store in a folder, a zip file, an LMDB file or behind a URL.

    A store is good when each file has the digest that its shard's entry (or the root, or the index) names, no file is
    there that nobody names, each document's key is the hash of its tokens, and each record decodes. Over HTTP, which
    lists no files, those that are named are checked.

    Raises:
        StoreNotFoundError, StoreFormatError: there is nothing here to verify.
        StoreLostError: something cannot be read now, which is no damage.
        ServiceError: a server refuses, or does not answer.
    """
    if not is_url(path) and is_lmdb_store(Path(path).expanduser()):
        from logitstore.lmdb_verify import verify_lmdb

        return verify_lmdb(Path(path).expanduser(), quiet=quiet)
    files = files_at(path)
    problems: list[Problem] = []
    documents, positions = 0, 0
    manifest: Manifest | None = None
    try:
        there = files.names()
    except CannotList:
        there = _named(files, path)
    shards: dict[str, set[str]] = {name: set() for name in _shards(files, path)}
    for file in there:
        match file.split("/"):
            case ["shards", name, _, *_] if name in shards:
                shards[name].add(file)
    try:
        root = read_root(files, path)
        manifest = root.manifest
        problems += file_problems(files, "", root.files)
        indexed, found = _index_problems(files, path, set(shards), there)
        problems += found
        measured = f"fidelity/{GROUP}"
        problems += _fidelity_problems(files, measured)
        mapped: set[str] = set()
        for folder in map_folders(files):
            names, found = map_problems(files, folder, manifest.tokenizer)
            mapped |= names
            problems += found
        expected = {GROUP, *root.files, *indexed, measured, *mapped}
        strays = list(_strays(set(there).difference(*shards.values()), expected))
        still = set(files.names()) if strays else set()  # what was replaced since is none
        problems += (problem for problem in strays if problem.file in still)
    except CorruptStoreError:
        problems.append(Problem(GROUP, DAMAGED))

    for name in tqdm(sorted(shards), desc="verify", unit="shard", delay=1, disable=quiet):
        prefix = f"shards/{name}"
        try:
            entry = read_entry(files, prefix)
        except CorruptStoreError:
            if _is_shard(files, name):
                problems.append(Problem(f"{prefix}/{GROUP}", DAMAGED))
            continue
        listed = {f"{prefix}/{file}" for file in (*entry.files, GROUP)}
        broken = [*_strays(shards[name], listed)]
        broken += (Problem(f"{prefix}/{p.file}", p.fault) for p in file_problems(files, prefix, entry.files))
        if manifest and not broken:
            try:
                broken += content_problems(Shard(files, name, manifest.recipe), manifest)
            except CorruptStoreError:
                broken.append(Problem(f"{prefix}/{GROUP}", DAMAGED))
        if broken and not _is_shard(files, name):
            continue
        problems += broken
        documents += entry.documents
        positions += entry.positions
    return VerifyReport(len(there), documents, positions, problems)


def _shards(files: Files, path: str | Path) -> set[str]:
    try:
        return files.folders("shards")
    except CannotList as error:
        index = read_index(files, path)
        if index is None:
            raise StoreFormatError(f"{path} has no index, so a plain web server does not tell what is there") from error
        return set(index.shards)


def _is_shard(files: Files, name: str) -> bool:
    """Whether a shard is still there: `gc` and `repair` take some away."""
    try:
        return name in files.folders("shards")
    except CannotList:
        return True


def _named(files: Files, path: str | Path) -> list[str]:
    """The files that the store itself names, as far as they are there."""
    with suppress(CorruptStoreError):
        groups: dict[str, FileEntries] = {"": read_root(files, path).files}
        for folder in (FOLDER, "fidelity", *(f"shards/{name}" for name in sorted(_shards(files, path)))):
            with suppress(CorruptStoreError, FileNotFoundError):  # told where it is checked
                entries = unseal_group(read_group(files, folder), folder).get("files")
                groups[f"{folder}/"] = entries if are_file_entries(entries) else {}
        named = {folder + name for folder, entries in groups.items() for name in (GROUP, *entries)}
        return sorted(name for name in named if not name.startswith("."))
    return []


def _index_problems(
    files: Files, path: str | Path, shards: set[str], there: list[str]
) -> tuple[set[str], list[Problem]]:
    """The files of the index, and what is wrong with it; a shard that only the index knows has been taken away."""
    mine = {name for name in there if name.startswith(f"{FOLDER}/")}
    if not mine:
        return set(), []
    while True:
        try:
            before, index = _index_group(files), read_index(files, path)
        except CorruptStoreError:
            return mine, [Problem(f"{FOLDER}/{GROUP}", DAMAGED)]
        if index is None:  # files of what is no index, or of one that is being replaced
            return mine if f"{FOLDER}/{GROUP}" in mine else set(), []
        problems = [Problem(f"{FOLDER}/{p.file}", p.fault) for p in file_problems(files, FOLDER, index.files)]
        if not problems or _index_group(files) == before:
            break
    problems += [
        Problem(f"shards/{name}", "is gone; the index knows it")
        for name in index.shards
        if name not in shards and not _is_shard(files, name)
    ]
    return {f"{FOLDER}/{name}" for name in (*index.files, GROUP)}, problems


def _index_group(files: Files) -> bytes | None:
    with suppress(OSError):  # told by who reads it whole
        return read_group(files, FOLDER)
    return None


def _fidelity_problems(files: Files, name: str) -> Iterator[Problem]:
    try:
        unseal_group(read_group(files, "fidelity"), name)
    except FileNotFoundError:
        return
    except (CorruptStoreError, OSError) as error:
        require_damage(error, name)
        yield Problem(name, DAMAGED)


def _strays(found: set[str], expected: set[str]) -> Iterator[Problem]:
    for name in sorted(found - expected):
        yield Problem(name, STRAY)


def content_problems(shard: Shard, manifest: Manifest) -> Iterator[Problem]:
    """Whether the bytes that were written make sense: a fault here is the builder's, not the disk's."""
    if shard.entry.fingerprint != manifest.fingerprint:
        yield Problem(f"{shard.where}/{GROUP}", "belongs to another store")
        return
    try:
        keys, lengths, blocks = shard.keys, shard.lengths, shard.blocks
        yield from shard.array_problems()
    except CorruptStoreError as error:
        yield Problem(f"{shard.where}/{GROUP}", f"does not fit its arrays: {error}")
        return
    if shard_name(keys.tobytes()) != shard.name:
        yield Problem(f"{shard.where}/documents", "the shard's name is not the hash of its keys")
    block_ends = np.cumsum(block_counts(lengths))
    for document, key in enumerate(keys):
        try:
            record = shard.document(document)
            if record.key != key.tobytes():
                yield Problem(
                    f"{shard.where}/documents", f"the key of document {document} is not the hash of its tokens"
                )
            if record.token_ids.max() >= manifest.recipe.vocab_size or record.token_ids.min() < 0:
                yield Problem(f"{shard.where}/documents", f"document {document} has a token beyond the vocabulary")
            expected = block_hashes(record.token_ids)
            if blocks[block_ends[document] - len(expected) : block_ends[document]].tolist() != expected:
                yield Problem(f"{shard.where}/blocks", f"document {document} does not begin as they say")
            yield from _weight_problems(shard, document, record, manifest)
        except CorruptStoreError as error:
            yield Problem(f"{shard.where}/{GROUP}", f"document {document} does not decode: {error}")


def _weight_problems(shard: Shard, document: int, record: DocumentRecord, manifest: Manifest) -> Iterator[Problem]:
    if not are_weights(record, manifest.recipe):
        yield Problem(f"{shard.where}/{GROUP}", f"document {document} has weights that no distribution has")


def are_weights(record: DocumentRecord, recipe: Recipe) -> bool:
    """Whether every set of entries of a document has weights that a distribution may have."""
    most = 1 + 1e-3 if recipe.form.sums_to_one or recipe.form.counts else np.inf
    for temperature in recipe.temperatures:
        for replica in range(recipe.replicas):
            weights = recipe.read(record.records, temperature, replica).weights
            if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights.sum(axis=1) <= most).all()):
                return False
    return True


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
