"""`logitstore vocab-map` says how much of a store's mass a student's tokenizer has tokens for, from the store alone."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from distill_cli.logitstore import main
from logitstore.coverage import HEAVIEST, Coverage, coverage
from logitstore.manifest import Manifest
from logitstore.merge import convert
from logitstore.store import create_store, open_store
from logitstore.vocabulary import Vocabulary, vocabulary_of
from logitstore.vocabulary_map import map_vocabularies
from logitstore.zarr_store import MAP_PREFIX
from tests.gguf_files import smollm2_path
from tests.stores import VOCAB, VOCABULARY, manifest, records, small_store
from tests.tiny import tiny_tokenizer

LENGTHS = (7, 2, 30, 12, 20, 5, 9)


def student_of(*ids: int) -> Vocabulary:
    """A student that has some of the teacher's tokens, and letters to spell others with."""
    tokens = (b"<", b">", b"1", b"2", *(VOCABULARY.tokens[i] for i in ids))
    return Vocabulary(tokens, frozenset(i + 4 for i, n in enumerate(ids) if n in VOCABULARY.special_ids), None, None)


@pytest.mark.parametrize("select", ["threshold:4", "top-k:5", "random:8"])
def test_the_shares_are_those_of_plain_sums(tmp_path: Path, select: str) -> None:
    store = create_store(tmp_path / "s.zarr", manifest(select), VOCABULARY)
    with store.writer("build") as writer:
        writer.append(records(list(LENGTHS), recipe=store.manifest.recipe))
        writer.commit(list(writer.pending))
    student = student_of(*range(0, 300, 2))
    found = coverage(store, student, quiet=True)

    known, missed = map_vocabularies(VOCABULARY, student).student_ids, Counter[int]()
    shares: list[list[float]] = []
    for number in range(len(store)):
        _, targets = store.document(number)
        shares.append([])
        for ids, weights in zip(targets.ids.tolist(), targets.weights.tolist(), strict=True):
            mapped = sum(w for i, w in zip(ids, weights, strict=True) if known[i] >= 0)
            shares[-1].append(mapped / sum(weights))
            missed.update({i: w for i, w in zip(ids, weights, strict=True) if known[i] < 0 and w})
    every = [share for some in shares for share in some]
    assert found.mean == pytest.approx(np.mean(every)) and found.positions == len(every) == store.positions
    assert found.p10 == pytest.approx(sorted(every)[-(-len(every) // 10) - 1], abs=1e-3)
    means = sorted((float(np.mean(some)), number) for number, some in enumerate(shares))[:5]
    assert [(each.number, pytest.approx(each.share)) for each in found.worst] == [(n, mean) for mean, n in means]
    total = sum(sum(store.document(number)[1].weights.sum(axis=1).tolist()) for number in range(len(store)))
    heaviest = sorted(missed.items(), key=lambda each: (-each[1], each[0]))[:HEAVIEST]
    assert [each.token_id for each in found.heaviest] == [i for i, _ in heaviest]
    assert [each.share for each in found.heaviest] == pytest.approx([mass / total for _, mass in heaviest])


def test_what_is_counted(tmp_path: Path) -> None:
    found = coverage(small_store(tmp_path / "s.zarr"), student_of(1, 5, 7), quiet=True)
    assert (found.teacher_tokens, found.student_tokens, found.by_bytes, found.by_role) == (300, 7, 2, 1)
    assert found.spelled == len([i for i in range(2, 300) if set(str(i)) <= {"1", "2"}])
    assert {each.text for each in found.heaviest} <= {token.decode() for token in VOCABULARY.tokens}


def test_equal_tokenizers_map_wholly(tmp_path: Path) -> None:
    found = coverage(small_store(tmp_path / "s.zarr"), VOCABULARY, quiet=True)
    assert (found.mean, found.p10, found.heaviest, found.spelled) == (1, 1, (), 0)
    assert found.by_bytes + found.by_role == found.teacher_tokens == found.student_tokens


def test_an_empty_store_and_a_padded_head(tmp_path: Path) -> None:
    empty = coverage(create_store(tmp_path / "e.zarr", manifest(), VOCABULARY), student_of(5), quiet=True)
    assert (empty.mean, empty.p10, empty.worst, empty.positions) == (None, None, (), 0) and "none" in empty.to_text("e")
    wide: Manifest = manifest(vocab_size=VOCAB + 40)
    store = create_store(tmp_path / "w.zarr", wide, VOCABULARY)
    with store.writer("build") as writer:
        writer.append(records([400], recipe=wide.recipe))
        writer.commit(list(writer.pending))
    found = coverage(store, VOCABULARY, quiet=True)
    assert found.mean is not None and 0.8 < found.mean < 0.95  # guessed logits: 40 of 340 ids have no token
    assert {each.text for each in found.heaviest} == {None} and "no token" in found.to_text("w")


def test_the_command_prints_both_ways_and_keeps_the_map(tmp_path: Path) -> None:
    small_store(tmp_path / "s.zarr")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([VOCABULARY.text(i) for i in range(100, 200)])
    tokenizer.save_pretrained(tmp_path / "student")
    fingerprint = vocabulary_of(tokenizer).fingerprint()
    arguments = ["vocab-map", str(tmp_path / "s.zarr"), "--student", str(tmp_path / "student")]
    first = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    said = json.loads(first.output)
    assert said["computed"] and not said["not_kept"] and said["by_bytes"] == 100 and said["student"] == fingerprint
    assert (tmp_path / "s.zarr" / f"{MAP_PREFIX}{fingerprint}").is_dir()
    text = CliRunner().invoke(main, arguments, catch_exceptions=False).output
    assert "101 tokens (33.7 %): 100 by bytes, 1 by role" in text and "map         read, kept in" in text
    assert f"{said['mean']:.1%} of it maps" in text and repr(said["worst"][0]["begins"]) in text
    convert(tmp_path / "s.zarr", tmp_path / "s.lmdb", quiet=True)
    arguments[1] = str(tmp_path / "s.lmdb")
    assert "kept nowhere: " in CliRunner().invoke(main, arguments, catch_exceptions=False).output


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_neither_weights_nor_mlx_are_loaded(tmp_path: Path, kind: str) -> None:
    small_store(tmp_path / "s.zarr")
    student = smollm2_path() if kind == "GGUF" else tmp_path / "student"
    if kind == "folder":
        tiny_tokenizer().save_pretrained(student)
    code = (
        "import sys; from distill_cli.logitstore import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'torch')])"
    )
    arguments = ["vocab-map", str(tmp_path / "s.zarr"), "--student", str(student)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""  # transformers would say that PyTorch is missing


def test_what_is_said_is_json(tmp_path: Path) -> None:
    found: Coverage = coverage(open_store(small_store(tmp_path / "s.zarr").path), student_of(2, 3), quiet=True)
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["worst"][0].keys() == {"number", "share", "begins"} and len(again["heaviest"]) == HEAVIEST
