"""What was typed as the place of a store that is moved: a folder, a zip file, or a URL of one of several kinds."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from logitstore.errors import ConfigError
from logitstore.folder_destination import FolderDestination
from logitstore.http_client import NotThereError
from logitstore.http_files import HttpFiles
from logitstore.hub import HubDestination, hub_source
from logitstore.moved import Destination, Source
from logitstore.object_destination import ObjectDestination
from logitstore.remote_files import RemoteFiles
from logitstore.service_client import ServiceClient
from logitstore.service_destination import ServiceDestination, service_parts
from logitstore.store import files_of, is_lmdb_store
from logitstore.transfer import JOBS, MoveReport, move

UPLOAD_S = 300.0
"""In which an object store must have taken a request's bytes."""
PATIENCE_S = 120.0
"""So long a service, or a web server, that has answered once is asked again: it may be started anew."""
HTTP = ("http", "https")
_URL = re.compile(r"([a-z0-9]+)://(.*)", re.DOTALL)


def push(store: str, url: str, jobs: int = JOBS, *, quiet: bool = False) -> MoveReport:
    """Bring to `url` what it lacks of a store; see `transfer.move`. `pull` is the same with the places turned round.

    Raises:
        ConfigError: a place that no store is moved to or from.
        StoreError: as `transfer.move`.
    """
    with source_of(store, quiet=quiet) as source, destination_of(url, quiet=quiet) as destination:
        return move(source, destination, jobs, quiet=quiet)


@contextmanager
def source_of(place: str, *, quiet: bool = False) -> Iterator[Source]:
    """Where a store is read.

    Raises:
        ConfigError: an LMDB file, which has no parts.
        StoreError: nothing there, or a URL that nobody knows.
    """
    scheme, rest = _split(place)
    if scheme == "hf":
        yield hub_source(place)
        return
    if scheme in HTTP:
        client = _client(place, quiet=quiet)
        try:
            service = client.facts() is not None
            client.patience_s = PATIENCE_S
            digests = {}
            if service:
                with suppress(NotThereError):  # an older one: then its shards are listed
                    digests = service_parts(client)
            yield Source(HttpFiles(client, lists=service), place, digests)
        finally:
            client.close()
        return
    if scheme:
        yield Source(RemoteFiles(place), place)
        return
    path = Path(rest).expanduser()
    if is_lmdb_store(path):
        raise ConfigError(
            f"{path} is an LMDB file, which is not moved in parts; type `logitstore convert {path} "
            f"{path.with_suffix('.zarr')}` first, and move that"
        )
    yield Source(files_of(path), str(path))


@contextmanager
def destination_of(place: str, *, quiet: bool = False) -> Iterator[Destination]:
    """Where a store is written, held as long as that takes.

    Raises:
        ConfigError: a place that takes no store.
        StoreError: it cannot be written.
    """
    scheme, rest = _split(place)
    if scheme == "hf":
        with HubDestination.opened(place, quiet=quiet) as dataset:
            yield dataset
        return
    if scheme in HTTP:
        client = _client(place, quiet=quiet)
        try:
            with suppress(NotThereError):  # it begins with what is pushed
                client.facts()
            client.patience_s = PATIENCE_S
            yield ServiceDestination(client)
        finally:
            client.close()
        return
    if scheme:
        yield ObjectDestination(RemoteFiles(place, timeout_s=UPLOAD_S), place)
        return
    with FolderDestination.opened(Path(rest).expanduser()) as folder:
        yield folder


def _client(place: str, *, quiet: bool) -> ServiceClient:
    return ServiceClient(place, say=lambda line: None if quiet else tqdm.write(line, sys.stderr))


def _split(place: str) -> tuple[str, str]:
    """The scheme of a URL, "" for a path, and what follows.

    Raises:
        ConfigError: nothing, as of a variable that is not set; as a path that is where one stands.
    """
    if not place:
        raise ConfigError("a place is empty; type a folder, a zip file or a URL")
    match = _URL.fullmatch(place)
    if match is None or match[1] == "file":
        return "", match[2] if match else place
    return match[1], match[2]
