"""Open a store: the one seam between those who read targets and how they lie on disk."""

import re
from os import PathLike
from pathlib import Path

from logitstore.contract import Store
from logitstore.errors import StoreFormatError, StoreNotFoundError
from logitstore.files import Files, LocalFiles, ZipFiles
from logitstore.lmdb_pages import is_lmdb
from logitstore.manifest import Manifest
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore

LMDB_SUFFIX = ".lmdb"


def open_store(path: str | PathLike[str]) -> Store:
    """Open a store for reading: a folder, a zip file of one, a URL, or an LMDB file. Needs no MLX.

    ```
    store = logitstore.open_store("docs.zarr")
    targets = store.get(token_ids)  # SparseTargets, or None where the store has no answer
    ```

    Raises:
        StoreNotFoundError: nothing there.
        StoreFormatError: not a store, or one of a newer format.
        CorruptStoreError: its bytes are not those that were written.
        ServiceError: a server refuses, or does not answer.
    """
    if is_url(path):
        return ZarrStore(files_at(path), str(path))
    place = Path(path).expanduser()
    if is_lmdb_store(place):
        from logitstore.lmdb_store import LmdbStore

        return LmdbStore(place)
    return ZarrStore(files_of(place), place)


def is_url(path: str | PathLike[str]) -> bool:
    """Whether a store lies behind a URL."""
    return isinstance(path, str) and re.match(r"[a-z0-9]+://", path) is not None


def files_at(path: str | PathLike[str]) -> Files:
    """The files of a store in a folder, a zip file or behind a URL.

    Raises:
        StoreNotFoundError, StoreFormatError, ServiceError: as for `open_store`.
    """
    return _remote_files(str(path)) if is_url(path) else files_of(Path(path).expanduser())


def _remote_files(url: str) -> Files:
    if url.startswith(("http://", "https://")):
        from logitstore.http_files import HttpFiles
        from logitstore.service_client import ServiceClient

        client = ServiceClient(url)
        try:
            return HttpFiles(client, lists=client.facts() is not None)
        except BaseException:
            client.close()
            raise
    if url.startswith("hf://"):
        from logitstore.hub import hub_source

        return hub_source(url).files
    from logitstore.remote_files import RemoteFiles

    return RemoteFiles(url)


def files_of(path: Path) -> Files:
    """The files of a store in a folder or a zip file.

    Raises:
        StoreNotFoundError: nothing there.
        StoreFormatError: something else.
    """
    if not path.exists():
        if re.fullmatch(r"[\w.-]+:\d+/.+", str(path)):
            raise StoreNotFoundError(f"there is no store at {path}; type a service's URL as http://{path}")
        raise StoreNotFoundError(
            f"there is no store at {path}; type `logitstore build --teacher T --dataset D --out {path}`"
        )
    if path.is_dir():
        return LocalFiles(path)
    try:
        return ZipFiles(path)
    except OSError as error:
        raise StoreFormatError(
            f"{path} is a file, a store is a folder or a zip file of one ({error.strerror or error}); "
            "type the path that `logitstore build --out` was given"
        ) from error


def is_lmdb_store(path: Path) -> bool:
    """Whether a store is to be read by `lmdb_store`: a file that begins as LMDB's do, or that is called so."""
    return path.is_file() and (path.suffix == LMDB_SUFFIX or is_lmdb(path))


def create_store(path: Path, manifest: Manifest, vocabulary: Vocabulary) -> Store:
    """Begin an empty store, or open the one that another process has begun at the same moment: one LMDB file where the
    path ends in .lmdb, else a Zarr folder.

    Raises:
        StoreWriteError: the place cannot be written.
        StoreError: what another process has begun there cannot be opened.
    """
    if path.suffix == LMDB_SUFFIX:
        from logitstore.lmdb_store import LmdbStore

        return LmdbStore.create(path, manifest, vocabulary)
    return ZarrStore.create(path, manifest, vocabulary)
