"""Verify a store in an LMDB file: its pages, then every document."""

from pathlib import Path

from tqdm import tqdm

from logitstore.errors import CorruptStoreError, StoreFormatError
from logitstore.index import block_hashes
from logitstore.lmdb_store import LmdbStore, block_key
from logitstore.sealed import Problem
from logitstore.verify import VerifyReport, are_weights


def verify_lmdb(path: Path, *, quiet: bool = False) -> VerifyReport:
    """Check all of a store in an LMDB file; see `verify.verify`.

    Opening has held every page of the tree against what LMDB writes and every entry that finds a document against a
    checksum. So it remains that each record has the checksum and the key that it was written with, and decodes.
    """
    try:
        store = LmdbStore(path)
        documents, positions = len(store), store.positions
    except (CorruptStoreError, StoreFormatError) as error:
        return VerifyReport(1, 0, 0, [Problem(path.name, str(error))])
    problems = []
    for what in ("vocabulary", "fidelity"):
        try:
            getattr(store, what)
        except CorruptStoreError as error:
            problems.append(Problem(path.name, str(error)))
    found = 0
    for number in tqdm(range(documents), desc="verify", unit="document", delay=1, disable=quiet):
        try:
            faults, count = _faults(store, number)
            problems += (Problem(path.name, f"document {number} {fault}") for fault in faults)
            found += count
        except CorruptStoreError as error:
            problems.append(Problem(path.name, str(error)))
    if not problems and found != positions:
        problems.append(Problem(path.name, f"holds {found:,} positions, not {positions:,} as it says"))
    return VerifyReport(1, documents, positions, problems)


def _faults(store: LmdbStore, number: int) -> tuple[list[str], int]:
    """What is wrong with a document that decodes, and how many positions it has."""
    record, recipe, faults = store.record(number), store.manifest.recipe, []
    if record.token_ids.min() < 0 or record.token_ids.max() >= recipe.vocab_size:
        faults.append("has a token beyond the vocabulary")
    if any(store.file.get(block_key(value, number)) is None for value in block_hashes(record.token_ids)):
        faults.append("is not found by its beginning")
    if not are_weights(record, recipe):
        faults.append("has weights that no distribution has")
    return faults, len(record.records)
