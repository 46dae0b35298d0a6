"""Where `convert`, `merge` and `import` write: a store whose kind its suffix tells, begun or gone on with.

A zip file cannot be added to. It is built as a folder with a dot name beside it, which a killed command leaves and the
same command goes on with, and then written as a whole.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from logitstore import plan
from logitstore.contract import Store
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError
from logitstore.journal import journals, leftovers, open_locked
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord
from logitstore.replaced import replaced
from logitstore.store import LMDB_SUFFIX, create_store, open_store
from logitstore.vocabulary import Vocabulary
from logitstore.zip_store import ZIP_SUFFIX, write_zip

SUFFIXES = (".zarr", ZIP_SUFFIX, LMDB_SUFFIX)
APPEND_BYTES = 1 << 28
"""So much at once at most: a window's records, unless they are of unusual width. LMDB fits its ranks to the first."""


def existing(path: Path) -> Store | None:
    """What lies at a path that is to be written, if anything does.

    Raises:
        ConfigError: its suffix tells no kind of store, or it lies inside another store.
        StoreError: something is there that is not a store, or a damaged one.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} does not tell what to make; type a path that ends in {', '.join(SUFFIXES)}")
    require_outside_stores(path)
    return open_store(path) if path.exists() else None


@contextmanager
def target_store(
    path: Path, manifest: Manifest, vocabulary: Vocabulary, belongs: Callable[[DocumentRecord], bool]
) -> Iterator[Store]:
    """The store to write into; of a zip file that is not there, the folder that becomes it when the block ends well.

    Args:
        belongs: whether a document is one of those to come. A folder of another, killed command that wanted to write
            the same zip file is begun anew.

    Raises:
        IncompatibleStoreError: there is a store already, and it was built by another teacher, tokenizer or recipe.
        StoreWriteError: the place cannot be written, or another process writes the same zip file.
    """
    if path.suffix != ZIP_SUFFIX:
        store = open_store(path) if path.exists() else create_store(path, manifest, vocabulary)
        store.manifest.require_compatible(manifest, path)
        yield store
        return
    with replaced(path) as file:
        folder = unzipped(path)
        if folder.exists() and not _is_begun(folder, manifest, belongs):
            shutil.rmtree(folder)
        store = create_store(folder, manifest, vocabulary)
        yield store
        write_zip(folder, file)
    shutil.rmtree(folder, ignore_errors=True)


def unzipped(path: Path) -> Path:
    """The folder that becomes a zip file."""
    return path.with_name(f".unzipped-{path.name}")


def remove_unzipped(path: Path) -> None:
    """Remove what was to become a zip file that is there by now, unless a running process does."""
    lock = path.with_name(f".partial-{path.name}")
    if unzipped(path).exists():
        with suppress(BlockingIOError), open_locked(lock):
            shutil.rmtree(unzipped(path), ignore_errors=True)
            lock.unlink(missing_ok=True)


def write_all(
    documents: Iterable[DocumentRecord], store: Store, writer: str, update: Callable[[int], object] = lambda _: None
) -> None:
    """Write documents that the store lacks, one shard after another, in their order.

    No more than one shard's are held at a time. What is there is passed over; so after a kill the same documents end as
    the same shards, byte for byte.

    Args:
        update: is told how many positions were written, or found to be there.

    Raises:
        StoreWriteError: full disk, or another process writes under this name.
    """
    with store.writer(writer) as keeper:
        window: dict[bytes, DocumentRecord] = {}
        positions = plan.shard_positions(store.manifest.recipe)
        room = positions

        def finish() -> None:
            fresh = [document for key, document in window.items() if key not in keeper.pending]
            for batch in _batches(fresh, store.manifest.recipe.record_width):
                keeper.append(batch)
            keeper.commit(list(window))
            update(sum(len(document.records) for document in window.values()))
            window.clear()

        for document in documents:
            key = document.key
            if key in window or key in store:
                update(len(document.records))
                continue
            window[key] = document
            room -= len(document.records)
            if room <= 0:
                finish()
                room = positions
        if window:
            finish()
        keeper.commit(list(keeper.pending))  # of an earlier, killed command with other documents: true all the same


def _batches(documents: list[DocumentRecord], width: int) -> Iterator[list[DocumentRecord]]:
    batch: list[DocumentRecord] = []
    room = APPEND_BYTES
    for document in documents:
        batch.append(document)
        room -= len(document.records) * width
        if room <= 0:
            yield batch
            batch, room = [], APPEND_BYTES
    if batch:
        yield batch


def _is_begun(folder: Path, manifest: Manifest, belongs: Callable[[DocumentRecord], bool]) -> bool:
    try:
        store = open_store(folder)
    except Exception:  # what a kill left of a folder that was being removed
        return False
    kept = (document for journal in journals(folder) for document in leftovers(journal, store))
    return store.manifest == manifest and all(map(belongs, chain(map(store.record, range(len(store))), kept)))
