"""What a store's `zarr.json` files say: the manifest, and the entry of each shard; checked before it is believed."""

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from logitstore.errors import ConfigError, CorruptStoreError, LogitstoreError, StoreFormatError, StoreNotFoundError
from logitstore.manifest import Manifest
from logitstore.sealed import GROUP, FileEntries, are_file_entries, unseal_group


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


def shard_names(path: Path) -> list[str]:
    """Names of the finished shards of a store, sorted; none where there is no folder of shards."""
    try:
        with os.scandir(path / "shards") as found:
            return sorted(item.name for item in found if item.is_dir() and not item.name.startswith("."))
    except OSError:
        return []  # the root names a file in that folder, so that its loss is noticed


def read_root(path: Path) -> Root:
    """Read and check the root's `zarr.json`.

    Raises:
        StoreNotFoundError, StoreFormatError, CorruptStoreError: as their names say.
    """
    if not path.exists():
        raise StoreNotFoundError(
            f"there is no store at {path}; type `logitstore build --teacher T --dataset D --out {path}`"
        )
    type_this = "type the path that `logitstore build --out` was given"
    if not path.is_dir():
        raise StoreFormatError(f"{path} is a file, a store is a folder; {type_this}")
    try:
        data = (path / GROUP).read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise StoreFormatError(f"{path / GROUP} cannot be read ({error.strerror}); {type_this}") from error
    if b'"logitstore"' not in data and not ((path / "shards").is_dir() and (path / "vocabulary").is_dir()):
        found = "is a Zarr group, but not a logitstore" if data else f"is not a store: it has no {GROUP}"
        raise StoreFormatError(f"{path} {found}; {type_this}")
    attributes = unseal_group(data, path / GROUP)
    try:
        manifest = Manifest.from_json(attributes["logitstore"], path)
        files, special_ids = attributes["files"], frozenset(map(int, attributes["special_ids"]))
        if not are_file_entries(files):
            raise ValueError("its list of files")
        return Root(manifest, files, special_ids, attributes["bos_id"], attributes["eos_id"])
    except StoreFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, LogitstoreError) as error:
        raise StoreFormatError(f"{path / GROUP} says what no logitstore writes ({error}); build it again") from error


def read_entry(shard: Path) -> ShardEntry:
    """Read and check a shard's `zarr.json`.

    Raises:
        CorruptStoreError: it is missing or damaged.
    """
    try:
        entry = ShardEntry(**unseal_group((shard / GROUP).read_bytes(), shard / GROUP))
    except OSError as error:
        raise damaged(shard / GROUP, f"cannot be read ({error.strerror})") from error
    except TypeError as error:
        raise damaged(shard / GROUP, f"says what no logitstore writes ({error})") from error
    counts = (entry.documents, entry.positions)
    if not (all(isinstance(n, int) and n >= 0 for n in counts) and are_file_entries(entry.files)):
        raise damaged(shard / GROUP, "says what no logitstore writes")
    return entry


def damaged(path: Path, fault: str) -> CorruptStoreError:
    """The one line for a file of a store that cannot be trusted."""
    return CorruptStoreError(
        f"{path}: {fault}; type `logitstore verify STORE` for all that is damaged, delete those shards, and build again"
    )


def require_outside_stores(path: Path) -> None:
    """Check that `path` does not lie inside a store, in which every file is accounted for.

    Raises:
        ConfigError: it would.
    """
    for parent in path.absolute().parents:
        if (parent / GROUP).is_file():
            raise ConfigError(f"{path} lies inside {parent}, which is a store; type --out with a path outside of it")
