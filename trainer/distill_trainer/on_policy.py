"""`--on-policy`: some batches are the student's own completions of their prompts, which the teacher then scores.

Stands between the order of documents and the source of targets. A batch is on policy or not by the run's seed and its
number alone, and so is what the sampling draws: a resumed run completes as one that never stopped. Completions go to
the teacher as any other miss does, and with `--write-back` into the store. Their tokens are no truth, so the
cross-entropy weighs nothing there, and positions that the teacher does not answer are left out.

The training's own random state is not drawn from, and the student generates in eval mode.

Reference: Agarwal et al., "On-Policy Distillation of Language Models", 2024, algorithm 1 (GKD), lambda = FRACTION.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import generate_step

from distill_trainer.batches import Weighing
from distill_trainer.config import TrainConfig
from distill_trainer.parallel import ALONE, Processes
from distill_trainer.targets import Count, TargetSource
from logitstore.asked import Asked
from logitstore.errors import DatasetError
from logitstore.model import LoadedModel
from logitstore.sequences import TokenSequence
from logitstore.vocabulary import vocabulary_of


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """Lets the student complete the prompts of some batches."""

    config: TrainConfig
    student: LoadedModel
    source: TargetSource
    vocab_size: int
    """Token ids below it are generated: those that the teacher and the tokenizer know."""

    def batch(
        self, sequences: list[TokenSequence], number: int, among: Processes = ALONE
    ) -> tuple[list[TokenSequence], Count]:
        """The batch of this number: as it is, or with the student's completions, and how many tokens these have.

        Documents without a prompt are left out of a batch of completions. Once the teacher is lost, there are none. One
        process among several gives its share.
        """
        drawn = np.random.default_rng([self.config.seed, number])
        prompted = [(sequence, start) for sequence in sequences if (start := completion_start(sequence)) is not None]
        if drawn.random() >= self.config.on_policy or not prompted or self.source.lost:
            return list(among.share(sequences)), Count()
        keys = mx.random.split(mx.random.key(int(drawn.integers(1 << 63))), len(prompted))
        model = self.student.model
        training = model.training
        model.eval()
        try:
            shared = among.share(list(zip(prompted, keys, strict=True)))
            tokens = [self._generated(s.token_ids[: at + 1], self._room(s, at), key) for (s, at), key in shared]
        finally:
            model.train(training)
        own = [completed(s, at, new) for ((s, at), _), new in zip(shared, tokens, strict=True)]
        return own, Count(on_policy=1, generated=sum(map(len, tokens)))

    def _room(self, sequence: TokenSequence, start: int) -> int:
        """The most tokens that may follow a document's prompt: as many as fit the run, and the places of both models.

        Nobody reads the last one. A prompt that leaves no room is the teacher's to refuse.
        """
        asked_start = start if sequence.asked is None else int(sequence.asked.positions[start])
        room = [self.config.on_policy_tokens, self.config.max_seq_length - start - 1]
        for model, read in ((self.student, start), (self.source.teacher, asked_start)):
            if model is not None and model.places is not None:
                room.append(model.places - read)
        return max(min(room), 1)

    def _generated(self, prompt: npt.NDArray[np.int32], most: int, key: mx.array) -> npt.NDArray[np.int32]:
        """Tokens that the student says after a prompt, int32 [1 .. most], the end of text among them."""
        temperature, found, ends = self.config.on_policy_temperature, list[int](), self.student.end_tokens

        def sampler(log_probs: mx.array) -> mx.array:
            nonlocal key
            known = log_probs[..., : self.vocab_size].astype(mx.float32)
            if temperature == 0:
                return mx.argmax(known, axis=-1)
            key, now = mx.random.split(key)
            return mx.random.categorical(known / temperature, key=now)

        steps: Any = generate_step(mx.array(prompt), self.student.model, max_tokens=most, sampler=sampler)
        for token, _ in steps:
            found.append(int(token))
            if found[-1] in ends:
                break
        return np.array(found, np.int32)


def on_policy(
    config: TrainConfig,
    student: LoadedModel,
    sequences: Sequence[TokenSequence],
    source: TargetSource | None,
    say: Callable[[str], object],
) -> OnPolicy | None:
    """What completes the run's batches; None where it asks for none.

    Raises:
        DatasetError: no document has a prompt.
    """
    if not config.on_policy or source is None:
        return None
    prompts = sum(completion_start(sequence) is not None for sequence in sequences)
    if not prompts:
        raise DatasetError(
            f"none of {len(sequences):,} documents has a prompt for the student to complete; type --dataset with rows "
            'of {"prompt", "completion"} or {"messages"}, or leave --on-policy out'
        )
    without = f"; {len(sequences) - prompts:,} have no prompt and are left out of these"
    say(
        f"on policy: about {100 * config.on_policy:g} % of batches are the student's own completions, of at most "
        f"{config.on_policy_tokens:,} tokens{without if prompts < len(sequences) else ''}"
    )
    vocab_size = min(source.recipe.vocab_size, len(vocabulary_of(student.tokenizer).tokens))
    return OnPolicy(config, student, source, vocab_size)


def completion_start(sequence: TokenSequence) -> int | None:
    """The position that predicts the first token of a document's completion, of a chat the assistant's last turn.

    None where every token is trained: there is no prompt, or no more of it than the token that the text begins with.
    """
    trained = sequence.trained
    return None if trained.all() else int(np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))[-1])


def completed(sequence: TokenSequence, start: int, tokens: npt.NDArray[np.int32]) -> TokenSequence:
    """A document with other tokens from a position's label on, and these alone trained.

    Where the teacher reads another prompt, they follow that.
    """
    asked = sequence.asked
    if asked is not None:
        first = int(asked.positions[start])
        positions = np.concatenate([asked.positions[:start], first + np.arange(len(tokens), dtype=np.int32)])
        asked = Asked(np.concatenate([asked.token_ids[: first + 1], tokens]), positions)
    return replace(
        sequence,
        token_ids=np.concatenate([sequence.token_ids[: start + 1], tokens]),
        trained=np.arange(start + len(tokens)) >= start,
        where=f"the student's own completion of {sequence.where}",
        truncated=0,
        weights=None,
        asked=asked,
    )


def weighing_of(weighing: Weighing, count: Count) -> Weighing:
    """How a batch with this count is weighed: one on policy by the distillation term alone."""
    return replace(weighing, on_miss="skip", ce=0.0) if count.on_policy else weighing
