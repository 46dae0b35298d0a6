"""What a store consists of when it is moved: parts, each of which is at its destination whole or not at all.

A part is a sealed group: its `zarr.json`, and the files that this names with sizes and digests. Whoever holds a part's
`zarr.json` knows what the rest must be, so bytes from anywhere are believed once they have their digest. The index is
no part: it is derived, and written again where the shards have arrived.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil
from pathlib import PurePosixPath
from typing import Any

from logitstore import hidden_states, position_streams, streams
from logitstore.entries import SHARD_NAME, ShardEntry, damaged, entry_of, root_of
from logitstore.errors import IncompatibleStoreError
from logitstore.files import CannotList, Files
from logitstore.manifest import Manifest
from logitstore.saved_maps import MOST_LINKS, map_folders
from logitstore.sealed import GROUP, FileEntries, are_file_entries, file_digest, read_group, unseal_group
from logitstore.shard import DOCUMENT_BYTES
from logitstore.stored_index import indexed_shards
from logitstore.stored_vocabulary import MOST_BYTES
from logitstore.zarr_store import MAP_PREFIX

ROOT, FIDELITY = "root", "fidelity"
_MAP = re.compile(r"map-[0-9a-f]{32}")
SMALL_BYTES = 64 << 10
"""Of a `zarr.json` of an array, and of a frame beyond its bytes: room, not what is written."""
MOST_RANKS = 8192


@dataclass(frozen=True)
class Part:
    """A sealed group of a store."""

    name: str
    """`root`, a shard's name, `map-F` or `fidelity`."""
    group: bytes
    """Its `zarr.json`."""
    files: FileEntries
    """What else it consists of, by names from its folder; checked to be names inside of it, of bounded sizes."""

    @property
    def folder(self) -> str:
        """Where it lies in a store; "": in its own folder."""
        return folder_of(self.name)

    @cached_property
    def digest(self) -> str:
        """Of its `zarr.json`, and so of all of it."""
        return file_digest(self.group)

    @property
    def total_bytes(self) -> int:
        """All of its bytes."""
        return len(self.group) + sum(int(entry["bytes"]) for entry in self.files.values())

    def path(self, file: str = GROUP) -> str:
        """A file's name from the store's folder."""
        return f"{self.folder}/{file}" if self.folder else file


def is_part_name(name: str) -> bool:
    """Whether a part may be called so."""
    return name in (ROOT, FIDELITY) or bool(SHARD_NAME.fullmatch(name) or _MAP.fullmatch(name))


def folder_of(name: str) -> str:
    """Where a part lies in a store."""
    if name == ROOT:
        return ""
    return name if name == FIDELITY else f"vocabulary-{name}" if name.startswith("map-") else f"shards/{name}"


def root_part(group: bytes, where: object) -> tuple[Part, Manifest]:
    """A store's root, and what made the store.

    Raises:
        StoreFormatError, CorruptStoreError: as their names say.
    """
    root = root_of(group, f"{where}/{GROUP}", where)
    if not all(name == f"shards/{GROUP}" or name.startswith("vocabulary/") for name in root.files):
        raise damaged(f"{where}/{GROUP}", "names files that are none of a root")
    vocabulary_bytes = MOST_BYTES + 4 * root.manifest.tokenizer.size
    return Part(ROOT, group, _checked(root.files, vocabulary_bytes, f"{where}/{GROUP}")), root.manifest


def part_of(name: str, group: bytes, manifest: Manifest, where: object) -> Part:
    """A part of the store that a manifest describes, by the bytes of its `zarr.json`.

    Raises:
        CorruptStoreError: they are damaged, or say what no logitstore writes.
        IncompatibleStoreError: they are another store's.
    """
    path = f"{where}/{folder_of(name)}/{GROUP}"
    found: object
    expected: object
    if name == FIDELITY:
        unseal_group(group, path)
        return Part(name, group, {})
    if name.startswith("map-"):
        said = unseal_group(group, path)
        if not are_file_entries(said.get("files")):
            raise damaged(path, "says what no logitstore writes")
        found, expected = (said.get("teacher"), said.get("student")), (manifest.tokenizer.fingerprint, name[4:])
        most = 4 * (2 * manifest.tokenizer.size + MOST_LINKS)
    else:
        entry = entry_of(group, path)
        said, found, expected = {"files": entry.files}, entry.fingerprint, manifest.fingerprint
        most = _most_shard_bytes(entry, manifest)
    if found != expected:
        raise IncompatibleStoreError(
            f"{path} belongs to {found}, expected {expected}; move that folder out of its store"
        )
    return Part(name, group, _checked(said["files"], most, path))


def part_names(files: Files, where: object) -> list[str]:
    """The parts of a store but for its root, as far as they can be told: by listing, else by the index.

    Raises:
        CorruptStoreError: a folder that is no shard, or a damaged index.
        CannotList: neither.
        OSError: the place cannot be read.
    """
    try:
        shards = sorted(files.folders("shards"))
    except CannotList:
        indexed = indexed_shards(files, where)
        if indexed is None:
            raise
        shards = sorted(indexed)
    for name in shards:
        if not SHARD_NAME.fullmatch(name):
            raise damaged(f"{where}/shards/{name}", "is no shard's name")
    maps = [name.removeprefix(MAP_PREFIX.removesuffix("map-")) for name in map_folders(files)]
    return [*shards, *maps, FIDELITY]


def parts_of(files: Files, names: list[str], manifest: Manifest, where: object) -> Iterator[Part]:
    """Parts by their names; one that is gone by now is passed over.

    Raises:
        CorruptStoreError, IncompatibleStoreError: as `part_of`.
        OSError: the place cannot be read.
    """
    for name in names:
        try:
            group = read_group(files, folder_of(name))
        except FileNotFoundError:
            continue
        yield part_of(name, group, manifest, where)


def _checked(files: FileEntries, most_bytes: int, path: str) -> FileEntries:
    """The files, none outside the folder or within another, together no larger than they can be."""
    total = 0
    for name, entry in files.items():
        pure = PurePosixPath(name)
        inside = pure.as_posix() == name and name != GROUP and not any(part.startswith(".") for part in pure.parts)
        if not inside or type(entry["bytes"]) is not int or entry["bytes"] < 0 or "\\" in name or ":" in name:
            raise damaged(path, f"names a file {name!r} that no logitstore writes")
        if any("/".join(above) in files for above in accumulate(([p] for p in pure.parts[:-1]), lambda a, b: a + b)):
            raise damaged(path, f"names a file {name!r} within a file")
        total += entry["bytes"]
    most = most_bytes + most_bytes // 32 + SMALL_BYTES * (len(files) + 1)
    if total > most:
        raise damaged(path, f"names {total:,} bytes, where {most:,} are the most that there can be")
    return files


def _most_shard_bytes(entry: ShardEntry, manifest: Manifest) -> int:
    """What the arrays of a shard may take when nothing of them can be compressed."""
    recipe, positions = manifest.recipe, entry.positions
    n = streams.chunk_positions(positions, recipe.form)
    beside = position_streams.most_chunk_bytes(n, recipe.form, len(recipe.log_z))
    chunk = recipe.sets * streams.most_chunk_bytes(n, recipe.form) + beside + (recipe.sets + 1) * 256
    m = hidden_states.chunk_positions(positions, recipe.hidden_size)
    layer = ceil(positions / m) * (m * hidden_states.layer_width(recipe.hidden_size) + 256)
    blocks = 8 * (positions // 256 + 3 * entry.documents)
    small: Any = entry.documents * DOCUMENT_BYTES + blocks + 4 * MOST_RANKS
    return int(ceil(positions / n) * chunk + len(recipe.hidden_layers) * layer + small)
