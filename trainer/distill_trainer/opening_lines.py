"""What a run says before its first step: what the stores lack, what is padding; and lines beside a progress bar."""

from collections.abc import Callable, Sequence
from itertools import islice

from tqdm import tqdm

from distill_trainer.batches import epochs
from distill_trainer.config import TrainConfig
from distill_trainer.draw import Draw
from distill_trainer.live_teacher import DONE, SILENT
from distill_trainer.packing import padding
from distill_trainer.parallel import Processes
from distill_trainer.targets import TargetSource
from logitstore.contract import Store
from logitstore.errors import MissingTargetsError
from logitstore.manifest import template_digest
from logitstore.sequences import TokenSequence

PROBED = 1000
"""Batches whose padding is counted before the first step."""


def between_bars(say: Callable[[str], object]) -> Callable[[str], object]:
    """Lines that do not run into a progress bar, which is drawn again below them."""

    def line(text: str) -> None:
        with tqdm.external_write_mode():
            say(text)

    return line


def say_coverage(
    source: TargetSource,
    sequences: list[TokenSequence],
    held_out: list[TokenSequence],
    config: TrainConfig,
    say: Callable[[str], object],
    other_template: str = "",
) -> None:
    """Say before the first step how many documents the stores lack, and what will be done about them.

    Args:
        other_template: from `said_of_templates`; said where there are some.

    Raises:
        MissingTargetsError: there are some to be trained on, and the policy is "error".
    """
    missing = source.missing(sequences)
    if config.store:
        there = len(sequences) - missing
        on_miss = f"the teacher is asked, {SILENT[config.miss_policy]}" if source.asks else config.miss_policy
        if source.asks_services:
            on_miss = f"the service's teacher is asked, else: {on_miss}"
        say(f"{there:,} of {len(sequences):,} documents are in the store, {missing:,} miss; on a miss: {on_miss}")
        if lacking := source.missing(held_out):
            told = f"{len(held_out) - lacking:,} of {len(held_out):,} documents are in the store, {lacking:,} miss"
            say(f"held out: {told}")
        if other_template and (missing or lacking):
            say(other_template)
    else:
        say(f"without a store all of {missing:,} documents miss: the teacher is asked, {SILENT[config.miss_policy]}")
    beyond = source.beyond(sequences) if config.max_teacher_length else 0
    if beyond:
        say(
            f"{beyond:,} trained positions lie beyond the first {config.max_teacher_length:,} tokens that the teacher "
            f"reads: they are {DONE.get(config.miss_policy, DONE['hard-only'])}"
        )
    if missing and config.miss_policy == "error" and not source.asks_services:
        raise MissingTargetsError(
            f"{missing:,} of {len(sequences):,} documents are not in the store (was it built with --max-seq-length "
            f"{config.max_seq_length} too?{other_template and f' {other_template}'}); "
            "type --teacher T to ask it live, or --on-miss hard-only or skip"
        )


def said_of_templates(stores: Sequence[Store], tokenizer: object) -> str:
    """Which stores were built with another chat template than the student's, as far as they know; "" for none."""
    own = template_digest(tokenizer)
    known = [store for store in stores if not store.manifest.imported]
    others = [str(store.path) for store in known if store.manifest.tokenizer.chat_template_digest != own]
    if not others:
        return ""
    return (
        f"{', '.join(others)}: built with another chat template than the student's, which gives chats other tokens; "
        "with the teacher's chat_template.jinja in the student's folder they are the same"
    )


def say_padding(
    config: TrainConfig,
    sequences: list[TokenSequence],
    draw: Draw | None,
    among: Processes,
    say: Callable[[str], object],
) -> None:
    """Say how much of the run's first batches is padding, packed and not."""
    lengths = [len(sequence.trained) for sequence in sequences]
    order = islice(epochs(lengths, config.batch_size, config.seed, draw), min(PROBED, config.iters))
    batches = [[lengths[i] for i in among.share(numbers)] for _, numbers in order]
    packed, plain = padding(batches, config.max_seq_length), padding(batches, None)
    say(f"padding: {100 * packed:.1f} % of positions packed, {100 * plain:.1f} % without --pack")
