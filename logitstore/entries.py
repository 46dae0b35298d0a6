"""What a store's `zarr.json` files say: the manifest, and the entry of each shard; checked before it is believed."""

import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError, CorruptStoreError, LogitstoreError, StoreFormatError, first_line
from logitstore.files import Files, require_damage
from logitstore.manifest import Manifest
from logitstore.sealed import GROUP, FileEntries, are_file_entries, read_group, unseal_group
from logitstore.vocabulary import Vocabulary

MOST_POSITIONS = 1 << 28
"""Of one shard: a thousand times what a build puts into one. It bounds what its small files may unpack to."""


SHARD_NAME = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Root:
    """What the store's own `zarr.json` says."""

    manifest: Manifest
    files: FileEntries
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None


@dataclass(frozen=True)
class ShardEntry:
    """What a shard's `zarr.json` says."""

    documents: int
    positions: int
    fingerprint: str
    files: FileEntries


def shard_name(keys: bytes) -> str:
    """The name of the shard that holds the documents with these keys: blake2b-64 of all, in hex."""
    return blake2b(keys, digest_size=8).hexdigest()


def read_root(files: Files, where: object) -> Root:
    """Read and check the root's `zarr.json`.

    Args:
        where: the store, for messages.

    Raises:
        StoreFormatError, CorruptStoreError: as their names say.
    """
    type_this = "type the path that `logitstore build --out` was given"
    path = f"{where}/{GROUP}"
    try:
        data = read_group(files)
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise StoreFormatError(f"{path} cannot be read ({error.strerror or error}); {type_this}") from error
    if b'"logitstore"' not in data:
        try:
            names = {name.split("/")[0] for name in files.names()}
        except OSError:
            names = set()
        if not {"shards", "vocabulary"} <= names:
            found = "is a Zarr group, but not a logitstore" if data else f"is not a store: it has no {GROUP}"
            raise StoreFormatError(f"{where} {found}; {type_this}")
    return root_of(data, path, where)


def root_attributes(manifest: Manifest, vocabulary: Vocabulary, files: FileEntries) -> dict[str, Any]:
    """What a store's root says; `root_of` reads it back."""
    return {
        "logitstore": manifest.to_json(),
        "special_ids": sorted(vocabulary.special_ids),
        "bos_id": vocabulary.bos_id,
        "eos_id": vocabulary.eos_id,
        "files": files,
    }


def root_of(data: bytes, path: object, where: object) -> Root:
    """What the bytes of a sealed root say.

    Args:
        path, where: these bytes, and the store, for messages.

    Raises:
        StoreFormatError, CorruptStoreError: as their names say.
    """
    attributes = unseal_group(data, path)
    try:
        manifest = Manifest.from_json(attributes["logitstore"], where)
        files, special_ids = attributes["files"], attributes["special_ids"]
        bos_id, eos_id = attributes["bos_id"], attributes["eos_id"]
        if not are_file_entries(files):
            raise ValueError("its list of files")
        if not all(type(i) is int and 0 <= i < 1 << 31 for i in (*special_ids, bos_id or 0, eos_id or 0)):
            raise ValueError("its special ids")
        return Root(manifest, files, frozenset(special_ids), bos_id, eos_id)
    except StoreFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, LogitstoreError) as error:
        raise StoreFormatError(
            f"{path} says what no logitstore writes ({first_line(error)}); build it again"
        ) from error


def read_entry(files: Files, folder: str) -> ShardEntry:
    """Read and check a shard's `zarr.json`.

    Raises:
        CorruptStoreError: it is missing or damaged.
    """
    path = f"{folder}/{GROUP}"
    try:
        data = read_group(files, folder)
    except OSError as error:
        require_damage(error, path)
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    return entry_of(data, path)


def entry_of(data: bytes, path: object) -> ShardEntry:
    """What the bytes of a shard's `zarr.json` say.

    Raises:
        CorruptStoreError: they are damaged.
    """
    try:
        entry = ShardEntry(**unseal_group(data, path))
    except TypeError as error:
        raise damaged(path, f"says what no logitstore writes ({first_line(error)})") from error
    counts = (entry.documents, entry.positions)
    whole = all(type(n) is int for n in counts) and 0 < entry.documents <= entry.positions <= MOST_POSITIONS
    if not (whole and are_file_entries(entry.files)):
        raise damaged(path, "says what no logitstore writes")
    return entry


def damaged(path: object, fault: str) -> CorruptStoreError:
    """The one line for a file of a store that cannot be trusted."""
    return CorruptStoreError(
        f"{path}: {fault}; type `logitstore verify STORE` for all that is damaged, and with `--repair --teacher T "
        "--dataset D` it is computed again"
    )


def unreadable(path: object, error: OSError | ValueError) -> CorruptStoreError:
    """The same for one that cannot be read.

    Raises:
        StoreLostError: this time only; see `require_damage`.
    """
    require_damage(error, path)
    return damaged(path, f"cannot be read ({error})")


def require_outside_stores(path: Path) -> None:
    """Check that `path` does not lie inside a store, in which every file is accounted for.

    Raises:
        ConfigError: it would.
    """
    for parent in Path(os.path.realpath(path)).parents:
        if (parent / GROUP).is_file():
            raise ConfigError(f"{path} lies inside {parent}, which is a store; type --out with a path outside of it")
