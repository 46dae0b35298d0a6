"""Fidelity: how far what is stored lies from the live teacher, measured on a sample of documents. NumPy, no MLX.

A build hands the meter the logits of the documents it samples and the targets read back from their records; the result
goes into the manifest. `agreement` is what `verify --live` counts. Nothing here reads a store or judges a number.

The gradient angle stands for training. With z = logits / temperature, p = softmax(z), p^ the stored weights scattered
over the vocabulary (as they are: those of top-k sum to less than 1), S = sum_i p^_i, and a student that is flatter than
the teacher, q = 0.6 softmax(z / 1.3) + 0.4 m with m the mean of p over the sample, the gradients of the loss with
respect to the student's logits, summed over the first n positions, are

    full      G(n)  = sum_t     q_t - p_t
    stored    G^(n) = sum_t S_t q_t - p^_t

An unbiased selection's angle between the two falls as 1 / sqrt(n); a biased one's stops falling. m is known only at the
end, yet one pass is exact: sum_t S_t q_t = 0.6 sum_t S_t softmax(z_t / 1.3) + 0.4 m sum_t S_t, a vector and a number.

Reference: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025 (the angle).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.targets import SparseTargets

STUDENT_SHARE = 0.6
STUDENT_TEMPERATURE = 1.3
SNAPSHOT_GROWTH = 4
NO_GRADIENT = 1e-6  # a norm per position below this is the rounding of float32 weights, not a direction


@dataclass(frozen=True)
class Fidelity:
    """What was measured; p is the teacher's distribution at the store's temperature, w the stored weights."""

    positions: int
    kl_floor: float
    """Nats; the KL that a perfect student would still be shown: mean of sum_i w_i log(w_i / p_i) over entries with
    weight. Where no entry shares the tail's mass (top-k), the tail is one more cell, against p's mass off the head."""
    head_l1: float
    """Mean of sum |w_i - p_i| over the head's entries."""
    kept_mass: float
    """Mean of the teacher's probability of the stored ids."""
    weight_sum_error: float
    """Largest |sum w - 1|; where no entry shares the tail's mass, that mass counts as a weight. Rounding only, but for
    `random:N` with an exponent, whose weights sum to 1 in the mean."""
    angles: tuple[tuple[int, float], ...]
    """(n, degrees between full and stored gradient over the first n positions), n = 4, 16, 64, ... and all of them.
    A zero gradient has no direction: 0 degrees where both are zero, 90 where one is."""

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self) | {"angles": [list(pair) for pair in self.angles]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Fidelity":
        """Read what `to_json` gave; keys that a later version added are passed over.

        Raises:
            KeyError, TypeError, ValueError: not the numbers of a fidelity.
        """
        known = {field.name: data[field.name] for field in fields(cls)}
        return cls(**known | {"angles": tuple((int(n), float(degrees)) for n, degrees in data["angles"])})

    def to_text(self) -> str:
        """The same for people, a fact a line."""
        lines = {
            "measured on": f"{self.positions:,} positions, live against stored",
            "KL floor": f"{self.kl_floor:.4f} nats",
            "head L1": f"{self.head_l1:.4f}",
            "kept mass": f"{self.kept_mass:.3f}",
            "weight sums": f"within {self.weight_sum_error:.1e} of 1",
            "angle": ", ".join(f"{degrees:.1f}° over {n:,}" for n, degrees in self.angles) + " positions",
        }
        return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


class FidelityMeter:
    """Adds up positions one by one, so that how they were cut into calls changes not a bit of the result.

    Memory: float64 [V] vectors: 4 running sums, 2 for each power of 4 passed, and a few for the row at work.
    """

    def __init__(self, vocab_size: int, temperature: float = 1.0) -> None:
        self._temperature = temperature
        self._positions = 0
        self._kl = self._head_l1 = self._kept_mass = self._weight_sum_error = self._weight = 0.0
        self._sums = np.zeros((4, vocab_size))  # of p, softmax(z / 1.3), S softmax(z / 1.3) and p^
        self._snapshots: list[tuple[int, float, npt.NDArray[np.float64]]] = []

    def add(self, logits: npt.NDArray[np.float32], targets: SparseTargets) -> None:
        """Measure n positions; the softmax is taken in float64.

        Args:
            logits: float32 [n, V], before the temperature; may hold -inf.
            targets: what is stored of the same n positions, in the same order.

        Raises:
            ValueError: shapes that do not fit, logits that are no distribution, or weight stored for a token whose
                probability is zero (an infinite KL). The meter is of no use after that.
        """
        if logits.shape != (len(targets), self._sums.shape[1]):
            raise ValueError(f"logits {logits.shape} do not fit {len(targets)} positions of {self._sums.shape[1]} ids")
        for row in range(len(targets)):
            self._add_row(logits[row], targets, row)
            if self._positions == SNAPSHOT_GROWTH ** (len(self._snapshots) + 1):
                self._snapshots.append(self._snapshot())

    def _add_row(self, logits: npt.NDArray[np.float32], targets: SparseTargets, row: int) -> None:
        ids, weights = targets.ids[row], targets.weights[row].astype(np.float64)
        head, tail_mass = int(targets.head_count[row]), np.exp(np.float64(targets.log_tail_mass[row]))
        z_max = logits.max()
        if not np.isfinite(z_max):
            raise ValueError(f"logits hold NaN, +inf or nothing finite at position {self._positions} of the sample")
        z = (logits.astype(np.float64) - z_max) / self._temperature
        p = np.exp(z)
        log_total = np.log(p.sum())
        p /= p.sum()
        student = np.exp(z / STUDENT_TEMPERATURE)
        student /= student.sum()

        # The cells of the KL: entries with weight and, where none of them shares the tail's mass, the tail.
        kept = weights > 0
        cells, log_p = weights[kept], z[ids[kept]] - log_total
        if tail_mass > 0 and not kept[head:].any():
            outside = p.copy()
            outside[ids[:head]] = 0
            with np.errstate(divide="ignore"):
                cells, log_p = np.append(cells, tail_mass), np.append(log_p, np.log(outside.sum()))
        if not np.isfinite(log_p).all():
            raise ValueError(f"position {self._positions} of the sample: weight is stored where p is zero")
        kept[:head] = True  # also where an entry's probability was rounded to zero
        weight = float(weights.sum())
        self._kl += float(cells @ (np.log(cells) - log_p))
        self._head_l1 += float(np.abs(weights[:head] - p[ids[:head]]).sum())
        self._kept_mass += float(p[ids[kept]].sum())
        self._weight_sum_error = max(self._weight_sum_error, abs(float(cells.sum()) - 1))
        self._weight += weight
        self._sums[0] += p
        self._sums[1] += student
        self._sums[2] += weight * student
        np.add.at(self._sums[3], ids, weights)  # empty entries repeat an id
        self._positions += 1

    def _snapshot(self) -> tuple[int, float, npt.NDArray[np.float64]]:
        """Positions, sum of S, and what G and G^ are without m: [2, V]."""
        return self._positions, self._weight, STUDENT_SHARE * self._sums[1:3] - self._sums[0:4:3]

    def result(self) -> Fidelity:
        """What the positions added so far show; more may be added afterwards.

        Raises:
            ValueError: none were added.
        """
        n = self._positions
        if n == 0:
            raise ValueError("no position was measured: there is no fidelity to report")
        m = self._sums[0] / n
        angles = {}
        for at, weight, (full, stored) in (*self._snapshots, self._snapshot()):
            shares = (1 - STUDENT_SHARE) * at, (1 - STUDENT_SHARE) * weight
            angles[at] = _angle((full + shares[0] * m) / at, (stored + shares[1] * m) / at)
        means = self._kl / n, self._head_l1 / n, self._kept_mass / n
        return Fidelity(n, *means, self._weight_sum_error, tuple(angles.items()))


def _angle(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Degrees between two gradients per position [V]; near 0 an arc cosine would lose half of the digits.

    Reference: Kahan, "How futile are mindless assessments of roundoff", 2006, section 12.
    """
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) < NO_GRADIENT:
        return 0.0 if max(norms) < NO_GRADIENT else 90.0
    a, b = a / norms[0], b / norms[1]
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))))


def agreement(stored: SparseTargets, live: SparseTargets) -> tuple[int, int, int]:
    """Compare what is stored of P positions with what the teacher gives for them now.

    Returns:
        (entries, equal entries, identical positions): the stored entries that are not empty; those that are kept now
        with exactly the same weight, wherever in their row; the positions of which everything is equal, tail mass,
        label, entropy and optional planes included, but hidden states: these are rounded finer than a teacher computes
        twice.

    Raises:
        ValueError: the two are not about the same positions, or keep different numbers of entries.
    """
    if stored.ids.shape != live.ids.shape or not np.array_equal(stored.positions, live.positions):
        raise ValueError(f"stored {stored.ids.shape} and live {live.ids.shape} targets are not of the same positions")
    (stored_keys, stored_weights), (live_keys, live_weights) = _keyed(stored), _keyed(live)
    _, in_stored, in_live = np.intersect1d(stored_keys, live_keys, return_indices=True)
    equal = int((stored_weights[in_stored] == live_weights[in_live]).sum())
    identical = np.ones(len(stored), bool)
    for field in fields(SparseTargets):
        if field.name == "hidden":
            continue
        a, b = getattr(stored, field.name), getattr(live, field.name)
        if a is None or b is None or a.shape != b.shape:  # a plane that is optional
            identical &= a is b
        else:
            identical &= (a == b).all(axis=tuple(range(1, a.ndim)))
    return len(stored_keys), equal, int(identical.sum())


def _keyed(targets: SparseTargets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(row · 2^32 + id, weight) of every entry that is of the head or has weight."""
    rows, slots = np.nonzero(targets.in_head | (targets.weights > 0))
    return (rows << 32) + targets.ids[rows, slots], targets.weights[rows, slots]
