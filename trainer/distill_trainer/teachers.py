"""Who answers a document of a run: stores in order, or those of several teachers as one.

What the stores of several teachers need of each other is checked here, before the first step: one kind of targets, and
a temperature that all serve. A mixture answers the positions that all answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distill_trainer.mixture import best_of, mixed
from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.stack import Stack
from logitstore.targets import SparseTargets


class Answering(Protocol):
    """Who answers a document: `Stack`, or several teachers as one."""

    def get(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None = None, replica: int = 0
    ) -> SparseTargets | None:
        """Targets of all or of the first of its positions."""
        ...

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions `get` would answer."""
        ...


@dataclass(frozen=True, eq=False)
class Teachers:
    """Stores, and who of them answers what."""

    stores: Sequence[Store]
    recipe: Recipe | None
    """What they serve; None where there are none yet. Of several teachers it tells losses and temperatures, and reads
    no records."""
    of: Callable[[TokenSequence], Answering]
    """Who answers a document."""
    in_order: bool = False
    """They are of one teacher, and the first that answers is right."""


def in_order(stores: Sequence[Store]) -> Teachers:
    """Stores of one recipe, asked in order."""
    stack = Stack(stores)
    return Teachers(stores, stores[0].manifest.recipe if stores else None, lambda _: stack, in_order=True)


class _Several:
    """Stores of several teachers that each have a say about every document."""

    def __init__(self, stores: Sequence[Store], recipe: Recipe) -> None:
        self._stores = stores
        self._recipe = recipe

    def _answers(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None, replica: int
    ) -> list[SparseTargets | None]:
        at = self._recipe.temperatures[0] if temperature is None else temperature
        return [store.get(token_ids, at, replica) for store in self._stores]


class Mixture(_Several):
    """Their mixture, of the positions that all answer."""

    def __init__(self, stores: Sequence[Store], recipe: Recipe, shares: Sequence[float]) -> None:
        super().__init__(stores, recipe)
        self._shares = shares

    def get(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None = None, replica: int = 0
    ) -> SparseTargets | None:
        """See `mixed`; None where one does not know the document."""
        found = self._answers(token_ids, temperature, replica)
        there = [answer for answer in found if answer is not None]
        if len(there) < len(found):
            return None
        return mixed(there, self._shares, unbiased=self._recipe.selection.unbiased)

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions all of them answer."""
        return min(store.answered(token_ids) for store in self._stores)


class ByLabel(_Several):
    """At each position the one that gave the label the highest log-prob."""

    def get(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None = None, replica: int = 0
    ) -> SparseTargets | None:
        """See `best_of`; None where nobody knows the document."""
        there = [answer for answer in self._answers(token_ids, temperature, replica) if answer is not None]
        return best_of(there) if there else None

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """How many positions at least one of them answers."""
        return max(store.answered(token_ids) for store in self._stores)


def common_recipe(stores: Sequence[Store], *, mixes: bool) -> Recipe:
    """What stores of several teachers serve together.

    Args:
        mixes: their targets are mixed, so that no entry knows its own probability.

    Raises:
        IncompatibleStoreError: samples beside truncated targets.
        ConfigError: no temperature that all serve.
    """
    first = stores[0]
    recipe = first.manifest.recipe
    served = list(recipe.served_temperatures)
    for store in stores[1:]:
        other = store.manifest
        if other.recipe.selection.unbiased != recipe.selection.unbiased:
            raise IncompatibleStoreError(
                f"{store.path} was built with --select {other.recipe.selection} and {first.path} with "
                f"{recipe.selection}, one a sample and one truncated, and no loss reads both; "
                f"type `logitstore build --select {recipe.selection}` for another store"
            )
        served = [temperature for temperature in served if temperature in other.recipe.served_temperatures]
        if not served:
            raise ConfigError(
                f"{store.path} serves temperature {_listed(other.recipe.served_temperatures)}, {first.path} "
                f"{_listed(recipe.served_temperatures)}, none in common; "
                f"type `logitstore build --temperature {recipe.temperatures[0]:g}` for another store"
            )
    recipes = [store.manifest.recipe for store in stores]
    return replace(
        recipe,
        temperatures=tuple(served),
        vocab_size=max(each.vocab_size for each in recipes),
        replicas=1,
        tail_log_probs=not mixes and all(each.tail_log_probs for each in recipes),
        log_z=(),
        hidden_layers=(),
        hidden_size=0,
    )


def _listed(temperatures: Sequence[float]) -> str:
    return ",".join(f"{temperature:g}" for temperature in temperatures)
