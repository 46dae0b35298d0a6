"""Build a store: dataset and teacher in, shards out. Reads from top to bottom.

What is finished stays: every teacher batch is journalled, so a build that was killed goes on where it was, and one that
is finished computes nothing when it is run again.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from logitstore.contract import Store
from logitstore.documents import Document, read_documents
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError
from logitstore.fill import fill
from logitstore.journal import WRITE_BACK, commit_leftovers
from logitstore.live import keep_fidelity
from logitstore.manifest import Manifest
from logitstore.plan import Part, shard_positions, windows
from logitstore.prompts import prompted, read_template
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.sequences import TokenizeReport, require_places, tokenize
from logitstore.store import create_store, open_store
from logitstore.survey import Survey, take_survey
from logitstore.teacher import Teacher
from logitstore.zip_store import ZIP_SUFFIX


@dataclass(frozen=True)
class BuildConfig:
    """What `logitstore build` takes; the names are its flags."""

    teacher: str
    dataset: str
    out: Path
    adapter_path: str | None = None
    split: str = "train"
    select: str = "threshold:16"
    temperature: tuple[float, ...] = (1.0,)
    """One set of entries each."""
    replicas: int = 1
    """Independent draws of each set, which epochs rotate through."""
    tail_log_probs: bool = False
    log_z: tuple[float, ...] = ()
    prompt_template: str | None = None
    """The words around each row's prompt, with {input} where that stands."""
    hidden_layers: tuple[int, ...] = ()
    """Layers, numbered from 0, whose hidden states are kept too."""
    max_seq_length: int = 2048
    batch_tokens: int = 2048
    limit: int | None = None
    seed: int = 0
    shard: str = "1/1"
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ConfigError: naming the flag.
        """
        self.recipe(vocab_size=1 << 31, hidden_size=1 if self.hidden_layers else 0)
        Part.parse(self.shard)
        read_template(self.prompt_template, "--prompt-template")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}, expected at least 1; type --batch-tokens 2048")
        if self.max_seq_length < 2:
            raise ConfigError(
                f"max_seq_length is {self.max_seq_length}, expected at least 2: one token to read and one to predict; "
                "type --max-seq-length 2048"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit is {self.limit}, expected at least 1; type --limit 100, or leave it out to read all"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed is {self.seed}, expected 0 to 2^64 - 1; type --seed 0")

    def recipe(self, vocab_size: int, hidden_size: int = 0) -> Recipe:
        """What is kept, for a teacher whose LM head and, where any are kept, hidden states are so wide.

        Raises:
            ConfigError: naming the flag.
        """
        return Recipe(
            selection=Selection.parse(self.select),
            temperatures=self.temperature,
            seed=self.seed,
            vocab_size=vocab_size,
            replicas=self.replicas,
            tail_log_probs=self.tail_log_probs,
            log_z=self.log_z,
            hidden_layers=self.hidden_layers,
            hidden_size=hidden_size,
        )

    def recipe_of(self, teacher: Teacher) -> Recipe:
        """What is kept of this teacher.

        Raises:
            ConfigError: naming the flag.
        """
        return self.recipe(teacher.vocab_size, teacher.hidden_size(self.hidden_layers))


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    tokenized: TokenizeReport
    computed_documents: int
    computed_positions: int
    """Positions that the teacher was run for."""
    elapsed_s: float
    """Time in the teacher, selection, codec and disk; loading and tokenising apart."""
    store_documents: int
    store_positions: int
    disk_bytes: int

    @property
    def positions_per_second(self) -> float:
        """Positions written per second of the build proper."""
        return self.computed_positions / self.elapsed_s if self.elapsed_s else 0.0


def build(config: BuildConfig, say: Callable[[str], None] = lambda _line: None) -> BuildReport:
    """Build, extend or finish a store.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`; nothing that was finished is lost.
    """
    part = Part.parse(config.shard)
    if config.out.suffix == ZIP_SUFFIX and not config.out.is_dir():
        raise ConfigError(
            f"{config.out} is to be a zip file, which cannot be added to; type --out "
            f"{config.out.with_suffix('.zarr')}, and then `logitstore convert`"
        )
    if config.out.exists():
        open_store(config.out)  # not a store, or a damaged one: say so before a teacher is loaded
    rows = documents_of(config)
    teacher = Teacher(config.teacher, config.adapter_path, quiet=config.quiet)
    recipe = config.recipe_of(teacher)
    survey = survey_of(config, rows, teacher)
    say(survey.report.describe(len(survey.keys)))

    if recipe.hidden_layers:
        say(recipe.hidden_cost)
    store = open_or_create(config.out, manifest_of(config, teacher), teacher)
    commit_leftovers(store, WRITE_BACK)
    todo = survey.to_do(part, store)
    started = time.perf_counter()
    with store.writer(f"build-{part.index}-of-{part.count}") as writer:
        keys = {survey.keys[i].tobytes(): int(survey.positions[i]) for i in todo}
        missing = [key for key in keys if key not in writer]
        if len(missing) < len(survey.keys):
            others = len(survey.keys) - len(missing)
            say(f"{others:,} documents are already there, or another part's; {len(missing):,} to do")
        if stale := [key for key in writer.pending if key not in keys]:
            writer.commit(stale)  # the dataset was edited since; the teacher's answers are true all the same
        positions = sum(keys[key] for key in missing)
        with tqdm(total=positions, unit="tok", desc="teacher", disable=config.quiet or not missing) as bar:
            if todo.size:
                sequences = tokenize(documents_of(config), teacher.tokenizer, config.max_seq_length)
                most = shard_positions(recipe)
                wanted = windows(sequences, lambda key: part.holds(key) and key not in store, most)
                fill(wanted, teacher, recipe, writer, config.batch_tokens, bar.update)
    elapsed_s = time.perf_counter() - started
    keep_fidelity(store, teacher, quiet=config.quiet)
    return BuildReport(
        tokenized=survey.report,
        computed_documents=len(missing),
        computed_positions=positions,
        elapsed_s=elapsed_s,
        store_documents=len(store),
        store_positions=store.positions,
        disk_bytes=store.disk_bytes,
    )


def documents_of(config: BuildConfig) -> Iterator[Document]:
    """The rows that a build reads, their prompts as the teacher gets them.

    Raises:
        DatasetError: as `read_documents` and `prompted`.
    """
    rows = read_documents(config.dataset, split=config.split, limit=config.limit)
    return prompted(rows, read_template(config.prompt_template, "--prompt-template"))


def manifest_of(config: BuildConfig, teacher: Teacher) -> Manifest:
    """What the store says of itself."""
    template = read_template(config.prompt_template, "--prompt-template")
    return replace(teacher.manifest(config.recipe_of(teacher)), prompt_template=template)


def survey_of(config: BuildConfig, rows: Iterable[Document], teacher: Teacher) -> Survey:
    """`take_survey` with what a build is told.

    Raises:
        DatasetError, ModelError, ConfigError: as `take_survey`.
        UnusableLogitsError: a document is longer than the teacher can read.
    """
    name = teacher.loaded.name
    found = take_survey(rows, teacher.tokenizer, config.max_seq_length, teacher.vocab_size, name, quiet=config.quiet)
    require_places(teacher.places, int(found.positions.max()), f"teacher {name}")
    return found


def open_or_create(path: Path, manifest: Manifest, teacher: Teacher) -> Store:
    """Open the store at `path` if it may be extended by this teacher, or begin it.

    Raises:
        IncompatibleStoreError: it was built by another teacher, tokenizer or recipe.
        StoreWriteError: the place cannot be written.
        ConfigError: it lies inside another store.
    """
    require_outside_stores(path)
    store = open_store(path) if path.exists() else create_store(path, manifest, teacher.vocabulary)
    store.manifest.require_compatible(manifest, path)
    return store
