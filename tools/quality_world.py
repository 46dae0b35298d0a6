"""Where `bench_quality` learns: a teacher, a student, training text and held-out text.

`small` makes its own: a byte-level BPE of 1,024 tokens and a llama of 1.1 million parameters, trained for some minutes
on CPython's documentation and standard library, and a student a quarter its size. `smollm2` takes the demo's teacher,
SmolLM2-135M-Instruct, and 10 of its 30 layers as the student.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from distill_trainer.batches import epochs
from distill_trainer.config import TrainConfig
from distill_trainer.student import load_student, make_trainable
from logitstore.documents import read_documents
from logitstore.model import LoadedModel, build_model, load_model, save_model_dir
from logitstore.sequences import TokenSequence, tokenize
from tools.bench_text import teacher_path, texts

VOCAB = 1024
WINDOW_CHARACTERS = 256
SHARE = 2
"""Every second window is the teacher's text."""
STUDENT_SHARE = 4
"""And every fourth of those the students'."""
HELD_OUT = 25
"""Every 25th document."""


@dataclass(frozen=True)
class World:
    """What all methods share."""

    name: str
    teacher: Path
    student: Callable[[int], LoadedModel]
    """The untrained student of a seed, all of it trainable, float32."""
    data: Path
    """The training text, as JSONL."""
    train: Sequence[TokenSequence]
    held_out: Sequence[TokenSequence]
    steps: int
    batch_size: int
    learning_rate: float
    """At the peak of a cosine with a tenth of the steps to warm up."""

    def optimizer(self) -> optim.Optimizer:
        """AdamW, as new."""
        return adamw(self.learning_rate, self.steps)


def adamw(learning_rate: float, steps: int) -> optim.Optimizer:
    """AdamW along a warm-up of a tenth of the steps and a cosine."""
    warm = max(steps // 10, 1)
    rate = optim.join_schedules(
        [optim.linear_schedule(0, learning_rate, warm), optim.cosine_decay(learning_rate, steps - warm)], [warm]
    )
    return optim.AdamW(learning_rate=rate, bias_correction=True)


def small_world(out: Path, steps: int) -> World:
    """The world of a small teacher, which is made in OUT/teacher unless it is there."""
    folder = out / "small"
    folder.mkdir(parents=True, exist_ok=True)
    documents = [text[at : at + WINDOW_CHARACTERS] for text in texts() for at in range(0, len(text), WINDOW_CHARACTERS)]
    documents = [text for text in documents if len(text) > WINDOW_CHARACTERS // 2][::SHARE]
    data = _split(folder, documents)
    teacher = folder / "teacher"
    tokenizer = trained_tokenizer(documents[: len(documents) // 4])
    train, held_out = (_sequences(path, tokenizer) for path in data)
    if not (teacher / "config.json").exists():
        _train_teacher(teacher, tokenizer, train)

    def student(seed: int) -> LoadedModel:
        path = folder / f"student-{seed}"
        if not (path / "config.json").exists():
            begun_llama(path, tokenizer, hidden=64, layers=4, seed=seed + 1)
        return _trainable(load_model(path))

    few = folder / "student.jsonl"
    few.write_text(
        "".join(data[0].read_text(encoding="utf-8").splitlines(keepends=True)[::STUDENT_SHARE]), encoding="utf-8"
    )
    return World("small", teacher, student, few, train[::STUDENT_SHARE], held_out, steps, 12, 3e-3)


def smollm2_world(out: Path, steps: int) -> World:
    """The world of the demo's teacher."""
    folder = out / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    documents = [text[:1600] for text in list(texts())[:84]]
    data = _split(folder, documents)
    teacher = teacher_path()
    config = TrainConfig(
        student=str(teacher), dataset=str(data[0]), out=str(folder / "none"), alpha=0, keep_layers=10,
        fine_tune_type="full", quiet=True,
    )  # fmt: skip
    tokenizer = load_student(config).tokenizer
    train, held_out = (_sequences(path, tokenizer) for path in data)

    def student(seed: int) -> LoadedModel:
        del seed  # a cut teacher draws nothing
        made = load_student(config)
        make_trainable(made, config)
        return made

    return World("smollm2", teacher, student, data[0], train, held_out, steps, 2, 2e-4)


def _split(folder: Path, documents: Sequence[str]) -> tuple[Path, Path]:
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    kept = [d for i, d in enumerate(documents) if i % HELD_OUT], documents[::HELD_OUT]
    for path, some in zip(paths, kept, strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")
    return paths


def _sequences(path: Path, tokenizer: Any) -> list[TokenSequence]:
    return list(tokenize(read_documents(str(path)), tokenizer, 512))


def trained_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` tokens, trained on some text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def _llama(tokenizer: Any, *, hidden: int, layers: int, seed: int) -> LoadedModel:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 8 * hidden // 3 // 32 * 32,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
    }
    from mlx_lm.models import llama

    rng = np.random.default_rng(seed)
    shapes = tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters())
    weights = {name: _drawn(rng, parameter.shape) for name, parameter in shapes}
    model = build_model(config, weights)
    return LoadedModel(model, tokenizer, config, "small", Path(), None, None, "float32", "float32")


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    """Norms at 1, matrices N(0, 0.02)."""
    return mx.ones(shape) if len(shape) == 1 else mx.array(rng.normal(0, 0.02, shape).astype(np.float32))


def begun_llama(path: Path, tokenizer: Any, *, hidden: int, layers: int, seed: int) -> None:
    """Save an untrained llama as an mlx-lm folder."""
    _save(_llama(tokenizer, hidden=hidden, layers=layers, seed=seed), tokenizer, path)


def _save(made: LoadedModel, tokenizer: Any, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_model_dir(made.model, tokenizer, made.config, path)


def _trainable(made: LoadedModel) -> LoadedModel:
    made.model.unfreeze()
    made.model.train()
    return made


def _train_teacher(path: Path, tokenizer: Any, sequences: Sequence[TokenSequence], steps: int = 1000) -> None:
    """Train a teacher on the text's own tokens."""
    made = _trainable(_llama(tokenizer, hidden=192, layers=2, seed=0))
    optimizer = adamw(3e-3, steps)

    def loss(tokens: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
        each = nn.losses.cross_entropy(made.model(tokens), labels) * mask
        return each.sum() / mask.sum()

    step = nn.value_and_grad(made.model, loss)
    order = epochs([len(s.trained) for s in sequences], 12, 0)
    for _ in tqdm(range(steps), desc="teacher", unit="step"):
        chosen = [sequences[i].token_ids for i in next(order)[1]]
        tokens = np.zeros((len(chosen), max(map(len, chosen))), np.int32)
        mask = np.zeros((len(chosen), tokens.shape[1] - 1), np.float32)
        for row, token_ids in enumerate(chosen):
            tokens[row, : len(token_ids)] = token_ids
            mask[row, : len(token_ids) - 1] = 1
        _, gradients = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(mask))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(made.model, gradients)
        mx.eval(made.model.parameters(), optimizer.state)
    _save(made, tokenizer, path)
