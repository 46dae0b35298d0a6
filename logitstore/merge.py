"""Merge stores of one teacher and recipe into one; `convert` is the merge of a single one into a store of another kind.

Documents that several hold are written once. Where they say different things of one document, nothing is written: all
stores are held against each other first. Streams: of the documents no more than one shard's are in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.journal import left_by
from logitstore.key import document_key
from logitstore.recipe import DocumentRecord
from logitstore.saved_maps import carry_maps
from logitstore.store import open_store
from logitstore.target_store import existing, remove_unzipped, target_store, write_all
from logitstore.targets import SparseTargets
from logitstore.zip_store import ZIP_SUFFIX

NAMED = 3
"""So many conflicts are named; the others are counted."""


@dataclass(frozen=True)
class MergeReport:
    """What is in the store now."""

    documents: int
    positions: int
    disk_bytes: int
    given: int
    """Documents of the stores that were merged, those that are in several counted for each."""


def convert(source: str | Path, out: Path, *, quiet: bool = False) -> MergeReport:
    """Write a store as a folder, a zip file or an LMDB file, by the suffix of `out`; or go on with that.

    Raises:
        LogitstoreError: as `merge`.
    """
    return merge([source], out, writer="convert", quiet=quiet)


def merge(sources: Sequence[str | Path], out: Path, *, writer: str = "merge", quiet: bool = False) -> MergeReport:
    """Write every document of some stores into one, or go on with that; a store at `out` keeps what it has.

    What was measured of a store's fidelity is kept where the result holds the same number of documents, and their
    vocabulary maps are where it takes any.

    Raises:
        ConfigError: `out` is one of the sources, or no kind of store.
        IncompatibleStoreError: stores of different teachers or recipes, or different targets for one document.
        CorruptStoreError: a source is damaged. What was written before is kept.
        StoreWriteError: full disk and the like.
    """
    stores = [open_store(source) for source in sources]
    for source in stores:
        if isinstance(source.path, Path) and out.exists() and out.samefile(source.path):
            raise ConfigError(f"{out} is to be read and to be written; type another path to write")
    for other in stores[1:]:
        _require_same(stores[0], other, "leave one out")
    target = existing(out)
    if target is not None:
        _require_same(target, stores[0], "type another OUT")
    left = {document.key: document for document in left_by(writer, target)}
    lacking = _require_agreement(stores, target, left, quiet=quiet)
    given = sum(map(len, stores))
    if target is not None and out.suffix == ZIP_SUFFIX:
        if lacking:
            raise ConfigError(
                f"{out} is there and lacks {lacking:,} of the documents, and a zip file cannot be added to; "
                "type another path, or delete it"
            )
        remove_unzipped(out)
        return MergeReport(len(target), target.positions, target.disk_bytes, given)

    def belongs(document: DocumentRecord) -> bool:
        return any(document.key in store and _say_the_same(document, store) for store in stores)

    with (
        target_store(out, stores[0].manifest, stores[0].vocabulary, belongs) as store,
        tqdm(total=sum(s.positions for s in stores), unit="tok", desc=writer, delay=1, disable=quiet) as bar,
    ):
        write_all(_records(stores), store, writer, bar.update)
        _carry_fidelity(stores, store)
        carry_maps(stores, store)
    store = open_store(out)
    return MergeReport(len(store), store.positions, store.disk_bytes, given)


def _records(stores: Sequence[Store]) -> Iterator[DocumentRecord]:
    for store in stores:
        for number in range(len(store)):
            yield store.record(number)


def _carry_fidelity(stores: Sequence[Store], out: Store) -> None:
    measured = (store.fidelity for store in stores if len(store) == len(out))
    fidelity = next((facts for facts in measured if facts is not None), None)
    if fidelity is not None and out.fidelity != fidelity:
        out.save_fidelity(fidelity)


def _require_same(one: Store, other: Store, advice: str) -> None:
    difference = one.manifest.first_difference(other.manifest)
    if difference is not None:
        what, of_one, of_other = difference
        raise IncompatibleStoreError(
            f"{one.path} was built with {what} {of_one}, {other.path} with {of_other}; "
            f"only stores of one teacher and recipe become one: {advice}"
        )


def _require_agreement(
    stores: Sequence[Store], target: Store | None, left: dict[bytes, DocumentRecord], *, quiet: bool
) -> int:
    """Hold what several stores, and what was left in the target, have of one document against each other.

    Returns:
        How many documents `target` lacks; 0 where there is none.
    """
    held = [target] if target is not None and len(target) else []
    conflicts: list[str] = []
    count = lacking = 0
    for store in stores:
        numbers = range(len(store)) if held or left else ()
        for number in tqdm(numbers, unit="doc", desc="compare", delay=1, leave=False, disable=quiet):
            key = document_key(store.token_ids(number))
            lacking += target is not None and key not in target
            holder = next((other for other in held if key in other), None)
            if holder is not None and not _say_the_same(store.record(number), holder):
                where = str(holder.path)
            elif key in left and not np.array_equal(store.record(number).records, left[key].records):
                assert target is not None
                where = f"{target.path}, kept there by a command that was stopped"
            else:
                continue
            count += 1
            if len(conflicts) < NAMED:
                conflicts.append(f"document {number} of {store.path} has other targets in {where}")
        if not numbers and target is not None:
            lacking += len(store)
        held.append(store)
    if count:
        more = f", and {count - NAMED:,} more" if count > NAMED else ""
        raise IncompatibleStoreError(
            f"{'; '.join(conflicts)}{more}; nothing was written: leave one of the stores out, or build it again"
        )
    return lacking


def _say_the_same(document: DocumentRecord, holder: Store) -> bool:
    recipe = holder.manifest.recipe
    for temperature in recipe.temperatures:
        for replica in range(recipe.replicas):
            found = holder.get(document.token_ids, temperature, replica)
            if found is None or not _equal(recipe.read(document.records, temperature, replica), found):
                return False
    return True


def _equal(one: SparseTargets, other: SparseTargets) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(SparseTargets))
    return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairs)
