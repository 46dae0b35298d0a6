"""Open a store: the one seam between those who read targets and how they lie on disk."""

from os import PathLike
from pathlib import Path

from logitstore.zarr_store import ZarrStore


def open_store(path: str | PathLike[str]) -> ZarrStore:
    """Open a store for reading. Needs no MLX.

    ```
    store = logitstore.open_store("docs.zarr")
    targets = store.get(token_ids)  # SparseTargets, or None where the store has no answer
    ```

    Raises:
        StoreNotFoundError: nothing there.
        StoreFormatError: not a store, or one of a newer format.
        CorruptStoreError: its bytes are not those that were written.
    """
    return ZarrStore(Path(path).expanduser())
