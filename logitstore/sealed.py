"""Files of which every byte is checked: a sealed `zarr.json`, and the digests of other files that it holds.

Zarr keeps a group's user metadata in the `attributes` of its `zarr.json`. Ours hold a `digest` over everything else
in the file; a file whose bytes are not exactly those that `seal_group` would write again is corrupt, down to a
changed space.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from logitstore.errors import CorruptStoreError
from logitstore.files import Files, LocalFiles, require_damage

GROUP = "zarr.json"
MOST_JSON_BYTES = 8 << 20
"""A `zarr.json` is no longer: the worst of this size takes 4 s and 500 MB to parse. Depth the parser bounds."""
PIECE = 1 << 22
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


def pieces_digest(pieces: Iterable[bytes]) -> str:
    """`file_digest` of bytes that come a piece after the other, and may be more than memory holds."""
    digest = blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def seal_group(attributes: dict[str, Any]) -> bytes:
    """Serialise a Zarr v3 group with these attributes and their digest."""
    return _dump(attributes | {"digest": file_digest(_dump(attributes))})


def unseal_group(data: bytes, path: object) -> dict[str, Any]:
    """Read the attributes back.

    Raises:
        CorruptStoreError: any byte differs from what `seal_group` wrote, or it is longer than `MOST_JSON_BYTES`.
    """
    try:
        if len(data) > MOST_JSON_BYTES:
            raise ValueError
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


def read_group(files: Files, folder: str = "") -> bytes:
    """The `zarr.json` of a folder ("": the root); of one that is too long, as much as tells that it is."""
    return files.read(f"{folder}/{GROUP}" if folder else GROUP, 0, MOST_JSON_BYTES + 1)


def _dump(attributes: dict[str, Any]) -> bytes:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return (json.dumps(group, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def file_entries(folder: Path) -> FileEntries:
    """Size and digest of every file below a folder, but for the folder's own `zarr.json` that will hold them."""
    files = LocalFiles(folder)
    sizes = {name: files.size(name) for name in files.names() if name != GROUP}
    return {name: {"bytes": size, "digest": _digest_of(files, name, size)} for name, size in sizes.items()}


def are_file_entries(value: Any) -> TypeGuard[FileEntries]:
    """Whether a JSON value has the form of `FileEntries`, and names no file outside its folder."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("digest"), str)
        and name.isprintable()
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, entry in value.items()
    )


def file_problems(files: Files, folder: str, entries: FileEntries) -> Iterator[Problem]:
    """Hold files of a folder ("": the root) against their entries: size first, then every byte.

    Raises:
        StoreLostError: one cannot be read now.
    """
    prefix = f"{folder}/" if folder else ""
    for name, entry in entries.items():
        try:
            size = files.size(prefix + name)
            if size != entry["bytes"]:
                yield Problem(name, f"holds {size:,} bytes instead of {entry['bytes']:,}")
            elif _digest_of(files, prefix + name, size) != entry["digest"]:
                yield Problem(name, DAMAGED)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            require_damage(error, prefix + name)
            yield Problem(name, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _digest_of(files: Files, name: str, size: int) -> str:
    return pieces_digest(files.read(name, at, min(at + PIECE, size)) for at in range(0, size, PIECE))
