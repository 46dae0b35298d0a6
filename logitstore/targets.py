"""What is kept of a teacher's next-token distributions, as NumPy arrays: what a store gives and what a loss takes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """The kept entries of P positions, k each. Natural logarithms throughout; all arrays NumPy.

    Position t predicts token t + 1, so a document of L tokens has P = L - 1 positions. An entry is (token id,
    weight). The first `head_count` entries of a row are the head: their own probabilities (`random:N`: weights), ids
    ascending. The others share the tail's mass evenly, ids ascending (`threshold:k`), or are empty: weight 0 (the other
    selections, and rows whose teacher has fewer than k possible tokens).
    """

    positions: npt.NDArray[np.int32]
    """[P]; where in the document each row belongs."""
    ids: npt.NDArray[np.uint32]
    """[P, k]; token ids."""
    weights: npt.NDArray[np.float32]
    """[P, k]; weights of the entries. They sum to 1 where the selection is unbiased, to the kept mass for top-k."""
    head_count: npt.NDArray[np.int32]
    """[P]; how many leading entries are the head."""
    log_tail_mass: npt.NDArray[np.float32]
    """[P]; log of the probability outside the head, -inf where it is zero. Its exp and the head's weights sum to 1."""
    label_log_prob: npt.NDArray[np.float32]
    """[P]; the teacher's log-probability of token t + 1 at temperature 1, to the nearest 1/16, -15.875 at least."""
    entropy: npt.NDArray[np.float32]
    """[P]; entropy of the teacher's distribution in nats at temperature 1, to the nearest 1/16, 15.9375 at most."""

    log_probs: npt.NDArray[np.float32] | None = None
    """[P, k]; every entry's own log-probability, tail entries to the nearest 1/16; where the store keeps these."""
    log_z: npt.NDArray[np.float32] | None = None
    """[P, n]; log sum p^(1 / T) at the recipe's `log_z` temperatures, to the nearest 1/4096."""
    hidden: npt.NDArray[np.float32] | None = None
    """[P, n, D]; the residual stream after the recipe's `hidden_layers`, in their order; see `hidden_states`."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def in_head(self) -> npt.NDArray[np.bool_]:
        """Which entries are the head, [P, k]."""
        return np.asarray(np.arange(self.ids.shape[1]) < self.head_count[:, None])

    def rows(self, rows: slice | npt.NDArray[np.integer]) -> "SparseTargets":
        """Some of the positions."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})

    def followed_by(self, other: "SparseTargets") -> "SparseTargets":
        """These positions, and after them those of another answer to the same document."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        later: dict[str, Any] = {
            name: getattr(other, name)[len(self) :] for name, c in columns.items() if c is not None
        }
        return replace(self, **{name: np.concatenate([columns[name], rest]) for name, rest in later.items()})

    def retempered(self, temperature: float, log_z: npt.NDArray[np.float32]) -> "SparseTargets":
        """The same kept entries at another temperature: p^(1 / T) / Z_T, exact where the weights are probabilities.

        Args:
            log_z: [P]; log sum p^(1 / T) over the whole vocabulary.
        """
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights.astype(np.float64)) / temperature - log_z[:, None]
        weights = np.exp(log_weights)
        kept = np.minimum(weights.sum(axis=1), 1)
        with np.errstate(divide="ignore"):
            return replace(self, weights=weights.astype(np.float32), log_tail_mass=np.log1p(-kept).astype(np.float32))
