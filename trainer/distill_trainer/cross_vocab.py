"""Whether and how a run crosses from its teachers' tokenizers to the student's: `--cross-vocab`, chosen and said."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_trainer.config import TrainConfig
from distill_trainer.crossing import NO_SPACES, Crossing, require_coverage
from distill_trainer.several_crossings import SeveralCrossings
from distill_trainer.teachers import Teachers
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence
from logitstore.tokenizer import load_tokenizer
from logitstore.vocabulary import vocabulary_of

LEAST_AUTO = 0.5
"""Of the teacher's words, positions times mass, that `mapped` must carry over for `auto` to take it."""
SAMPLED = 64
"""Documents that coverage is measured on."""


def crossing_of(
    config: TrainConfig,
    teachers: Teachers,
    student: LoadedModel,
    width: int,
    sequences: Sequence[TokenSequence],
    say: Callable[[str], object],
) -> Crossing | SeveralCrossings | None:
    """How this run crosses from the stores' tokenizer to the student's; None where it is the same one.

    Args:
        width: columns of the student's head.
        sequences: that it trains on.
        say: takes a line of text for the user.

    Raises:
        ConfigError: less than `min_coverage`, a flag that reads the student's tokens as the teacher's, or a way to
            cross where there is nothing to.
        IncompatibleStoreError: a loss that is not served across.
        CorruptStoreError: a store's bytes are not those that were written.
    """
    if not config.distils:
        return None
    own = vocabulary_of(student.tokenizer).fingerprint()
    if teachers.stores and all(store.manifest.tokenizer.fingerprint == own for store in teachers.stores):
        if config.teacher_tokenizer is not None:
            raise ConfigError(
                f"{teachers.stores[0].path} was built with the tokenizer that student {config.student} has; "
                "leave --teacher-tokenizer out"
            )
        require_no_crossing(config)
        return None
    several_teachers = config.combination.several
    tokenizer = None if several_teachers else teachers_tokenizer(config, teachers)
    prints = [str(store.manifest.tokenizer.fingerprint) for store in teachers.stores] or [_fingerprint(tokenizer)]
    theirs = next((fingerprint for fingerprint in prints if fingerprint != own), own)
    if theirs == own:
        require_no_crossing(config)
        return None
    require_crossable(config, theirs, own)
    numbers = np.random.default_rng(config.seed).permutation(len(sequences))[:SAMPLED].tolist()
    some = [sequences[number] for number in numbers]
    if several_teachers:
        several = SeveralCrossings(config, teachers, student, width)
        several.require_coverage(config, some, say)
        return several
    crossing = Crossing(config, teachers, tokenizer, student, width)
    crossing.require_names()
    say(f"the teacher's tokenizer is another one; {crossing.described(student.name)}")
    coverage = crossing.coverage(some, "mapped" if config.cross_vocab == "auto" else config.cross_vocab)
    if config.cross_vocab == "auto":
        enough = crossing.names_hold and coverage.share >= LEAST_AUTO
        crossing.method = "mapped" if enough else "span"
        least = f"{'at least' if enough else 'less than'} {LEAST_AUTO:g} of what the teacher says"
        why = f"mapped teaches {coverage}, {least}" if crossing.names_hold else NO_SPACES
        say(f"--cross-vocab auto takes {crossing.method}: {why}")
        if not enough:
            coverage = crossing.coverage(some, "span")
    crossing.teaches = f"{coverage}, in a sample of {len(some):,} documents"
    say(f"--cross-vocab {crossing.method} teaches {crossing.teaches}")
    require_coverage(config, crossing.method, coverage, len(some))
    crossing.require_loss(config)
    return crossing


def require_no_crossing(config: TrainConfig) -> None:
    """Check that no loss of its own is asked for where the teacher's tokenizer is the student's.

    Raises:
        ConfigError: it is.
    """
    if config.cross_vocab not in ("auto", "mapped"):  # mapped is the ordinary loss there
        raise ConfigError(
            f"--cross-vocab {config.cross_vocab} is for a teacher of another tokenizer, and student {config.student} "
            "has the teacher's; leave --cross-vocab out"
        )


def teachers_tokenizer(config: TrainConfig, teachers: Teachers) -> Any | None:
    """The teacher's tokenizer, where one is at hand.

    Raises:
        ModelError: it does not load.
        IncompatibleStoreError: it is not the one that the stores were built with.
    """
    flag = "--teacher-tokenizer" if config.teacher_tokenizer else "--teacher"
    source = config.teacher_tokenizer or config.teacher
    if source is None:
        return None
    tokenizer = load_tokenizer(source, flag)
    theirs = _fingerprint(tokenizer)
    for store in teachers.stores:
        manifest = store.manifest
        if manifest.tokenizer.fingerprint != theirs:
            raise IncompatibleStoreError(
                f"{store.path} was built with tokenizer {manifest.tokenizer.fingerprint} (teacher "
                f"{manifest.teacher.name}), {flag} {source} has {theirs}; type {flag} with the model that built it"
            )
    return tokenizer


def _fingerprint(tokenizer: Any) -> str:
    return vocabulary_of(tokenizer).fingerprint()


def require_crossable(config: TrainConfig, teacher_fingerprint: str, student_fingerprint: str) -> None:
    """Check that nothing else reads the student's tokens as the teacher's.

    Raises:
        ConfigError: a flag that does.
    """
    for given, flag in (
        (config.on_policy > 0, "--on-policy"),
        (config.attention_loss is not None, "--attention-loss"),
        (
            config.combination.several and config.teacher_tokenizer is not None,
            "--teacher-tokenizer of several teachers",
        ),
        (config.hidden_loss is not None, "--hidden-loss"),
        (bool(config.teacher_measures), f"{', '.join(config.teacher_measures)} of a document"),
        (config.teacher_template != config.student_template, "a prompt of the teacher's own"),
    ):
        if given:
            raise ConfigError(
                f"the teacher has tokenizer {teacher_fingerprint}, student {config.student} has {student_fingerprint}, "
                f"and {flag} needs the teacher's; leave it out, or type --student with a model of the teacher's "
                "tokenizer"
            )
