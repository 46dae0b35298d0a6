"""Stats of targets made by hand, held against `numpy.histogram` and plain loops over all of them at once."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.fidelity import Fidelity
from logitstore.stats import (
    ENTROPY_EDGES,
    LABEL_LOG_PROB_EDGES,
    TAIL_MASS_EDGES,
    StoreStats,
    collect,
)
from logitstore.store_stats import of_store
from logitstore.targets import SparseTargets
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, manifest, records

Document = tuple[npt.NDArray[np.int32], SparseTargets]
PLANES = {"records": 600, "token_ids": 150, "index": 50}
FIDELITY = Fidelity(336, 0.0018, 0.0131, 0.8125, 2e-4, ((4, 60.0), (16, 30.0), (64, 15.0), (336, 6.5))).to_json()


def document(length: int, k: int = 5, seed: int = 0) -> Document:
    """A document of random targets, on and between the edges of bins."""
    rng = np.random.default_rng(seed)
    n = length - 1
    head = rng.integers(0, k + 1, n)
    weights = np.where(np.arange(k) < rng.integers(head, k + 1)[:, None], 0.125, 0)
    with np.errstate(divide="ignore"):
        log_tail_mass = np.log(rng.integers(0, 51, n) / 50)
    targets = SparseTargets(
        positions=np.arange(n, dtype=np.int32),
        ids=rng.random((n, 20)).argsort(axis=1)[:, :k].astype(np.uint32),
        weights=weights.astype(np.float32),
        head_count=head.astype(np.int32),
        log_tail_mass=log_tail_mass.astype(np.float32),
        label_log_prob=(-rng.integers(0, 255, n) / 16).astype(np.float32),
        entropy=(rng.integers(0, 256, n) / 16).astype(np.float32),
    )
    return rng.integers(0, 20, length).astype(np.int32), targets


DOCUMENTS = [document(length, seed=length) for length in (2, 3, 9, 40, 100, 188)]


def stats(documents: list[Document] = DOCUMENTS, **options: Any) -> StoreStats:
    return collect(iter(documents), PLANES, **options)


def joined(name: str) -> npt.NDArray[Any]:
    return np.concatenate([getattr(targets, name) for _, targets in DOCUMENTS])


def test_counts_are_those_of_numpy_histogram() -> None:
    found = stats()
    entries = (joined("weights") > 0).sum(axis=1)
    for histogram, values, edges in (
        (found.entropy, joined("entropy"), ENTROPY_EDGES),
        (found.tail_mass, np.exp(joined("log_tail_mass").astype(np.float64)), TAIL_MASS_EDGES),
        (found.label_log_prob, joined("label_log_prob"), LABEL_LOG_PROB_EDGES),
        (found.head_entries, joined("head_count"), np.arange(7) - 0.5),
        (found.entries, entries, np.arange(7) - 0.5),
    ):
        assert histogram.edges == tuple(edges)
        assert histogram.counts == tuple(np.histogram(values, edges)[0])
        assert histogram.mean == pytest.approx(values.mean(dtype=np.float64))


def test_edges_are_the_documented_ones() -> None:
    assert (ENTROPY_EDGES[0], ENTROPY_EDGES[-1], set(np.diff(ENTROPY_EDGES))) == (0, 16, {0.25})
    assert (LABEL_LOG_PROB_EDGES[0], LABEL_LOG_PROB_EDGES[-1], set(np.diff(LABEL_LOG_PROB_EDGES))) == (-16, 0, {0.25})
    assert TAIL_MASS_EDGES.tolist() == [float(f"{i * 0.02:.2f}") for i in range(51)]


def test_perplexity_and_stored_labels_are_those_of_a_loop_over_all_positions() -> None:
    found, in_head, in_tail = stats(), 0, 0
    for token_ids, targets in DOCUMENTS:
        for t in range(len(targets)):
            slots = [s for s in range(5) if targets.ids[t, s] == token_ids[t + 1] and targets.weights[t, s] > 0]
            in_head += any(s < targets.head_count[t] for s in slots)
            in_tail += any(s >= targets.head_count[t] for s in slots)
    assert in_head > 10 and in_tail > 10
    assert (found.label_in_head, found.label_in_tail) == (in_head / found.positions, in_tail / found.positions)
    assert found.teacher_perplexity == pytest.approx(np.exp(-joined("label_log_prob").mean(dtype=np.float64)))


def test_a_label_belongs_to_the_position_that_the_targets_name() -> None:
    token_ids, targets = np.array([1, 2, 3, 4], np.int32), document(2)[1]
    targets.positions[:], targets.ids[:], targets.weights[:], targets.head_count[:] = 2, [[4, 0, 0, 0, 0]], 0.2, 1
    assert stats([(token_ids, targets)]).label_in_head == 1
    targets.ids[0, 0] = 2  # what follows another position
    assert stats([(token_ids, targets)]).label_in_head == 0
    targets.ids[0, 0], targets.weights[0, 0] = 4, 0  # an empty entry stores nothing
    assert stats([(token_ids, targets)]).label_in_head == 0


def test_documents_positions_and_lengths() -> None:
    found = stats()
    assert (found.documents, found.positions, found.shortest, found.longest) == (6, 336, 2, 188)
    assert found.lengths == (0, 0, 2, 0, 1, 0, 1, 1, 1)  # 2 and 3, 9, 40, 100, 188
    assert found.median_between == (8, 63)  # true: between 9 and 40


@pytest.mark.parametrize("lengths", [[7], [2, 2, 300], [5, 6], [2, 1000], [3, 4, 4, 1023], [64, 65, 127]])
def test_the_median_lies_where_it_is_said_to_lie(lengths: list[int]) -> None:
    low, high = stats([document(n) for n in lengths]).median_between or (0, 0)
    assert low <= np.median(lengths) <= high and min(lengths) <= low and high <= max(lengths)


def test_values_beyond_the_edges_count_in_the_nearest_bin() -> None:
    token_ids, targets = document(4)
    targets.entropy[:] = [-0.5, 16.0, 99.0]
    found = stats([(token_ids, targets)])
    assert (found.entropy.counts[0], found.entropy.counts[-1]) == (1, 2)


def test_a_document_with_more_entries_widens_the_histogram() -> None:
    found = stats([document(30, k=3), document(30, k=8, seed=1)])
    heads = np.concatenate([document(30, k=3)[1].head_count, document(30, k=8, seed=1)[1].head_count])
    assert found.head_entries.counts == tuple(np.histogram(heads, np.arange(10) - 0.5)[0])


def test_documents_are_gone_through_once_and_not_kept() -> None:
    alive: list[int] = []

    def watched() -> Any:
        for number in range(50):
            token_ids, targets = document(20, seed=number)
            alive.append(number)
            yield token_ids, targets

    assert collect(watched(), PLANES).documents == 50 and alive == list(range(50))


def zeros(length: int) -> Document:
    token_ids, t = document(length)
    flat = {name: np.zeros_like(getattr(t, name)) for name in ("ids", "weights", "head_count", "entropy")}
    return np.zeros_like(token_ids), SparseTargets(
        t.positions, log_tail_mass=np.full(length - 1, -np.inf, np.float32), label_log_prob=flat["entropy"], **flat
    )


def not_finite() -> Document:
    token_ids, targets = document(4)
    targets.entropy[0], targets.label_log_prob[:] = np.nan, -np.inf
    return token_ids, targets


EXTREMES = {
    "not finite": ([not_finite()], PLANES, None),
    "empty store": ([], {}, None),
    "empty store with files": ([], PLANES, {}),
    "one position": ([document(2)], PLANES, FIDELITY),
    "one document": ([document(60)], PLANES, {"angles": [[60, 0.0]], "kl_floor": math.nan}),
    "no position": ([document(1)], PLANES, {"angles": "none", "kl_floor": math.inf}),
    "all zeros": ([zeros(30), zeros(2)], {"records": 0}, {"angles": [[1, 0.0], [2, 0.0]], "kl_floor": 0.0}),
    "many entries": ([document(9, k=19), document(3, k=1)], PLANES, None),
}


def test_draws_with_replacement_know_no_tail_mass(tmp_path: Path) -> None:
    made = manifest("random:8")
    store = ZarrStore.create(tmp_path / "s", made, VOCABULARY)
    store.write_documents(records([9], 0, made.recipe))
    found = of_store(store, quiet=True)
    assert found.tail_mass.mean is None and found.positions == 8 and found.entropy.mean is not None
