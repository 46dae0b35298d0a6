"""JSON files of which every byte is checked: written in one canonical form, with their own digest inside.

Zarr keeps a group's user metadata in the `attributes` of its `zarr.json`. Ours hold a `digest` over everything else in the file;
a file whose bytes are not exactly those that `seal` would write again is corrupt, down to a changed space.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from logitstore.errors import CorruptStoreError


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
