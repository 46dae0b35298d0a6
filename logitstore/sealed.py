"""Files of which every byte is checked: a sealed `zarr.json`, and the digests of other files that it holds.

Zarr keeps a group's user metadata in the `attributes` of its `zarr.json`. Ours hold a `digest` over everything else
in the file; a file whose bytes are not exactly those that `seal_group` would write again is corrupt, down to a
changed space.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from logitstore.errors import CorruptStoreError

GROUP = "zarr.json"
DAMAGED = "its bytes are not those that were written"

FileEntries = Mapping[str, Mapping[str, Any]]
"""For every file, by its path from the folder: {"bytes": its size, "digest": blake2b-128 in hex}."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a store."""

    file: str
    fault: str


def file_digest(data: bytes) -> str:
    """blake2b-128 of some bytes, in hex."""
    return blake2b(data, digest_size=16).hexdigest()


def seal_group(attributes: dict[str, Any]) -> bytes:
    """Serialise a Zarr v3 group with these attributes and their digest."""
    return _dump(attributes | {"digest": file_digest(_dump(attributes))})


def unseal_group(data: bytes, path: Path) -> dict[str, Any]:
    """Read the attributes back.

    Raises:
        CorruptStoreError: any byte differs from what `seal_group` wrote.
    """
    try:
        attributes: dict[str, Any] = json.loads(data)["attributes"]
        attributes.pop("digest")
        intact = seal_group(attributes) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CorruptStoreError(
            f"{path} is damaged: its digest does not match; restore the file, or build the store again"
        )
    return attributes


def _dump(attributes: dict[str, Any]) -> bytes:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return (json.dumps(group, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, by its path from there; what begins with a dot is being written, and left out."""
    found: set[str] = set()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder)
        found.update((below / name).as_posix() for name in files if not name.startswith("."))
    return found


def file_entries(folder: Path) -> FileEntries:
    """Size and digest of every file below a folder, but for the folder's own `zarr.json` that will hold them."""
    contents = {name: (folder / name).read_bytes() for name in sorted(files_below(folder) - {GROUP})}
    return {name: {"bytes": len(data), "digest": file_digest(data)} for name, data in contents.items()}


def are_file_entries(value: Any) -> TypeGuard[FileEntries]:
    """Whether a JSON value has the form of `FileEntries`, and names no file outside its folder."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("digest"), str)
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, entry in value.items()
    )


def file_problems(folder: Path, entries: FileEntries) -> Iterator[Problem]:
    """Hold files against their entries: size first, then every byte."""
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                yield Problem(name, f"holds {size:,} bytes instead of {entry['bytes']:,}")
            elif file_digest((folder / name).read_bytes()) != entry["digest"]:
                yield Problem(name, DAMAGED)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            yield Problem(name, f"cannot be read ({getattr(error, 'strerror', None) or error})")
