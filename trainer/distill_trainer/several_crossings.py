"""Several teachers, of whom some have another tokenizer than the student's: `--store a=0.7 --store b=0.3` across.

Each store's targets become those of the student's positions by the student's names (`mapped`), and then they are
combined as ever: a mixture teaches where all of them do, and by a column each document has one teacher. Who gave the
label more is not asked: labels of other tokenizers are other stretches of text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill_kernels import LogitsLoss, WeightedLoss

import numpy as np
import numpy.typing as npt

from distill_trainer.config import TrainConfig
from distill_trainer.crossing import Coverage, Crossing, require_coverage
from distill_trainer.losses import LINEAR, AnyLoss
from distill_trainer.mixture import mixed
from distill_trainer.teachers import Answering, Teachers, in_order
from logitstore.asked import Asked
from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets
from logitstore.vocabulary import vocabulary_of


@dataclass(frozen=True, eq=False, kw_only=True)
class SeveralAsked(Asked):
    """What several teachers read in place of a document; its targets are of the student's own positions."""

    parts: tuple[Asked | None, ...]
    """One a store; None where its teacher reads the student's tokens."""


@dataclass(frozen=True, eq=False)
class _Of:
    """The stores' answers to one document, at the student's positions."""

    stores: Sequence[Store]
    asked: SeveralAsked
    shares: Sequence[float]
    """Of a mixture, else none."""
    only: int | None
    """The one that teaches it, by a column; None where there is none."""
    temperature: float
    unbiased: bool

    def get(
        self, token_ids: npt.NDArray[np.integer], temperature: float | None = None, replica: int = 0
    ) -> SparseTargets | None:
        """See `teachers.Answering`; the token ids are the student's."""
        at = self.temperature if temperature is None else temperature
        found = []
        for number in self._numbers:
            part = self.asked.parts[number]
            targets = self.stores[number].get(token_ids if part is None else part.token_ids, at, replica)
            if targets is None:
                return None
            found.append(targets if part is None else part.shifted(targets))
        if self.shares:
            return mixed(found, self.shares, unbiased=self.unbiased)
        return found[0] if found else None

    def answered(self, token_ids: npt.NDArray[np.integer]) -> int:
        """See `teachers.Answering`."""
        positions = []
        for number in self._numbers:
            part = self.asked.parts[number]
            answered = self.stores[number].answered(token_ids if part is None else part.token_ids)
            positions.append(answered if part is None else part.answered(answered))
        return min(positions, default=0)

    @property
    def _numbers(self) -> list[int]:
        """The stores that teach it."""
        if self.shares:
            return list(range(len(self.stores)))
        return [] if self.only is None else [self.only]


class SeveralCrossings:
    """A `Crossing` to each store whose tokenizer is not the student's."""

    method = "mapped"

    def __init__(self, config: TrainConfig, teachers: Teachers, student: LoadedModel, width: int) -> None:
        """As `Crossing`, of each store.

        Raises:
            ConfigError: a way to combine them, or a flag, that does not go across.
            IncompatibleStoreError: a loss that is not served across, or a tokenizer whose tokens have no names.
        """
        assert teachers.recipe is not None
        combination, recipe = config.combination, teachers.recipe
        if combination.by == "label":
            raise ConfigError(
                "--combine label compares what teachers gave a label, and of another tokenizer's it is another stretch "
                "of text; type --store A=0.7 --store B=0.3, or --combine column:NAME"
            )
        if config.cross_vocab not in ("auto", "mapped"):
            raise ConfigError(
                f"--cross-vocab {config.cross_vocab} does not combine several teachers; type --cross-vocab mapped"
            )
        if recipe.selection.unbiased and not set(config.loss_names) <= set(LINEAR):
            raise IncompatibleStoreError(
                f"--loss {', '.join(config.loss)} is not served across tokenizers by a sample ({recipe.selection}); "
                "type `logitstore build --select top-k:50` for other stores, or --loss kl"
            )
        self._combination, self._recipe, self._stores = combination, recipe, teachers.stores
        own = vocabulary_of(student.tokenizer).fingerprint()
        self.teaches = ""
        """As `Crossing.teaches`."""
        self._crossings: list[Crossing | None] = []
        for store in teachers.stores:
            crossing = None
            if store.manifest.tokenizer.fingerprint != own:
                crossing = Crossing(config, in_order([store]), None, student, width, cell=False)
                crossing.method = "mapped"
                crossing.require_names("--store of that teacher alone, with --cross-vocab span")
            self._crossings.append(crossing)
        self.teachers = Teachers(teachers.stores, recipe, self._of)

    def _of(self, sequence: TokenSequence) -> Answering:
        assert isinstance(sequence.asked, SeveralAsked)
        first, unbiased = self._recipe.temperatures[0], self._recipe.selection.unbiased
        return _Of(self._stores, sequence.asked, self._combination.shares, self._only(sequence), first, unbiased)

    def _only(self, sequence: TokenSequence) -> int | None:
        """Which store teaches a document, by its column."""
        column, values = self._combination.column, self._combination.values
        value = None if column is None else str(sequence.columns[column])
        return values.index(value) if value in values else None

    def _taught(self, sequences: Sequence[TokenSequence], number: int) -> list[int]:
        """The numbers of the documents that a store teaches."""
        return [i for i, s in enumerate(sequences) if self._combination.shares or self._only(s) == number]

    def over(self, sequences: Sequence[TokenSequence], say: Callable[[str], object]) -> list[TokenSequence]:
        """See `Crossing.over`."""
        parts: list[list[Asked | None]] = [[None] * len(self._stores) for _ in sequences]
        for number, crossing in enumerate(self._crossings):
            if crossing is not None:
                own = self._taught(sequences, number)
                for i, sequence in zip(own, crossing.over([sequences[i] for i in own], say), strict=True):
                    parts[i][number] = sequence.asked
        found = []
        for sequence, each in zip(sequences, parts, strict=True):
            taught = np.ones(len(sequence.trained), np.bool_)
            for part in each:
                if part is not None and part.taught is not None:
                    taught &= part.taught
            positions = np.arange(len(taught), dtype=np.int32)
            found.append(
                replace(sequence, asked=SeveralAsked(sequence.token_ids, positions, taught=taught, parts=tuple(each)))
            )
        return found

    def over_held_out(self, sequences: Sequence[TokenSequence], say: Callable[[str], object]) -> list[TokenSequence]:
        """See `Crossing.over_held_out`."""
        return self.over(sequences, say)

    def require_coverage(
        self, config: TrainConfig, some: Sequence[TokenSequence], say: Callable[[str], object]
    ) -> None:
        """Say what of each teacher is carried over to a sample of documents.

        Raises:
            ConfigError: of one it is less than `min_coverage`.
        """
        said = []
        for number, crossing in enumerate(self._crossings):
            own = [some[i] for i in self._taught(some, number)]
            if crossing is not None and own:
                found: Coverage = crossing.coverage(own, "mapped")
                said.append(f"{self._stores[number].path}: {found}")
                require_coverage(config, "mapped", found, len(own))
        self.teaches = f"{'; '.join(said)}, in a sample of {len(some):,} documents"
        say(f"--cross-vocab mapped teaches {self.teaches}")

    def loss(self, loss: LogitsLoss | WeightedLoss) -> AnyLoss:
        """See `Crossing.loss`: mass without a name is left out of a sample."""
        return loss
