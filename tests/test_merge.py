"""Stores of one teacher become one: each document once, and where they disagree nothing is written."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from logitstore import plan
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.journal import ShardWriter
from logitstore.manifest import Manifest
from logitstore.merge import merge
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.store import create_store, open_store
from logitstore.verify import verify
from tests.kills import drive
from tests.stores import VOCABULARY, contents, guessed, manifest, records, tokens
from tests.test_convert import held


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_POSITIONS", 100)


def store_of(path: Path, documents: list[DocumentRecord], made: Manifest | None = None) -> Path:
    store = create_store(path, made or manifest(), VOCABULARY)
    with store.writer("build") as writer:
        writer.append(documents)
        writer.commit(list(writer.pending))
    return path


@pytest.mark.parametrize("suffix", ["zarr", "zip", "lmdb"])
def test_every_document_is_there_once_and_equal_ones_are_no_conflict(tmp_path: Path, suffix: str) -> None:
    made = manifest(temperatures=(1.0, 2.0), replicas=2)
    all_of_them = records([60, 40, 7, 30, 90, 2], recipe=made.recipe)
    one = store_of(tmp_path / "one.zarr", all_of_them[:4], made)
    two = store_of(tmp_path / "two.lmdb", all_of_them[2:], made)
    out = tmp_path / f"out.{suffix}"
    report = merge([one, two, one], out, quiet=True)
    assert (report.documents, report.given, report.positions) == (6, 12, sum(len(d.records) for d in all_of_them))
    assert held(out) == {d.key: d.token_ids.tobytes() + d.records.tobytes() for d in all_of_them}
    assert verify(out, quiet=True).problems == []
    before = out.read_bytes() if out.is_file() else contents(out)
    assert merge([one, two], out, quiet=True).documents == 6
    assert (out.read_bytes() if out.is_file() else contents(out)) == before


def conflicting(recipe: Recipe, seeds: list[int], lengths: int = 20) -> list[DocumentRecord]:
    """Documents with the tokens of these seeds, and other targets each time."""
    rng = np.random.default_rng()
    return [guessed(tokens(seed, lengths), recipe, rng) for seed in seeds]


def refused(folder: Path, out: str, sources: list[Path], kind: type[Exception], says: str) -> None:
    before = contents(folder)
    with pytest.raises(kind, match=says) as raised:
        merge(sources, folder / out, quiet=True)
    assert "\n" not in str(raised.value)
    assert {name: data for name, data in contents(folder).items() if not name.endswith("-lock")} == before


def test_other_targets_for_one_document_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    recipe = manifest().recipe
    shared = conflicting(recipe, [1, 2])
    one = store_of(tmp_path / "one.zarr", [*shared, *conflicting(recipe, [3, 4])])
    two = store_of(tmp_path / "two.zarr", [*conflicting(recipe, [9]), *shared, *conflicting(recipe, [3])])
    named = r"^document 3 of \S+two.zarr has other targets in \S+one.zarr; nothing was written"
    refused(tmp_path, "out.zarr", [one, two], IncompatibleStoreError, named)
    store_of(tmp_path / "out.zarr", two_of := conflicting(recipe, [9]))
    refused(
        tmp_path, "out.zarr", [one, two], IncompatibleStoreError, r"document 0 of \S+two.zarr has .* in \S+out.zarr"
    )
    assert len(open_store(tmp_path / "out.zarr")) == len(two_of)


def test_of_many_conflicts_a_few_are_named_and_the_others_counted(tmp_path: Path) -> None:
    recipe, seeds = manifest().recipe, list(range(20))
    one, two = (store_of(tmp_path / f"{name}.zarr", conflicting(recipe, seeds)) for name in ("one", "two"))
    says = r"^document 0 of .*; document 1 of .*; document 2 of .* in \S+, and 17 more; nothing was written"
    refused(tmp_path, "out.zip", [one, two], IncompatibleStoreError, says)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: manifest(weights_digest="b" * 32),
            "one.zarr was built with teacher weights a{32}, .*two.zarr with b{32}",
        ),
        (lambda: manifest("threshold:5"), "selection threshold:4, .*two.zarr with threshold:5"),
        (lambda: manifest(seed=3), "seed 0, .* with 3"),
    ],
)
def test_stores_of_another_teacher_or_recipe_are_refused(
    tmp_path: Path, other: Callable[[], Manifest], says: str
) -> None:
    made = other()
    one = store_of(tmp_path / "one.zarr", records([9]))
    two = store_of(tmp_path / "two.zarr", records([8], recipe=made.recipe), made)
    refused(tmp_path, "out.zarr", [one, two], IncompatibleStoreError, says)
    refused(tmp_path, "one.zarr", [two], IncompatibleStoreError, "one.zarr was built with")
    refused(tmp_path, "one.zarr", [one], ConfigError, "to be read and to be written")


def test_what_was_measured_of_a_store_that_holds_all_of_them_is_kept(tmp_path: Path) -> None:
    documents = records([20, 30, 9])
    one, two = store_of(tmp_path / "one.zarr", documents[:1]), store_of(tmp_path / "two.zarr", documents)
    for path, count in ((one, 1), (two, 3)):
        open_store(path).save_fidelity({"documents": count})
    merge([one, two], tmp_path / "out.zarr", quiet=True)
    assert open_store(tmp_path / "out.zarr").fidelity == {"documents": 3}


KILLS = """
from logitstore.merge import merge
from logitstore.store import create_store
from tests.stores import VOCABULARY, manifest, records

every = records([60, 40, 30, 90, 20, 50, 70, 8])
for name, part in (("one", every[:5]), ("two", every[3:])):
    create_store(folder / f"{name}.zarr", manifest(), VOCABULARY).write_documents(part)

def act(trial):
    merge([folder / "one.zarr", folder / "two.zarr"], trial / "out.zarr", quiet=True)

run_killed(lambda trial: trial.mkdir(), act, contents)
"""


def test_killed_at_20_random_moments_and_typed_again_it_ends_with_the_same_bytes() -> None:
    drive(KILLS)


@pytest.mark.parametrize("suffix", ["zarr", "zip"])
def test_what_a_stopped_command_had_kept_of_other_stores_is_never_taken_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    recipe, out = manifest().recipe, tmp_path / f"out.{suffix}"
    one, two = (
        store_of(tmp_path / f"{name}.zarr", conflicting(recipe, [1, seed])) for name, seed in (("a", 2), ("b", 3))
    )
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ShardWriter, "commit", Mock(side_effect=KeyboardInterrupt))
        merge([one], out, quiet=True)
    if suffix == "zip":  # what is there is no store yet, and begun anew
        merge([two], out, quiet=True)
        assert held(out) == held(two)
    else:
        says = r"^document 0 of \S+b.zarr has other targets in \S+out.zarr, kept there by a command that was stopped;"
        refused(tmp_path, out.name, [two], IncompatibleStoreError, says)
        merge([one], out, quiet=True)
        assert held(out) == held(one)
