"""What is kept of a teacher's next-token distributions, as NumPy arrays: what a store gives and what a loss takes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """The kept entries of P positions, k each. Natural logarithms throughout; all arrays NumPy.

    Position t predicts token t + 1, so a document of L tokens has P = L - 1 positions. An entry is (token id,
    weight). The first `head_count` entries of a row are the head: exact probabilities, largest first. The others
    share the tail's mass evenly, ids ascending (`threshold:k`), or are empty: weight 0 (`top-k:K`, and rows whose
    teacher has fewer than k possible tokens).
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

    def __len__(self) -> int:
        return len(self.positions)
