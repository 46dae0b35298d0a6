"""`--on-policy`: which batches are the student's own, what it says there, and what of it is trained."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.batches import Weighing, collate
from distill_trainer.on_policy import OnPolicy, completed, completion_start, on_policy, weighing_of
from distill_trainer.student import load_student, make_trainable
from distill_trainer.targets import Count
from distill_trainer.train import train
from logitstore.asked import Asked
from logitstore.documents import read_documents
from logitstore.errors import ConfigError, DatasetError
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from tests.runs import World, make_world, write_jsonl
from tests.tiny import save_tiny_gpt2, save_tiny_model, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "What runs once?", "completion": "The teacher."},
    {"prompt": "What is kept?", "completion": "A few bytes for every position."},
    {"prompt": "Who reads it?", "completion": "Every student."},
    {
        "messages": [
            {"role": role, "content": text}
            for role, text in (("user", "Hi"), ("assistant", "Hello."), ("user", "And 2025?"), ("assistant", "More."))
        ]
    },
]
DROPOUT = {"rank": 4, "dropout": 0.3, "scale": 10.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), store=False)
    write_jsonl(made.data, ROWS[:3])
    return made


def options(world: World, **more: Any) -> dict[str, Any]:
    usual = {"teacher": str(world.teacher), "on_policy": 0.5, "on_policy_tokens": 6, "lora_parameters": DROPOUT}
    return usual | {"iters": 8} | more


def learner(world: World, out: Path, places: int | None = None, **more: Any) -> OnPolicy:
    """Args: places: that the teacher has learned."""
    config = world.config(out, **options(world, **more))
    student = load_student(config)
    make_trainable(student, config)
    teacher, recipe = SimpleNamespace(places=places), SimpleNamespace(vocab_size=384)
    source: Any = SimpleNamespace(lost=False, recipe=recipe, teacher=teacher)
    found = on_policy(config, student, world.sequences(), source, lambda _: None)
    assert found is not None
    return found


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("tokens_per_second", "peak_memory_gb")
    return [{key: value for key, value in line.items() if key not in names} for line in lines]


def chats(tmp_path: Path) -> list[TokenSequence]:
    return list(tokenize(read_documents(str(write_jsonl(tmp_path / "chat.jsonl", ROWS))), tiny_tokenizer(), 512))


def test_a_run_without_own_completions_is_the_same_to_the_last_byte_whether_it_might_have_had_some(
    tmp_path: Path, world: World
) -> None:
    world.train(tmp_path / "none", **options(world, on_policy=0.0, on_policy_tokens=128, iters=4))
    world.train(tmp_path / "rare", **options(world, on_policy=1e-12, iters=4))
    none, rare = ((tmp_path / run / "adapters.safetensors").read_bytes() for run in ("none", "rare"))
    assert none == rare
    added = {"on_policy": 0, "generated": 0}
    assert [line | added for line in metrics(tmp_path / "none")] == metrics(tmp_path / "rare")
    assert not added.keys() & metrics(tmp_path / "none")[0].keys()


def test_a_resumed_run_completes_as_one_that_never_stopped(tmp_path: Path, world: World) -> None:
    whole, _ = world.train(tmp_path / "whole", **options(world, grad_accumulation_steps=2))
    world.train(tmp_path / "cut", **options(world, grad_accumulation_steps=2, iters=3, save_every=3))
    cut, _ = world.train(tmp_path / "cut", **options(world, grad_accumulation_steps=2, resume=True, save_every=3))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    saved = [mx.load(str(tmp_path / run / "adapters.safetensors")) for run in ("whole", "cut")]
    assert all(mx.array_equal(saved[0][name], saved[1][name]).item() for name in saved[0])
    assert whole.count == cut.count
    assert 0 < whole.count.on_policy < 16 and whole.count.generated > 0


def test_a_batch_is_on_policy_by_seed_and_number_alone_and_the_random_state_is_left_alone(
    tmp_path: Path, world: World
) -> None:
    own, sequences = learner(world, tmp_path / "o"), world.sequences()
    before = mx.array(mx.random.state[0])
    first = [own.batch(sequences[:1], number) for number in range(8)]
    again = [own.batch(sequences[:1], number) for number in reversed(range(8))][::-1]
    assert mx.array_equal(before, mx.random.state[0]).item()
    assert own.student.model.training
    for (a, count), (b, same) in zip(first, again, strict=True):
        assert count == same
        assert np.array_equal(a[0].token_ids, b[0].token_ids)
    assert 0 < sum(count.on_policy for _, count in first) < 8
    every = replace(own, config=replace(own.config, on_policy=1.0))
    texts = {every.batch(sequences[:1], number)[0][0].token_ids.tobytes() for number in range(3)}
    assert len(texts) == 3
    lost: Any = SimpleNamespace(lost=True)
    assert replace(every, source=lost).batch(sequences, 0) == (sequences, Count())


def test_the_student_says_what_its_whole_forward_pass_says_and_that_alone_is_trained(
    tmp_path: Path, world: World
) -> None:
    own = learner(world, tmp_path / "o", on_policy=1.0, on_policy_temperature=0.0)
    model = own.student.model
    sequences = chats(tmp_path)
    batch, count = own.batch(sequences, 0)
    assert (count.on_policy, count.generated) == (1, sum(int(s.trained.sum()) for s in batch))
    model.eval()
    for sequence, before in zip(batch, sequences, strict=True):
        new = int(sequence.trained.sum())
        length = len(sequence.token_ids) - new
        assert sequence.trained.tolist() == [False] * (length - 1) + [True] * new
        assert np.array_equal(sequence.token_ids[:length], before.token_ids[:length])
        assert before.trained[length - 1] and not before.trained[length - 2]
        said = mx.argmax(model(mx.array(sequence.token_ids[None, :-1]))[0], axis=-1)
        assert np.array_equal(np.array(said)[length - 1 :], sequence.token_ids[length:])
    text = tiny_tokenizer().decode(batch[3].token_ids[: -int(batch[3].trained.sum())])
    assert text.endswith("And 2025?<|im_end|>\n<|im_start|>assistant\n")


def test_completions_are_sampled_at_the_temperature(tmp_path: Path, world: World) -> None:
    own = learner(world, tmp_path / "o", on_policy=1.0, on_policy_temperature=0.5, on_policy_tokens=1)
    sequence = world.sequences()[0]
    start = completion_start(sequence)
    assert start is not None
    own.student.model.eval()
    logits = np.array(own.student.model(mx.array(sequence.token_ids[None, : start + 1]))[0, -1], np.float64) / 0.5
    p = np.exp(logits - logits.max())
    p /= p.sum()
    draws = np.array([b.token_ids[-1] for n in range(2) for b in own.batch([sequence] * 60, n)[0]])
    mean, error = np.log(p)[draws].mean(), np.log(p)[draws].std() / np.sqrt(len(draws))
    assert mean == pytest.approx(float((p * np.log(p)).sum()), abs=4 * error)


def test_own_completions_are_trained_by_the_distillation_term_alone(tmp_path: Path, world: World) -> None:
    _, steps = world.train(tmp_path / "o", **options(world, iters=6, alpha=0.7))
    assert {step["on_policy"] for step in steps} == {0, 1}
    for step in steps:
        ce = 0 if step["on_policy"] else 0.3 * step["ce_loss"]
        assert step["loss"] == pytest.approx(0.7 * step["kd_loss"] + ce, rel=1e-5)
        assert (step["trained_tokens"] == step["generated"]) == bool(step["on_policy"])
    batch = collate(chats(tmp_path), [None] * 4, weighing_of(Weighing(0.7, "hard-only"), Count(on_policy=1)))
    assert batch is None  # the teacher said nothing of it


def test_written_back_completions_are_hits_when_the_run_is_made_again(tmp_path: Path, world: World) -> None:
    store = {"store": (str(tmp_path / "s.zarr"),), "write_back": True}
    first, _ = world.train(tmp_path / "a", **options(world, on_policy=1.0, **store))
    again, steps = world.train(tmp_path / "b", **options(world, on_policy=1.0, **store))
    assert first.count.misses == first.count.generated == again.count.hits
    assert (again.count.misses, again.count.generated) == (0, first.count.generated)
    assert [step["loss"] for step in steps] == pytest.approx([line["loss"] for line in metrics(tmp_path / "a")])
    kept = open_store(tmp_path / "s.zarr")
    assert kept.positions >= first.count.generated


def test_no_token_is_said_that_the_tokenizer_does_not_have(tmp_path: Path, world: World) -> None:
    save_tiny_model(tmp_path / "wide", vocab_size=2048, seed=3)
    own = learner(world, tmp_path / "o", on_policy=1.0, student=str(tmp_path / "wide"), on_policy_tokens=30)
    batch, count = own.batch(world.sequences(), 0)
    assert count.generated > 30
    assert max(int(s.token_ids.max()) for s in batch) < len(tiny_tokenizer())


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_completion_ends_where_a_model_has_learned_no_more_places(tmp_path: Path, world: World, who: str) -> None:
    few = {"student": str(save_tiny_gpt2(tmp_path / "gpt2", places=36))} if who == "student" else {"places": 36}
    own = learner(world, tmp_path / "o", on_policy=1.0, on_policy_tokens=100, **few)
    batch, _ = own.batch(world.sequences(), 0)
    assert max(len(sequence.token_ids) for sequence in batch) == 37  # nobody reads the last one


def test_a_completion_follows_the_teachers_own_prompt_where_it_has_one() -> None:
    asked = Asked(np.array([7, 8, 9, 10, 50, 51], np.int32), np.array([0, 3, 4], np.int32))
    before = TokenSequence(np.array([1, 2, 50, 51], np.int32), np.array([False, True, True]), "here", 0, asked=asked)
    made = completed(before, 1, np.array([60, 61, 62], np.int32))
    assert made.token_ids.tolist() == [1, 2, 60, 61, 62]
    assert made.trained.tolist() == [False, True, True, True]
    assert made.asked is not None
    assert made.asked.token_ids.tolist() == [7, 8, 9, 10, 60, 61, 62]
    assert made.asked.positions.tolist() == [0, 3, 4, 5]


def test_what_cannot_be_completed_is_refused_with_what_to_type(tmp_path: Path, world: World) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Nobody asks."}, {"text": "Nobody answers."}])
    with pytest.raises(DatasetError, match=r"none of 2 documents has a prompt .* or leave --on-policy out"):
        train(world.config(tmp_path / "o", **options(world, dataset=str(text))))
    assert not (tmp_path / "o").exists()
    for wrong, said in (
        ({"teacher": None, "store": ("s",)}, "type --teacher T"),
        ({"on_policy": 1.5}, "on_policy is 1.5, expected 0 to 1"),
        ({"mask_prompt": False}, "leave --no-mask-prompt"),
        ({"think_weight": 2.0}, "--think-weight out"),
        ({"on_policy_tokens": 0}, "type --on-policy-tokens 128"),
        ({"on_policy_temperature": -1.0}, "type --on-policy-temperature 1"),
        ({"on_policy": 0.0}, "type --on-policy 0.5 with them"),
    ):
        with pytest.raises(ConfigError, match=said):
            world.config(tmp_path / "o", **options(world, **wrong))
