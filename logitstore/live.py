"""The live teacher against what a store holds: the fidelity that a build keeps, and `logitstore verify --live`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.contract import Store
from logitstore.fidelity import Fidelity, FidelityMeter, agreement
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher

SAMPLED_SHARE = 50
"""One position in so many is asked again, within the limits below."""
FEWEST, MOST = 256, 4096
DOCUMENT_POSITIONS = 512
"""Of a document no more than its beginning, so that the sample has many."""
SEED = 0
HIDDEN_TOLERANCE = 0.05
"""Of a layer's norm at a position: what `hidden_states` rounds away is 1.6 % at most, 0.8 % as a rule; the rest is for
the teacher's own rounding in bfloat16. Another teacher is 100 % off."""
LEAST_EQUAL = 0.99
"""Share of equal entries. A teacher's batch shapes differ in a few of ten thousand; another teacher in most."""


def keep_fidelity(store: Store, teacher: Teacher, *, quiet: bool = False) -> None:
    """Measure a seeded sample of the store's documents and keep the result in it, unless it is there already."""
    documents = len(store)
    if not documents or (store.fidelity or {}).get("documents") == documents:
        return
    room = min(max(store.positions // SAMPLED_SHARE, FEWEST), MOST)
    order = np.random.default_rng(SEED).permutation(documents) if documents < 1 << 20 else _some(documents)
    chosen = []
    for number in order.tolist():
        if room <= 0:
            break
        token_ids = store.token_ids(number)
        length = min(len(token_ids) - 1, DOCUMENT_POSITIONS)
        chosen.append((token_ids, length))
        room -= length
    fidelity = measure(store, teacher, chosen, quiet=quiet)
    rounded = {name: _rounded(value) for name, value in fidelity.to_json().items()}
    store.save_fidelity(rounded | {"documents": documents})


def measure(
    store: Store, teacher: Teacher, chosen: Sequence[tuple[npt.NDArray[np.int32], int]], *, quiet: bool = False
) -> Fidelity:
    """How far documents lie from the live teacher, each as (token ids, leading positions)."""
    temperature = store.manifest.recipe.temperatures[0]
    meter = FidelityMeter(teacher.vocab_size, temperature)
    with tqdm(total=sum(n for _, n in chosen), unit="tok", desc="fidelity", delay=2, leave=False, disable=quiet) as bar:
        for token_ids, positions in chosen:
            targets = store.get(token_ids)  # by what it says: `gc` may take the shard away that it was numbered in
            assert targets is not None, "no document goes"
            first = 0
            for rows in teacher.logits(token_ids[: positions + 1]):
                meter.add(rows, targets.rows(slice(first, first + len(rows))))
                first += len(rows)
                bar.update(len(rows))
    return meter.result()


@dataclass(frozen=True)
class Replay:
    """What `verify --live` found."""

    documents: int
    entries: int
    equal_entries: int
    positions: int
    identical_positions: int
    fidelity: Fidelity
    hidden_near: int | None = None
    """Positions whose hidden states lie within HIDDEN_TOLERANCE of the live ones; None where none are kept."""

    @property
    def ok(self) -> bool:
        """Whether entries are equal, and hidden states near, as where only the teacher's own rounding differs."""
        near = self.hidden_near is None or self.hidden_near >= LEAST_EQUAL * self.positions
        return near and self.equal_entries >= LEAST_EQUAL * self.entries

    def to_text(self) -> str:
        """A few lines for people."""
        return (
            f"live: {self.documents:,} documents, {self.equal_entries:,} of {self.entries:,} entries equal the live "
            f"teacher's, {self.identical_positions:,} of {self.positions:,} positions to the last bit\n"
            + ("" if self.hidden_near is None else self._hidden_text())
            + self.fidelity.to_text()
        )

    def _hidden_text(self) -> str:
        return (
            f"hidden states: {self.hidden_near:,} of {self.positions:,} positions within {HIDDEN_TOLERANCE:.0%} of the "
            "live teacher's\n"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        names = ["documents", "entries", "equal_entries", "positions", "identical_positions"]
        names += ["hidden_near"] if self.hidden_near is not None else []
        return {name: getattr(self, name) for name in names} | {"ok": self.ok, "fidelity": self.fidelity.to_json()}


def replay(store: Store, teacher: Teacher, count: int, seed: int, *, quiet: bool = False) -> Replay:
    """Ask the teacher again for some of the store's documents, chosen at random.

    Raises:
        IncompatibleStoreError: it is not the teacher that built the store.
    """
    recipe = store.manifest.recipe
    store.manifest.require_teacher(teacher.manifest(recipe), store.path)
    documents = min(count, len(store))
    numbers = np.random.default_rng(seed).choice(len(store), documents, replace=False).tolist()
    entries = equal = positions = identical = near = 0
    meter = FidelityMeter(teacher.vocab_size, recipe.temperatures[0])
    for number in tqdm(numbers, desc="live", unit="doc", disable=quiet):
        token_ids, stored = store.document(number)
        parts, first = [], 0
        for rows, hidden in teacher.outputs(token_ids, recipe.hidden_layers):
            held = stored.rows(slice(first, first + len(rows)))
            meter.add(rows, held)
            parts.append(recipe.record(token_ids, rows, first, hidden=hidden))
            if held.hidden is not None and hidden is not None:
                near += int(_are_near(held.hidden, hidden).sum())
            first += len(rows)
        live: SparseTargets = recipe.read(np.concatenate(parts))
        found = agreement(stored, live)
        entries, equal, identical = entries + found[0], equal + found[1], identical + found[2]
        positions += len(stored)
    hidden_near = near if recipe.hidden_layers else None
    return Replay(documents, entries, equal, positions, identical, meter.result(), hidden_near)


def _are_near(stored: npt.NDArray[np.float32], live: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether every layer of positions [P, layers, D] lies within HIDDEN_TOLERANCE of its norm: [P]."""
    off = np.linalg.norm(stored.astype(np.float64) - live, axis=2)
    near: npt.NDArray[np.bool_] = (off <= HIDDEN_TOLERANCE * np.linalg.norm(live.astype(np.float64), axis=2)).all(
        axis=1
    )
    return near


def _some(documents: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(SEED).integers(0, documents, 2 * MOST)


def _rounded(value: Any) -> Any:
    """Numbers to six digits: what a machine's own arithmetic adds beyond them would make stores differ."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value
