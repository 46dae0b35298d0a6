"""Several stores as one: asked in order, an overlay first."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from logitstore.contract import Store
from logitstore.targets import SparseTargets


class Stack:
    """Stores of one recipe, in order of lookup. The first that answers a document wholly answers it."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = stores

    def __contains__(self, key: object) -> bool:
        """Whether one of them holds a document with this key."""
        return any(key in store for store in self.stores)

    def get(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None = None, replica: int = 0
    ) -> SparseTargets | None:
        """Look a document up as `contract.Store.get` does; where none answers it wholly, who answers most of it."""
        best: SparseTargets | None = None
        for store in self.stores:
            found = store.get(token_ids, temperature, replica)
            if found is not None and len(found) > (0 if best is None else len(best)):
                best = found
            if best is not None and len(best) == len(token_ids) - 1:
                break
        return best

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions of a document `get` would answer."""
        most = 0
        for store in self.stores:
            most = max(most, store.answered(token_ids))
            if most == len(token_ids) - 1:
                break
        return most
