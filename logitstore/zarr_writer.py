"""Writes into a store in a folder: its root, shards, index and fidelity, each complete by one rename or not there.

What is being written has a name that begins with a dot, which the next to write removes where a killed process left it.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from logitstore import hidden_states, position_streams, streams
from logitstore.catalog import Catalog
from logitstore.codec import from_record, head_mask
from logitstore.durable import alone_in, cannot_write, publish, replace_folder, sync
from logitstore.entries import root_attributes, shard_name
from logitstore.errors import CorruptStoreError
from logitstore.index import block_hashes
from logitstore.key import KEY_BYTES
from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.sealed import GROUP, file_entries, seal_group
from logitstore.stored_index import FOLDER
from logitstore.stored_vocabulary import LEVEL, lengths, text
from logitstore.streams import Ranks, chunk_positions
from logitstore.vocabulary import Vocabulary


def write_root(path: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
    """Write an empty store into a folder that is not there yet."""
    from logitstore.zarr_arrays import write_array, write_planes

    (path / "shards").mkdir(parents=True)
    (path / "shards" / GROUP).write_bytes(seal_group({}))
    (path / "vocabulary").mkdir()
    (path / "vocabulary" / GROUP).write_bytes(seal_group({}))
    write_array(path / "vocabulary", "bytes", text(vocabulary.tokens), level=LEVEL)
    write_planes(path / "vocabulary", "lengths", lengths(vocabulary.tokens), level=LEVEL)
    root = root_attributes(manifest, vocabulary, file_entries(path))
    (path / GROUP).write_bytes(seal_group(root))


def write_documents(store: Path, documents: Sequence[DocumentRecord], manifest: Manifest, writer: str) -> None:
    """See `ZarrStore.write_documents`."""
    folder = store / "shards"
    partial = folder / f".partial-{writer}"
    try:
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            _write_shard(partial, documents, manifest.recipe)
            entry = {
                "documents": len(documents),
                "positions": sum(len(document.records) for document in documents),
                "fingerprint": manifest.fingerprint,
                "files": file_entries(partial),
            }
            (partial / GROUP).write_bytes(seal_group(entry))
            publish(partial, folder / shard_name(b"".join(document.key for document in documents)))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise cannot_write(store, error) from error


def _write_shard(folder: Path, documents: Sequence[DocumentRecord], recipe: Recipe) -> None:
    """Write its arrays into a folder that is there."""
    from logitstore.zarr_arrays import write_array, write_chunks, write_planes

    form = recipe.form
    records = np.concatenate([document.records for document in documents])
    labels = np.concatenate([document.token_ids[1:] for document in documents])
    sets = [from_record(records[:, recipe.columns(number)], form) for number in range(recipe.sets)]
    position = records[:, recipe.columns(recipe.sets)]

    counts = np.zeros(recipe.vocab_size, np.int64)
    for codes in sets:
        kept = form.sampled_tail | head_mask(codes.head_count, form.selection.k)
        counts += np.bincount(codes.ids[np.broadcast_to(kept, codes.ids.shape)], minlength=recipe.vocab_size)
    ranks = Ranks.fit(counts)
    rank_of = ranks.table()

    n = chunk_positions(len(records), form)
    parts = [slice(at, at + n) for at in range(0, len(records), n)]
    for number, codes in enumerate(sets):
        chunks = (streams.to_streams(codes.rows(rows), form, rank_of) for rows in parts)
        write_chunks(folder, f"entries-{number}", chunks, streams.most_chunk_bytes(n, form))
    first = sets[0]
    beside = (
        position_streams.to_streams(position[rows], labels[rows], first.rows(rows), form, rank_of) for rows in parts
    )
    write_chunks(folder, "positions", beside, position_streams.most_chunk_bytes(n, form, len(recipe.log_z)))

    m = hidden_states.chunk_positions(len(records), recipe.hidden_size)
    for number in range(len(recipe.hidden_layers)):
        layer = records[:, recipe.layer_columns(number)]
        cut = (hidden_states.to_streams(layer[at : at + m], recipe.hidden_size) for at in range(0, len(layer), m))
        most = m * hidden_states.layer_width(recipe.hidden_size)
        write_chunks(folder, f"hidden-{number}", cut, most, level=hidden_states.ZSTD_LEVEL)

    heads = np.array([(len(document.token_ids), document.token_ids[0]) for document in documents], "<u4")
    keys = np.frombuffer(b"".join(document.key for document in documents), np.uint8).reshape(-1, KEY_BYTES)
    write_array(folder, "documents", np.concatenate([keys, heads.view(np.uint8)], axis=1))
    hashes = [value for document in documents for value in block_hashes(document.token_ids)]
    write_array(folder, "blocks", np.array(hashes, np.uint64))
    write_planes(folder, "ranks", ranks.common)


def write_fidelity(store: Path, fidelity: dict[str, Any]) -> None:
    """Write it, in the place of one that is there.

    Raises:
        StoreWriteError: full disk or no permission.
    """
    final = store / "fidelity" / GROUP
    partial = final.with_name(f".partial-{uuid4().hex}")
    try:
        final.parent.mkdir(exist_ok=True)
        with alone_in(store) as alone:
            if alone:  # then what lies there is of a process that was killed
                for left in final.parent.glob(".partial-*"):
                    left.unlink()
            try:
                partial.write_bytes(seal_group(fidelity))
                sync(partial)
                partial.rename(final)
                sync(final.parent)
                sync(store)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(store, error) from error


def write_index(store: Path, catalog: Catalog) -> None:
    """Write the index of all shards, in the place of one that does not know all.

    Raises:
        StoreWriteError: full disk or no permission.
    """

    def is_whole() -> bool:
        catalog.refresh()  # after the wait: another may have finished shards
        with suppress(CorruptStoreError):  # a damaged one is replaced
            catalog.forget_index()  # it may have been written of all meanwhile
        return not catalog.names or (catalog.index is not None and catalog.index.shards == sorted(catalog.names))

    if replace_folder(store / FOLDER, is_whole, lambda folder: catalog.write_index(folder, sorted(catalog.names))):
        catalog.forget_index()
