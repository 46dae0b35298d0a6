"""An upload: a part of a store on its way into a folder, checked as `verify` does before readers see it.

Knows nothing of HTTP; `uploads` does. Bytes lie on disk as they come (`incoming`), so one that was cut goes on where it
stopped, after a restart too.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitstore.durable import cannot_write
from logitstore.errors import (
    CorruptStoreError,
    IncompatibleStoreError,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
)
from logitstore.fidelity import Fidelity
from logitstore.files import Files, LocalFiles
from logitstore.incoming import SPARE_BYTES, Incoming
from logitstore.parts import FIDELITY, ROOT, Part, folder_of, part_names, part_of, root_part
from logitstore.saved_maps import map_problems
from logitstore.sealed import GROUP, Problem, file_digest, read_group, unseal_group
from logitstore.shard import Shard
from logitstore.verify import content_problems
from logitstore.zarr_store import ZarrStore

LEFT_S = 24 * 3600.0
"""An upload to which nothing was added for so long is removed."""
ACTIVE_S = 600.0
"""One of other bytes under the same name gives way to another after so long."""


class RejectedError(StoreError):
    """An upload whose bytes are not what they must be; `files` can be sent again."""

    def __init__(self, message: str, files: list[str]) -> None:
        super().__init__(message)
        self.files = files


@dataclass(frozen=True)
class Upload:
    """A store's folder, and the name of a part that is sent to it."""

    store: Path
    name: str

    @property
    def incoming(self) -> Incoming:
        """Where it arrives."""
        return Incoming(self.store)

    def published(self) -> str | None:
        """The digest of the `zarr.json` of the part that readers see; None where there is none.

        Raises:
            CorruptStoreError: it is damaged.
        """
        group = _published(self.store, self.name)
        return None if group is None else file_digest(group)

    def part(self, group: bytes) -> Part:
        """The part of which this is the `zarr.json`, checked against the store.

        Raises:
            RejectedError: it is damaged, of another format, or says what it may not.
            IncompatibleStoreError: it is another store's.
            StoreNotFoundError: the store was not begun.
        """
        try:
            there = _published(self.store, ROOT)
            manifest = None if there is None else root_part(there, self.store.name)[1]
            if self.name == ROOT:
                part, brought = root_part(group, self.name)
                difference = None if manifest is None else manifest.first_difference(brought)
                if difference is not None:
                    what, here, found = difference
                    raise IncompatibleStoreError(f"the {what} of this store is {here}, that of the upload {found}")
                return part
            if manifest is None:
                raise StoreNotFoundError("there is no such store yet; an upload begins with the part root")
            return part_of(self.name, group, manifest, self.name)
        except (CorruptStoreError, StoreFormatError) as error:
            raise RejectedError(f"{GROUP} is refused: {error}", [GROUP]) from error

    def begun(self) -> Part:
        """The part that is arriving.

        Raises:
            StoreNotFoundError: none.
            RejectedError, IncompatibleStoreError: as `part`.
        """
        group = self.incoming.group(self.name)
        if group is None:
            raise StoreNotFoundError(f"no upload of {self.name} has begun; send its {GROUP} first")
        return self.part(group)

    def state(self) -> dict[str, Any]:
        """What has arrived: {"complete", "digest" of its `zarr.json`, "received": {file: bytes}}.

        Raises:
            CorruptStoreError: the part that is there is damaged.
        """
        digest = self.published()
        if digest is not None:
            return {"complete": True, "digest": digest, "received": {}}
        try:
            part = self.begun()
        except StoreError:
            return {"complete": False, "digest": None, "received": {}}
        received = {GROUP: len(part.group)} | self.incoming.received(part)
        return {"complete": False, "digest": part.digest, "received": received}

    def begin(self, group: bytes) -> None:
        """Take a part's `zarr.json`.

        Raises:
            RejectedError, IncompatibleStoreError, StoreNotFoundError: as `part`.
            StoreWriteError: there is no room for it.
        """
        part, incoming = self.part(group), self.incoming
        incoming.remove_older(LEFT_S)
        there = self.published()
        if there is not None:
            if there != part.digest and self.name != ROOT:
                raise IncompatibleStoreError(f"{self.name} is there with other bytes, and stays")
            return
        arriving = incoming.group(self.name)
        if arriving not in (None, group) and incoming.age_s(self.name) < ACTIVE_S:
            raise IncompatibleStoreError(f"another upload of {self.name} with other bytes is arriving; send it later")
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            lacking = part.total_bytes - (sum(incoming.received(part).values()) if arriving == group else 0)
            free = shutil.disk_usage(self.store).free
            if free < lacking + SPARE_BYTES:
                raise StoreWriteError(f"the disk has {free:,} bytes free, {lacking:,} are to come; free some")
            incoming.begin(part)
        except OSError as error:
            raise cannot_write(self.store, error) from error

    def finish(self) -> None:
        """Check a part and show it to readers; one that they see by now is done.

        Raises:
            RejectedError: naming a file that is short or wrong; such files can be sent again.
            StoreNotFoundError: no upload has begun.
            StoreWriteError: full disk or no permission.
        """
        if self.published() is not None:
            return
        try:
            part = self.begun()
        except StoreNotFoundError:
            if self.published() is None:
                raise
            return  # by somebody else, between our two looks
        try:
            with self.incoming.finishing(part):
                problems = self.incoming.problems(part)
                if problems:
                    files = [problem.file for problem in problems]
                    raise RejectedError(f"{problems[0].file} {problems[0].fault}; send it again", files)
                for problem in self._content_problems(part):
                    self.incoming.remove(self.name)
                    raise RejectedError(f"{problem.file}: {problem.fault}; type `logitstore verify` on its store", [])
                self.incoming.publish(part)
        except FileNotFoundError:
            if self.published() is None:
                raise StoreNotFoundError(f"the upload of {self.name} is gone; send its {GROUP} first") from None
        except OSError as error:
            raise cannot_write(self.store, error) from error
        self.incoming.tidy()

    def _content_problems(self, part: Part) -> Iterator[Problem]:
        """What `verify` would say of a part whose bytes have their digests."""
        files = LocalFiles(self.incoming.folder)
        if self.name == FIDELITY:
            try:
                Fidelity.from_json(unseal_group(part.group, part.path()))
            except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
                yield Problem(part.path(), "says what no logitstore writes")
            return
        if self.name == ROOT:
            try:
                _ = ZarrStore(files, self.store.name).vocabulary
            except StoreError as error:
                yield Problem(part.path(), str(error))
            return
        group = _published(self.store, ROOT)
        assert group is not None, "begun() has read it"
        manifest = root_part(group, self.store.name)[1]
        if self.name.startswith("map-"):
            yield from map_problems(files, part.folder, manifest.tokenizer)[1]
        else:
            yield from content_problems(Shard(files, self.name, manifest.recipe, checked=True), manifest)


def parts_there(files: Files, where: object) -> dict[str, str]:
    """The parts of a store, each with the digest of its `zarr.json`.

    Raises:
        StoreError: it is damaged.
    """
    found = {}
    for name in (ROOT, *part_names(files, where)):
        try:
            found[name] = file_digest(read_group(files, folder_of(name)))
        except FileNotFoundError:
            continue
    return found


def _published(store: Path, name: str) -> bytes | None:
    folder = folder_of(name)
    try:
        group = read_group(LocalFiles(store, write_once="/"), folder)
    except FileNotFoundError:
        if folder and (store / folder).is_dir() and name != FIDELITY:
            raise CorruptStoreError(
                f"{folder} is damaged; `logitstore verify --repair` on this store mends it"
            ) from None
        return None
    unseal_group(group, folder or name)
    return group
