"""Stores as datasets on the Hugging Face Hub: hf://datasets/OWNER/NAME. The only file that speaks to the hub's API.

Parts go there in commits, of which each is there whole or not at all; bytes that the hub has already it does not ask
for again. Reading is plain HTTP, from one commit, whatever is pushed meanwhile.
"""

import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from logitstore.card import WRITTEN, card
from logitstore.errors import (
    ConfigError,
    LogitstoreError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
    first_line,
)
from logitstore.moved import Pieces, Source, index_of
from logitstore.parts import ROOT, Part, folder_of
from logitstore.remote_files import RemoteFiles
from logitstore.sealed import GROUP, file_digest, read_group, unseal_group
from logitstore.stored_index import FOLDER
from logitstore.zarr_store import ZarrStore

CARD = "README.md"
COMMIT_BYTES, COMMIT_FILES = 1 << 30, 500
"""After so much a commit is made: what is committed is not sent again."""
_PLACE = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+?)/?")


def repository(place: str) -> str:
    """OWNER/NAME of a URL.

    Raises:
        ConfigError: it is no dataset's.
    """
    match = _PLACE.fullmatch(place)
    if match is None:
        raise ConfigError(f"{place} is no dataset of the hub; type hf://datasets/OWNER/NAME")
    return match[1]


def hub_source(place: str) -> Source:
    """A store on the hub, as it is now.

    Raises:
        ConfigError: no such URL.
        StoreNotFoundError: no such dataset, or none that the token may read.
        StoreFormatError: the hub cannot be reached.
    """
    repo = repository(place)
    found = _snapshot(_api(), repo, place)
    if found is None:
        raise StoreNotFoundError(
            f"there is no dataset {repo} on the hub, or none that may be read without a token; type `hf auth login`"
        )
    return Source(found, place)


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError("hf:// needs huggingface_hub; type `pip install huggingface_hub`") from error
    return HfApi()


def _snapshot(api: Any, repo: str, place: str) -> RemoteFiles | None:
    """The files of a dataset's newest commit; None where there is no such dataset."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        commit = api.repo_info(repo, repo_type="dataset").sha
        names = api.list_repo_files(repo, repo_type="dataset", revision=commit)
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        raise StoreFormatError(
            f"{place} cannot be read ({_said(error)}); mend this, `hf auth login` is how to log in, and type the same "
            "command again"
        ) from error
    token = api.token if isinstance(api.token, str) else get_token()
    return RemoteFiles(f"{api.endpoint}/datasets/{repo}/resolve/{commit}", listing=names, token=token or "")


class HubDestination:
    """See `moved.Destination`."""

    def __init__(self, place: str, scratch: Path) -> None:
        self._place, self._repo, self._scratch = place, repository(place), scratch
        self._api = _api()
        self._there = _snapshot(self._api, self._repo, place)
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._pending: dict[str, Path | bytes] = {}
        self._pending_bytes = 0
        self._shards: set[str] = set() if self._there is None else self._there.folders("shards")

    @classmethod
    @contextmanager
    def opened(cls, place: str, *, quiet: bool = False) -> Iterator["HubDestination"]:
        """What cannot be sent from where it lies is held in a folder for as long as this lasts.

        Args:
            quiet: show none of the progress bars that the hub's client has, either.
        """
        if quiet:
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
        with tempfile.TemporaryDirectory(prefix="logitstore-") as scratch:
            yield cls(place, Path(scratch))

    @property
    def where(self) -> str:
        """See `moved.Destination`."""
        return self._place

    def root(self) -> bytes | None:
        """See `moved.Destination`."""
        return self._group(ROOT)

    def digests(self, names: list[str]) -> dict[str, str]:
        """See `moved.Destination`.

        Raises:
            CorruptStoreError: a part that is there is damaged.
        """
        found = {}
        for name in names:
            group = self._group(name)
            if group is not None:
                unseal_group(group, f"{self._place}/{folder_of(name)}/{GROUP}")
                found[name] = file_digest(group)
        return found

    def require_room(self, size_bytes: int) -> None:
        """See `moved.Destination`: the hub tells none."""

    def received(self, part: Part) -> dict[str, int]:
        """See `moved.Destination`: the hub's own client finds out what need not be sent."""
        del part
        return {}

    def receive(self, part: Part, file: str, offset: int, pieces: Pieces, path: Path | None) -> None:
        """See `moved.Destination`: from where it lies, or held until the commit."""
        name = part.path(file)
        if path is None:
            path = self._scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as held:
                for piece in pieces(offset):
                    held.write(piece)
        else:
            for _ in pieces(offset):
                pass  # held against its digest once more
        with self._lock:
            self._paths[name] = path

    def publish(self, part: Part) -> list[str]:
        """See `moved.Destination`: with the next commit."""
        with self._lock:
            self._pending |= {name: self._paths.pop(name) for name in map(part.path, part.files)}
            self._pending[part.path()] = part.group
            self._pending_bytes += part.total_bytes
            if part.folder.startswith("shards/"):
                self._shards.add(part.name)
            if self._pending_bytes >= COMMIT_BYTES or len(self._pending) >= COMMIT_FILES:
                self._commit("Parts of a store")
        return []

    def finish(self, source: Source) -> str:
        """See `moved.Destination`: the index and the card, with what is left."""
        note, gone = "", set()
        with self._lock, ExitStack() as stack:
            index = stack.enter_context(index_of(source, self._shards)) if self._shards else None
            if index is None and self._shards:
                note = "shards of others are there too, which its index does not name"
            elif index is not None:
                group = read_group(index, FOLDER)
                if group != self._group_of(FOLDER):
                    self._pending[f"{FOLDER}/{GROUP}"] = group
                    for name in unseal_group(group, FOLDER)["files"]:
                        self._pending[f"{FOLDER}/{name}"] = index.read(f"{FOLDER}/{name}")
                    if self._there is not None:
                        gone = {f"{FOLDER}/{name}" for name in self._there.names(FOLDER)} - self._pending.keys()
            text = card(ZarrStore(source.files, source.where), f"hf://datasets/{self._repo}").encode()
            old = self._read(CARD)
            if old is None or (not note and WRITTEN.encode() in old and old != text):
                self._pending[CARD] = text
            self._commit("A store of a teacher's next-token distributions", gone)
        return note

    def _commit(self, message: str, gone: set[str] | frozenset[str] = frozenset()) -> None:
        if not self._pending and not gone:
            return
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        try:
            if self._there is None:
                self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
            operations = [CommitOperationAdd(name, data) for name, data in sorted(self._pending.items())]
            removed = [CommitOperationDelete(name) for name in sorted(gone)]
            self._api.create_commit(
                self._repo, [*operations, *removed], commit_message=message, repo_type="dataset", num_threads=2
            )
        except LogitstoreError:
            raise
        except Exception as error:  # the client raises its own, httpx's and the system's errors
            raise StoreWriteError(
                f"{self._place} takes no commit ({_said(error)}); mend this, `hf auth login` is how to log in, "
                "and type the same command again"
            ) from error
        for data in self._pending.values():
            if isinstance(data, Path) and data.is_relative_to(self._scratch):
                data.unlink()
        self._pending, self._pending_bytes = {}, 0

    def _group(self, name: str) -> bytes | None:
        return self._group_of(folder_of(name))

    def _group_of(self, folder: str) -> bytes | None:
        return self._read(f"{folder}/{GROUP}" if folder else GROUP)

    def _read(self, name: str) -> bytes | None:
        """A small file as it was when the push began."""
        if self._there is None or name not in self._there.listed:
            return None
        try:
            return self._there.read(name)
        except OSError as error:
            raise StoreFormatError(f"{self._place} cannot be read ({first_line(error)})") from error


def _said(error: Exception) -> str:
    """What the hub says of an error, or its client."""
    said = getattr(error, "server_message", None)
    return f"{first_line(error)}: {' '.join(str(said).split())}" if said else first_line(error)
