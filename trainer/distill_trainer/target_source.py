"""Puts together who answers in a run: the stores, the live teacher, and the writer that keeps its answers.

Everything that must fit is held against everything else here, before the first step: stores among themselves, the
run's temperature and selection, the teacher, the student's tokenizer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from distill_trainer.config import TrainConfig
from distill_trainer.objective import Objective
from distill_trainer.targets import TargetSource
from distill_trainer.teachers import Teachers, in_order
from distill_trainer.temperatures import spaced
from logitstore.build import open_or_create
from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.journal import WRITE_BACK
from logitstore.overlay import default_overlay
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.served_store import open_served
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.vocabulary import vocabulary_of


def open_stores(config: TrainConfig, say: Callable[[str], object] = lambda _: None) -> Teachers:
    """Open the stores that are there; the first may be begun by the run itself when it writes back.

    Args:
        say: takes a line of text for the user, where a service does not answer.

    Raises:
        StoreError: as `open_store`; stores that differ.
        ServiceError: as `open_served`.
        ConfigError: a temperature or selection that the stores do not have.
        IncompatibleStoreError: a loss that they, or the live teacher alone, do not serve.
    """
    combination = config.combination
    paths = list(combination.paths)
    if config.write_back and not Path(paths[0]).exists():
        paths.pop(0)
    stores = [_open(path, config, say) for path in paths]
    for store in stores:
        manifest = store.manifest
        manifest.require_compatible(replace(manifest, prompt_template=config.teacher_template), store.path)
        if config.entropy_weight and "entropy" in manifest.unknown:
            raise IncompatibleStoreError(
                f"{store.path} was imported from {manifest.imported}, which keeps no entropy, expected one to "
                "weigh positions by; leave --entropy-weight out, or `logitstore build` a store"
            )
    teachers = combination.over(stores)
    for store in stores if combination.several else stores[:1]:
        recipe = store.manifest.recipe
        Objective(config, recipe, str(store.path))  # raises where the store does not serve the losses
        if config.select is not None and Selection.parse(config.select) != recipe.selection:
            raise ConfigError(
                f"{store.path} was built with --select {recipe.selection}, this run asks for {config.select}; "
                f"leave --select out, or type `logitstore build --select {config.select}` for another store"
            )
    if combination.several and teachers.recipe is not None:
        combination.require_losses(config.loss_names, teachers.recipe)
        Objective(config, teachers.recipe, combination.named)
    if teachers.recipe is None and config.distils:
        Objective(config, _live_recipe(config, vocab_size=1 << 31))  # told before a teacher is loaded
    return teachers


def _live_recipe(config: TrainConfig, vocab_size: int) -> Recipe:
    """What is kept of a live teacher without a store."""
    return Recipe(config.live_selection, spaced(config.temperature_schedule), seed=0, vocab_size=vocab_size)


def _open(path: str, config: TrainConfig, say: Callable[[str], object]) -> Store:
    if not path.startswith(("http://", "https://")):
        return open_store(path)
    overlay = default_overlay() if config.overlay is None else Path(config.overlay).expanduser()
    return open_served(path, overlay, round(config.overlay_gb * 1e9), say)


@contextmanager
def target_source(
    config: TrainConfig,
    teachers: Teachers,
    tokenizer: object,
    say: Callable[[str], object] = lambda _: None,
    *,
    crosses: bool = False,
) -> Iterator[TargetSource]:
    """Give the run its source of targets; however the block is left, what the teacher answered is in the store then.

    Args:
        teachers: from `open_stores`.
        tokenizer: the student's.
        say: takes a line of text for the user, where the teacher is lost.
        crosses: the teacher has another tokenizer, and a `Crossing` carries its targets over.

    Raises:
        IncompatibleStoreError: store, teacher and student do not belong together.
        ConfigError: without a store, a teacher with fewer tokens than the selection keeps.
        ModelError: the teacher does not load.
        StoreWriteError: answers cannot be kept, or another run keeps its own there.
    """
    stores, recipe = teachers.stores, teachers.recipe
    if stores and not crosses:
        fingerprint = vocabulary_of(tokenizer).fingerprint()
        for store in stores:
            require_same_tokenizer(store, fingerprint, config.student)
    if config.teacher is None:
        assert recipe is not None  # the config sees to it
        yield TargetSource(teachers, recipe, config.miss_policy)
        return

    teacher = Teacher(config.teacher, config.teacher_adapter_path, quiet=config.quiet)
    if recipe is None:
        recipe = _live_recipe(config, teacher.vocab_size)
    if stores or config.write_back:  # else nobody asks who this teacher is, and its weights are not read for a digest
        manifest = teacher.manifest(replace(recipe, vocab_size=teacher.vocab_size))
        wanted = replace(manifest, prompt_template=config.teacher_template)
    if stores:
        stores[0].manifest.require_compatible(wanted, stores[0].path)
    with ExitStack() as stack:
        writer = None
        if config.write_back:
            first = open_or_create(Path(config.store[0]), wanted, teacher)
            teachers = in_order([first, *(store for store in stores if store.path != first.path)])
            writer = stack.enter_context(first.writer(WRITE_BACK))
        most = config.max_teacher_length
        source = TargetSource(teachers, recipe, config.miss_policy, teacher, writer, max_teacher_length=most, say=say)
        stack.callback(source.close)
        yield source


def require_same_tokenizer(store: Store, student_fingerprint: str, student: str) -> None:
    """Check that a student reads the token ids that the store was made of.

    Raises:
        IncompatibleStoreError: saying which commands serve this student.
    """
    identity = store.manifest.tokenizer
    if identity.fingerprint != student_fingerprint:
        raise IncompatibleStoreError(
            f"{store.path} was built with tokenizer {identity.fingerprint} (teacher {store.manifest.teacher.name}), "
            f"student {student} has {student_fingerprint}; type --student with a model of the teacher's tokenizer, or "
            "`logitstore build --teacher T --dataset D --out STORE` with a teacher of the student's"
        )
