"""`--cross-vocab`: how a run learns from stores of a teacher with another tokenizer, chosen before the first step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_kernels import LogitsLoss, WeightedLoss

import numpy as np

from distill_trainer.across import NOWHERE, Naming, gold_asked, mapped_asked, span_asked, uld_asked, unknown_asked
from distill_trainer.config import TrainConfig
from distill_trainer.kinds import CrossVocab
from distill_trainer.losses import LINEAR, AnyLoss
from distill_trainer.schedule import Schedule
from distill_trainer.spans import SpanLoss, in_whole_spans
from distill_trainer.teachers import Teachers
from distill_trainer.texts import Known, Readings, Texts
from logitstore.alignment import spell, uncommon
from logitstore.asked import Asked
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError
from logitstore.measures import UNKNOWN_LABEL
from logitstore.model import LoadedModel
from logitstore.prompts import prompted
from logitstore.saved_maps import saved_vocabulary_map
from logitstore.sequences import TokenSequence
from logitstore.vocabulary import vocabulary_of
from logitstore.vocabulary_map import map_vocabularies

LEAST_AUTO = 0.5
"""Share of what the teacher says, positions times mass, that `mapped` must carry over for `auto` to take it."""
SAMPLED = 64
"""Documents that coverage is measured on."""
NAMED = 3
"""Documents that are named where many are unknown."""
OF_SPANS = ("span", "gold")
"""Methods that teach spans, not single positions."""
TRUNCATED = ("uld", "gold")
"""Methods that need a teacher's likeliest tokens, which a sample does not tell."""
BY_NAME = ("mapped", "gold")
"""Methods that take tokens of the same bytes for the same."""
NO_SPACES = "one of the two tokenizers drops the spaces between words (WordPiece)"
"""Where `Crossing.names_hold` does not."""


@dataclass(frozen=True)
class Coverage:
    """What of the trained positions a method teaches, over a sample of documents."""

    positions: float
    """Share of them that have targets."""
    mass: float
    """Mean share of the teacher's mass there that has a name, of a span at its last position; 1 where names do not
    matter."""
    unknown: int = 0
    """Documents with a text that no store begins with."""

    @property
    def share(self) -> float:
        """Of what the teacher says: positions times mass."""
        return self.positions * self.mass

    def __str__(self) -> str:
        named = "" if self.mass == 1 else f", with names for {100 * self.mass:.1f} % of the teacher's mass there"
        return f"{100 * self.positions:.1f} % of trained positions{named}"


class Crossing:
    """Carries a run's documents and losses over to a teacher with another tokenizer."""

    def __init__(
        self,
        config: TrainConfig,
        teachers: Teachers,
        tokenizer: Any | None,
        student: LoadedModel,
        width: int,
        *,
        cell: bool = True,
    ) -> None:
        """Map the vocabularies, unless a store keeps the map, and find the documents: read the dataset as the teacher
        does or, without its tokenizer, the texts of the stores.

        Args:
            tokenizer: the teacher's, where it is at hand.
            width: columns of the student's head.
            cell: mass of a sample that has no name goes to a cell; else it is left out.

        Raises:
            CorruptStoreError: a store's bytes are not those that were written.
            IncompatibleStoreError: it keeps a map of other tokenizers under the student's name.
            DatasetError, ModelError: as `tokenize`.
        """
        self._config, self.teachers, self._tokenizer = config, teachers, tokenizer
        self._selection = config.live_selection if teachers.recipe is None else teachers.recipe.selection
        self._teacher = vocabulary_of(tokenizer) if tokenizer is not None else teachers.stores[0].vocabulary
        self._student = vocabulary_of(student.tokenizer)
        kept = saved_vocabulary_map(teachers.stores[0], self._student.fingerprint()) if teachers.stores else None
        self._map = map_vocabularies(self._teacher, self._student) if kept is None else kept
        self._naming = Naming.of(self._map, self._teacher, self._student, width, links=config.cross_vocab != "gold")
        if not cell:
            self._naming = replace(self._naming, cell=None)
        self._without = uncommon(self._teacher, self._student)
        self._known = self._documents(config.dataset, config.split)
        self.method: CrossVocab = config.cross_vocab
        self.teaches = ""
        """What it teaches of a sample of the documents, in words."""

    def _documents(self, dataset: str, split: str) -> Known:
        if self._tokenizer is None:
            return Texts(self.teachers.stores, self._without, self._config.quiet)
        config = self._config
        rows = prompted(read_documents(dataset, split=split), config.student_template)
        ids, masks = self._student.special_ids, config.mask_prompt
        try:
            return Readings(rows, self._tokenizer, ids, self._without, config.quiet, mask_prompt=masks)
        except DatasetError as error:
            raise DatasetError(f"as the teacher reads it, {error}") from error

    def over(self, sequences: Sequence[TokenSequence], say: Callable[[str], object]) -> list[TokenSequence]:
        """The documents with what the teacher reads in their place; which of them nobody knows is said."""
        return self._all_over(sequences, self._known, say)

    def over_held_out(self, sequences: Sequence[TokenSequence], say: Callable[[str], object]) -> list[TokenSequence]:
        """The same of the held-out documents."""
        config = self._config
        if self._tokenizer is None or not sequences:
            return self._all_over(sequences, self._known, say)
        known = self._documents(config.valid_dataset or config.dataset, config.valid_split or "train")
        return self._all_over(sequences, known, say)

    def _all_over(
        self, sequences: Sequence[TokenSequence], known: Known, say: Callable[[str], object]
    ) -> list[TokenSequence]:
        asked = [self._asked(sequence, known, self.method) for sequence in sequences]
        unknown = [s.where for s, its in zip(sequences, asked, strict=True) if its.positions[0] == NOWHERE]
        if unknown:
            named = ", ".join(unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
            why = "a text that no store begins with" if self._tokenizer is None else "another text for the teacher"
            say(f"{len(unknown):,} of {len(sequences):,} documents have {why}: {named}")
        return [replace(sequence, asked=its) for sequence, its in zip(sequences, asked, strict=True)]

    def _asked(self, sequence: TokenSequence, documents: Known, method: CrossVocab) -> Asked:
        """What the teacher reads in place of a document."""
        known = documents.find(sequence, spell(sequence.token_ids, self._student, self._without))
        if known is None:
            return unknown_asked(len(sequence.token_ids), spans=method in OF_SPANS)
        if method == "span":
            return span_asked(*known)
        if method == "gold":
            return gold_asked(*known, self._naming)
        if method == "uld":
            return uld_asked(*known)
        return mapped_asked(*known, self._naming, unbiased=self._selection.unbiased)

    def coverage(self, sequences: Sequence[TokenSequence], method: CrossVocab) -> Coverage:
        """What a method would teach of some documents: where a live teacher is asked, as if it had answered; its mass
        is that of what the stores answer.
        """
        trained, taught, unknown, masses = 0, 0, 0, [np.empty(0)]
        for sequence in sequences:
            asked = self._asked(sequence, self._known, method)
            assert asked.taught is not None
            positions = np.flatnonzero(sequence.trained)
            trained += len(positions)
            found = self.teachers.of(sequence).get(asked.token_ids)
            unknown += bool(asked.positions[0] == NOWHERE)
            reach = len(asked.token_ids) - 1 if self._config.teacher else 0 if found is None else len(found)
            positions = positions[positions < asked.answered(reach)]
            positions = positions[asked.taught[positions]]
            if asked.spans is not None:
                positions = positions[in_whole_spans(asked.spans, positions, positions)]
            taught += len(positions)
            if method in ("mapped", "gold") and found is not None and len(found) == reach:
                if asked.spans is not None:
                    positions = positions[asked.spans[positions] == positions]
                masses.append(self._naming.named_mass(found.rows(asked.positions[positions])))
        mass = np.concatenate(masses)
        return Coverage(taught / trained, float(mass.mean()) if len(mass) else 1.0, unknown)

    def described(self, student: str) -> str:
        """How many of the teacher's tokens have a name, in words."""
        ids = self._map.student_ids
        return f"{np.count_nonzero(ids >= 0):,} of its {len(ids):,} tokens are tokens of {student} too"

    @property
    def names_hold(self) -> bool:
        """Whether tokens of the same bytes say the same. Not of WordPiece: its words have lost the space before them,
        and a word's beginning has the bytes of another's end.
        """
        return not (self._teacher.drops_whitespace or self._student.drops_whitespace)

    def require_names(self, instead: str = "--cross-vocab span") -> None:
        """Check that names hold where the method goes by them.

        Args:
            instead: what is to be typed where they do not.

        Raises:
            IncompatibleStoreError: they do not.
        """
        if self.method in BY_NAME and not self.names_hold:
            raise IncompatibleStoreError(
                f"--cross-vocab {self.method} goes by the bytes of tokens, and {NO_SPACES}; type {instead}"
            )

    def require_loss(self, config: TrainConfig) -> None:
        """Check that the run's loss is served across.

        Raises:
            IncompatibleStoreError: it is not.
        """
        if self.method != "mapped" and config.loss != ("kl",):
            raise IncompatibleStoreError(
                f"--cross-vocab {self.method} has a loss of its own, and --loss names {', '.join(config.loss)}; leave "
                "--loss out, or type --cross-vocab mapped"
            )
        if self.method == "span" and config.temperature is not None and config.temperature_schedule != Schedule(1, 1):
            raise IncompatibleStoreError(
                f"--cross-vocab span compares likelihoods, which are of temperature 1, and --temperature is "
                f"{config.temperature}; leave --temperature out, or type --cross-vocab mapped"
            )
        for store in self.teachers.stores:
            if self.method in OF_SPANS and UNKNOWN_LABEL in store.manifest.unknown:
                raise IncompatibleStoreError(
                    f"{store.path} was imported from {store.manifest.imported}, which keeps no log-prob of a label "
                    f"beyond its own entries, and --cross-vocab {self.method} adds them up; type --cross-vocab mapped, "
                    "or `logitstore build` a store"
                )
        flag = "`logitstore build --select top-k:50` for another store" if self.teachers.stores else "--select top-k:50"
        if self.method in TRUNCATED and self._selection.unbiased:
            raise IncompatibleStoreError(
                f"--cross-vocab {self.method} puts the teacher's probabilities in order, and a sample "
                f"({self._selection}) does not tell them; type {flag}, or --cross-vocab mapped"
            )
        if self.method == "mapped" and self._selection.unbiased and not set(config.loss_names) <= set(LINEAR):
            raise IncompatibleStoreError(
                f"--loss {', '.join(config.loss)} is not served across tokenizers by a sample "
                f"({self._selection}); type {flag}, or --loss kl"
            )

    def loss(self, loss: LogitsLoss | WeightedLoss) -> AnyLoss:
        """The loss on such targets, in place of one on the teacher's own."""
        if self.method == "span":
            return SpanLoss()
        if self.method != "mapped":
            assert isinstance(loss, LogitsLoss)  # by `require_loss`
            of = self._naming.gold_loss if self.method == "gold" else self._naming.sorted_loss
            return of(loss.temperature)
        return self._naming.loss(loss, unbiased=self._selection.unbiased)


def require_coverage(config: TrainConfig, method: CrossVocab, coverage: Coverage, count: int) -> None:
    """Check what is carried over of so many documents.

    Raises:
        ConfigError: less than `min_coverage`.
    """
    if coverage.share >= config.min_coverage:
        return
    nearer = "--student with a tokenizer nearer to the teacher's"
    if 2 * coverage.unknown >= count:
        unknown = f"{coverage.unknown:,} of {count:,} documents"
        nearer = f"--store with one of these texts (no store begins with those of {unknown})"
    raise ConfigError(
        f"--cross-vocab {method} carries over {coverage.share:.3f} of what the teacher says ({coverage}), expected at "
        f"least {config.min_coverage:g}; type --min-coverage {math.floor(100 * coverage.share) / 100:g} to go on all "
        f"the same, --cross-vocab with another way, or {nearer}"
    )
