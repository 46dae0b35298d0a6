"""A build loses nothing, repeats nothing, and ends the same however often it was stopped."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import pytest

import logitstore.plan
from logitstore.build import BuildConfig, build
from logitstore.dry_run import estimate
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError, StoreFormatError, StoreWriteError
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.verify import verify
from tests.stores import contents
from tests.tiny import CORPUS, save_tiny_model

ROOT = Path(__file__).parent.parent
SHARD_POSITIONS = 150


def write_dataset(path: Path, documents: int, first: int = 0) -> Path:
    """Documents of about 15 to 60 tokens, all different."""
    texts = (f"{i} {CORPUS[i % 5]}" + " again" * (i % 7) for i in range(first, first + documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", layers=2)


@pytest.fixture
def config(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> BuildConfig:
    monkeypatch.setattr(logitstore.plan, "SHARD_POSITIONS", SHARD_POSITIONS)
    dataset = write_dataset(tmp_path / "train.jsonl", 16)
    return BuildConfig(str(model), str(dataset), tmp_path / "s", batch_tokens=100, quiet=True)


def hidden(folder: Path) -> list[str]:
    """What is still being written: journals, and whatever begins with a dot."""
    return sorted(path.name for path in folder.rglob(".*"))


class Stop(Exception):
    """Stands for whatever ends a build early."""


def stopped_after(batches: int, config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build until the teacher has answered some batches, then stop."""
    answer, left = Teacher.submit, iter(range(batches))

    def submit(*arguments: object) -> object:
        if next(left, None) is None:
            raise Stop
        return answer(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Teacher, "submit", submit)
        build(config)


def silent_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "submit", refuse)


def test_a_build_holds_every_document_of_the_dataset(config: BuildConfig) -> None:
    report = build(config)
    store = open_store(config.out)
    assert report.computed_documents == report.store_documents == len(store) == 16
    assert report.computed_positions == report.store_positions == store.positions == report.tokenized.tokens - 16
    assert store.shard_count > 2 and verify(config.out, quiet=True).problems == []
    assert report.disk_bytes == sum(map(len, contents(config.out).values()))


def test_two_builds_are_byte_identical(config: BuildConfig) -> None:
    build(config)
    build(replace(config, out=config.out.with_name("t")))
    assert contents(config.out) == contents(config.out.with_name("t"))


def test_a_finished_build_run_again_computes_nothing(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build(config)
    before = contents(config.out)
    silent_teacher(monkeypatch)
    report = build(config)
    assert (report.computed_documents, report.computed_positions, report.store_documents) == (0, 0, 16)
    assert contents(config.out) == before


def test_an_edited_dataset_computes_only_what_is_new(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    before = contents(config.out)
    write_dataset(tmp_path / "train.jsonl", 16, first=3)
    assert build(config).computed_documents == 3 and len(open_store(config.out)) == 19
    after = contents(config.out)
    derived = ("index/", "fidelity/")
    assert {name: data for name, data in before.items() if not name.startswith(derived)}.items() <= after.items()


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_a_build_that_was_stopped_goes_on_and_ends_byte_identical(
    config: BuildConfig, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(replace(config, out=config.out.with_name("whole")))
    stopped_after(batches, config, monkeypatch)
    report = build(config)
    assert report.computed_documents < 16 or batches == 0
    assert contents(config.out) == contents(config.out.with_name("whole"))


def test_a_dataset_edited_after_an_interruption_loses_nothing_that_was_answered(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, config, monkeypatch)
    write_dataset(tmp_path / "train.jsonl", 5, first=100)
    first = build(config)
    assert first.computed_documents == 5 and first.store_documents > 5
    write_dataset(tmp_path / "train.jsonl", 16)
    assert build(config).computed_documents == 16 - (first.store_documents - 5)
    assert hidden(config.out) == []


def test_equal_documents_are_stored_once(config: BuildConfig, tmp_path: Path) -> None:
    lines = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(lines * 2)
    said: list[str] = []
    assert build(config, said.append).store_documents == 16
    assert said[0].startswith("32 documents") and "16 equal to an earlier one" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": "threshold:8"}, "selection threshold:16 .* this run has threshold:8 .* --select threshold:16"),
        ({"select": "top-k:16"}, "selection threshold:16 .* this run has top-k:16 .* --select threshold:16"),
        ({"temperature": (2.0,)}, r"temperature 1\.0 .* this run has 2\.0 .* type --temperature 1\.0"),
        ({"seed": 4}, "seed 0 .* this run has 4 .* type --seed 0"),
        (
            {"teacher": "other"},
            r"teacher weights .* \(teacher tiny\), this run .* \(teacher other\); type --teacher",
        ),
    ],
)
def test_a_store_of_another_recipe_or_teacher_is_refused_and_left_alone(
    config: BuildConfig, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    build(config)
    before = contents(config.out)
    if "teacher" in change:
        change = {"teacher": str(save_tiny_model(tmp_path / "other", seed=1, layers=2))}
    with pytest.raises(IncompatibleStoreError, match=message):
        build(replace(config, **change))
    with pytest.raises(IncompatibleStoreError, match=message):
        estimate(replace(config, **change))
    assert contents(config.out) == before


def test_a_teacher_whose_config_changed_is_another_teacher(config: BuildConfig, tmp_path: Path) -> None:
    teacher = save_tiny_model(tmp_path / "tiny", layers=2)
    build(replace(config, teacher=str(teacher)))
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"_name_or_path": "x", "torch_dtype": "bfloat16"}))
    assert build(replace(config, teacher=str(teacher))).computed_documents == 0
    (teacher / "config.json").write_text(json.dumps(settings | {"rope_theta": 20_000.0}))
    with pytest.raises(IncompatibleStoreError, match="teacher config"):
        build(replace(config, teacher=str(teacher)))


@pytest.mark.parametrize("full_from", [0, 1, 4, 12, 30])
def test_a_full_disk_leaves_nothing_half_written_and_the_build_goes_on_later(
    config: BuildConfig, full_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(replace(config, out=config.out.with_name("whole")))
    sync, calls = os.fsync, iter(range(full_from))

    def full(handle: int) -> None:
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match="No space left on device; nothing that"):
        patch.setattr("os.fsync", full)
        build(config)
    if config.out.exists():
        assert verify(config.out, quiet=True).problems == []
        assert all(name.startswith(".journal-") for name in hidden(config.out))
    build(config)
    assert contents(config.out) == contents(config.out.with_name("whole"))
    assert sorted(path.name for path in config.out.parent.iterdir()) == ["s", "train.jsonl", "whole"]


@pytest.mark.parametrize("place", ["file", "file/s", "folder"])
def test_a_place_that_is_no_store_is_refused_and_left_alone(config: BuildConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    with pytest.raises((StoreFormatError, StoreWriteError)) as caught:
        build(replace(config, out=tmp_path / place))
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


def test_a_dataset_of_which_nothing_can_be_used_is_refused_before_a_store_is_begun(
    config: BuildConfig, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DatasetError, match="none with two tokens"):
        build(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    "change",
    [{"select": "best"}, {"select": "top-k:0"}, {"temperature": (0.0,)}, {"temperature": (float("inf"),)}]
    + [{"shard": shard} for shard in ("0/2", "3/2", "1", "a/b")]
    + [{"batch_tokens": 0}, {"max_seq_length": 1}, {"limit": 0}, {"seed": -1}, {"seed": 1 << 64}],
)
def test_a_flag_that_cannot_be_is_refused_at_once(config: BuildConfig, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="; type "):
        replace(config, **change)


def test_a_dry_run_writes_nothing_and_estimates_what_a_build_then_is(config: BuildConfig) -> None:
    cost = estimate(config)
    assert not config.out.exists()
    report = build(config)
    assert (cost.documents, cost.positions) == (report.computed_documents, report.computed_positions)
    assert cost.disk_bytes == pytest.approx(report.disk_bytes, rel=0.15) and cost.elapsed_s > 0
    assert estimate(config).documents == 0


def test_a_dry_run_of_a_part_takes_no_other_parts_documents_for_equal_ones(config: BuildConfig) -> None:
    said: list[str] = []
    cost = estimate(replace(config, shard="1/2"), said.append)
    assert 0 < cost.documents < 16
    assert said[0].startswith("16 documents") and "equal" not in said[0]


def test_a_dry_run_says_what_there_is_before_the_teacher_reads(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Teacher, "records")
    said: list[str] = []
    with pytest.raises(AttributeError, match="records"):
        estimate(config, said.append)
    assert [line.partition(",")[0] for line in said] == ["16 documents", "to do: 16 documents"]


@pytest.mark.parametrize("run", [build, estimate])
def test_a_dataset_that_is_not_there_is_told_before_the_teacher_loads(
    config: BuildConfig, run: Callable[[BuildConfig], object]
) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        run(replace(config, dataset="/none.jsonl", teacher="/none"))


def test_a_dataset_that_is_malformed_is_told_before_the_weights_are_hashed(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Teacher, "manifest")
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"txt": "a"}\n')
    with pytest.raises(DatasetError, match=r"train.jsonl:2"):
        build(config)


def decoded(path: Path) -> dict[bytes, tuple[bytes, ...]]:
    """Every document's ids and targets, by its tokens."""
    store = open_store(path)
    documents = [store.document(number) for number in range(len(store))]
    return {
        ids.tobytes(): tuple(a.tobytes() for name in type(t).__annotations__ if (a := getattr(t, name)) is not None)
        for ids, t in documents
    }


DRIVER = """
import os, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
import distill_kernels
import logitstore.plan
from logitstore.build import BuildConfig, build
import mlx_lm.models.llama, transformers, zarr, numpy

logitstore.plan.SHARD_POSITIONS = 150
model, dataset, folder, seed = sys.argv[1:]
config = BuildConfig(model, dataset, Path(folder) / "whole", batch_tokens=100, quiet=True)

def start(config):
    child = os.fork()  # nothing of MLX has run yet
    if child == 0:
        try:
            build(config)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return child

def finish(*children):
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""

KILL = """
begin = time.perf_counter()
finish(start(config))
duration = time.perf_counter() - begin
random = numpy.random.default_rng(int(seed)).random(20)
for trial, moment in enumerate((numpy.arange(20) + random) / 20 * duration):  # one in each twentieth of a build
    out, killed = Path(folder) / str(trial), False
    while not killed:
        shutil.rmtree(out, ignore_errors=True)
        child = start(replace(config, out=out))
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        moment *= 0.9  # it had finished: this build was faster than the measured one
    left = [p.name for p in Path(folder).rglob("*") if p.name.startswith(".")]
    print(f"killed after {moment / 0.9:.3f} of {duration:.3f} s, left {left}", flush=True)
    finish(start(replace(config, out=out)))
"""

PARTS = """
config = replace(config, batch_tokens=1)  # every document its own batch: no rounding of another shape
finish(start(config))
out = Path(folder) / "parts"
finish(*(start(replace(config, out=out, shard=f"{i}/2")) for i in (1, 2)))
"""


def drive(code: str, model: Path, dataset: Path, folder: Path) -> str:
    folder.mkdir()
    command = [sys.executable, "-c", DRIVER + code, *map(str, (model, dataset, folder, 7))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kill_9_at_20_random_moments_then_resumed_ends_byte_identical(tmp_path: Path, model: Path) -> None:
    log = drive(KILL, model, write_dataset(tmp_path / "train.jsonl", 32), tmp_path / "stores")
    whole = contents(tmp_path / "stores" / "whole")
    assert len(whole) > 60 and log.count("killed") == 20
    for trial in range(20):
        assert contents(tmp_path / "stores" / str(trial)) == whole, (trial, log)
    assert len(list((tmp_path / "stores").iterdir())) == 21


def test_two_parts_built_at_the_same_time_are_one_build(tmp_path: Path, model: Path) -> None:
    drive(PARTS, model, write_dataset(tmp_path / "train.jsonl", 24), tmp_path / "stores")
    parts, whole = decoded(tmp_path / "stores" / "parts"), decoded(tmp_path / "stores" / "whole")
    assert len(whole) == 24 and parts == whole
    assert verify(tmp_path / "stores" / "parts", quiet=True).problems == []
    assert hidden(tmp_path / "stores") == []
