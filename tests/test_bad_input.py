"""Every foreseeable mistake, through the real commands: exit code 2, one line on stderr, nothing made or changed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from distill_cli import distill_train, logitstore
from distill_trainer.targets import TargetSource
from logitstore.errors import CorruptStoreError
from logitstore.merge import convert
from logitstore.sealed import seal_group, unseal_group
from logitstore.verify import verify
from tests.runs import World, make_world, write_jsonl
from tests.tiny import save_tiny_model, tiny_tokenizer


def run(line: str) -> Result:
    """Run `logitstore ...` or `distill-train ...` in this process."""
    command, *args = shlex.split(line)
    return CliRunner().invoke({"logitstore": logitstore.main, "distill-train": distill_train.main}[command], args)


def error_of(result: Result) -> str:
    """The one line of a command that refused, after checking that it is one."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.output
    return line


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder, and when it was last changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sound world, and beside it one of everything that can be wrong."""
    world = make_world(tmp_path_factory.mktemp("world"))
    folder = world.folder
    (folder / "empty.jsonl").touch()
    (folder / "typo.yaml").write_text("itres: 5\n")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut sho\n')
    write_jsonl(folder / "fields.jsonl", [{"txt": "a"}])
    write_jsonl(folder / "short.jsonl", [{"text": ""}])
    (folder / "bare").mkdir()
    shutil.copytree(world.teacher, folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    mx.save_gguf(str(folder / "cut.gguf"), {"output_norm.weight": mx.zeros((4096,))}, {"general.architecture": "llama"})
    (folder / "cut.gguf").write_bytes((folder / "cut.gguf").read_bytes()[:2000])
    (folder / "noise.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    shutil.copytree(world.teacher, folder / "foreign")  # the same weights, other tokens
    save_tiny_model(folder / "narrow", vocab_size=270)  # fewer tokens than its tokenizer
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    tokenizer.save_pretrained(folder / "foreign")
    shutil.copytree(world.store, folder / "newer.zarr")
    root = folder / "newer.zarr" / "zarr.json"
    attributes = unseal_group(root.read_bytes(), root)
    attributes["logitstore"]["format_version"] = 99
    root.write_bytes(seal_group(attributes))
    world.build(folder / "warm.zarr", temperature=(2.0,))
    for suffix in ("zip", "lmdb"):
        convert(world.store, folder / f"small.{suffix}", quiet=True)
    return world


def filled(line: str, world: World, new: Path) -> str:
    """A command line with its paths."""
    names = ("folder", "data", "teacher", "student", "store")
    return line.format(new=new, **{name: getattr(world, name) for name in names})


BUILD = "logitstore build --quiet --teacher {teacher} --dataset {data} --out {new}.zarr"
ONTO = "logitstore build --quiet --teacher {teacher} --dataset {data} --out {store}"
TRAIN = "distill-train --quiet --student {student} --dataset {data} --store {store} --out {new}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # datasets
        (BUILD[: -len("zarr")] + "zip", r"zip is to be a zip file, which .* added to; type --out .*.zarr, and then"),
        (BUILD + " --dataset {folder}/none.jsonl", r"none.jsonl does not exist; expected a .jsonl"),
        (BUILD + " --dataset {folder}/empty.jsonl", r"no rows; expected at least one of"),
        (
            BUILD + " --dataset {folder}/broken.jsonl",
            r"broken.jsonl:3: not valid JSON .*; expected one object per line",
        ),
        (BUILD + " --dataset {folder}/fields.jsonl", r"fields.jsonl:1: found the fields txt; expected"),
        (BUILD + " --dataset {folder}/short.jsonl", r"none with two tokens and a trained position; type --dataset"),
        (TRAIN + " --dataset {folder}/none.jsonl", r"none.jsonl does not exist; expected a .jsonl"),
        (TRAIN + " --dataset {folder}/empty.jsonl", r"no rows; expected at least one of"),
        (TRAIN + " --dataset {folder}/broken.jsonl", r"broken.jsonl:3: not valid JSON"),
        (TRAIN + " --dataset {folder}/broken.jsonl --keep-layers 2", r"broken.jsonl:3: not valid JSON"),
        (TRAIN + " --dataset {folder}/fields.jsonl", r"fields.jsonl:1: found the fields txt; expected"),
        (TRAIN + " --dataset {folder}/short.jsonl", r"none with two tokens .* type --dataset"),
        (TRAIN + " --split valid", r"has no split 'valid'; give a folder"),
        (TRAIN + " --valid-split valid", r"has no split 'valid'; give a folder"),
        (TRAIN + " --filter nl<2", r"--filter 'nl<2' names no measure; did you mean nll"),
        (TRAIN + " --filter nll<0", r"of 6 documents none is left to train on; type --filter"),
        (TRAIN + " --mix txt:a=1", r"has no column 'txt', .* did you mean 'text'"),
        # models
        (BUILD + " --teacher {folder}/none", r"no model at .*; expected a directory"),
        (BUILD + " --teacher {folder}/bare", r"bare has no config.json; expected a model saved by mlx-lm"),
        (BUILD + " --teacher {folder}/cut", r"cut/model.safetensors cannot be read .*; download it again"),
        (BUILD + " --teacher {data}", r"data.jsonl is neither a directory nor a .gguf file; type"),
        (BUILD + " --adapter-path {folder}/bare", r"bare has no adapter_config.json; expected"),
        (TRAIN + " --student {folder}/none", r"no model at .*; expected a directory"),
        (TRAIN + " --student {folder}/cut", r"cut/model.safetensors cannot be read .*; download it again"),
        (TRAIN + " --teacher {folder}/bare", r"bare has no config.json"),
        (
            "distill-train --student {student} --teacher {folder}/bare --dataset {data} --out {new}",
            r"--teacher .*bare does not load: it has no tokenizer.json; type a folder with tokenizer.json",
        ),
        (TRAIN + " --keep-layers 9", r"has 4 layers, --keep-layers asks for 9; type --keep-layers with at most 4"),
        (BUILD + " --teacher {folder}/narrow", r"holds token \d+, but teacher narrow knows 270 tokens; its tokenizer"),
        (TRAIN + " --student {folder}/narrow", r"holds token \d+, but student narrow knows 270 tokens; its tokenizer"),
        (BUILD + " --teacher {folder}/narrow --dry-run", r"holds token \d+, but teacher narrow knows 270 tokens"),
        (
            "distill-train --student {student} --teacher {folder}/narrow --dataset {data} --out {new}",
            r"holds token \d+, but the teacher knows 270 tokens",
        ),
        (
            TRAIN + " --teacher {teacher} --on-miss error",
            r"--teacher is never asked with --on-miss error; leave it out",
        ),
        # places
        (TRAIN + " --out {store}/run", r"store.zarr/run lies inside .*, which is a store; type --out"),
        (BUILD + " --out {store}/shards/x.zarr", r"x.zarr lies inside .*, which is a store; type --out"),
        ("logitstore info " + 300 * "x", r"x cannot be used: File name too long; type another path"),
        # stores
        ("logitstore info {folder}/none.zarr", r"there is no store at .*; type `logitstore build"),
        ("logitstore info {data}", r"data.jsonl is a file, a store is a folder"),
        ("logitstore verify {folder}/bare", r"bare is not a store.*; type"),
        ("logitstore inspect {folder}/newer.zarr", r"has format 99, .* reads format 1; type `pip install --upgrade"),
        ("logitstore query {store} --sort nl", r"--sort nl names no measure; did you mean nll"),
        ("logitstore vocab-map {store} --student {folder}/none", r"--student .*none does not load: .*; type a folder"),
        ("logitstore vocab-map {store} --student {data}", r"data.jsonl cannot be read as GGUF: it starts with"),
        ("logitstore vocab-map {folder}/none.zarr --student {student}", r"there is no store at"),
        ("logitstore inspect {store} --document 99", r"document 99 is not there: .* holds 0 .. 5; type --document"),
        (BUILD + " --out {data}", r"data.jsonl is a file, a store is a folder"),
        (BUILD + " --out {folder}/bare", r"bare is not a store.*; type"),
        (BUILD + " --out {folder}/newer.zarr", r"has format 99"),
        (BUILD + " --out {data}/below.zarr", r"below.zarr.* cannot be written: (File exists|Not a directory)"),
        (ONTO + " --teacher {student}", r"built with teacher weights .*, this run has .*; type --teacher"),
        (ONTO + " --teacher {folder}/foreign", r"built with tokenizer .*, this run has .*; type --teacher"),
        (ONTO + " --select top-k:4", r"built with selection threshold:16.*, this run has top-k:4.*; type --select"),
        (ONTO + " --temperature 2", r"built with temperature 1.*, this run has 2.*; type --temperature 1"),
        (TRAIN + " --store {folder}/none.zarr", r"there is no store at"),
        (TRAIN + " --store {data}", r"data.jsonl is a file, a store is a folder"),
        (TRAIN + " --store {folder}/newer.zarr", r"has format 99"),
        (TRAIN + " --store {folder}/warm.zarr", r"warm.zarr was built with temperature 2.*this run has 1"),
        (TRAIN + " --teacher {student}", r"built with teacher weights .*, this run has .*; type --teacher"),
        (
            TRAIN + " --temperature 2",
            r"serves temperature 1, .* asks for 2; leave .* `logitstore build --temperature 2",
        ),
        (TRAIN + " --select top-k:4", r"built with --select threshold:16, .* `logitstore build --select top-k:4`"),
        (
            TRAIN + " --student {folder}/foreign --hidden-loss mse --layer-map 0:0",
            r"has tokenizer .* student .*foreign has .*, and --hidden-loss needs the teacher's; leave it out",
        ),
        (
            TRAIN + " --max-seq-length 9",
            r"documents are not in the store \(was it built with --max-seq-length 9 too.*; type --teacher T",
        ),
        # moving stores
        ("logitstore convert {folder}/none.zarr {new}.zip", r"there is no store at .*; type `logitstore build"),
        (
            "logitstore convert {store} {new}.tar",
            r"does not tell what to make; type a path that ends in .zarr, .zip, .lmdb",
        ),
        ("logitstore convert {store} {store}", r"is to be read and to be written; type another path"),
        ("logitstore convert {store} {store}/x.zip", r"lies inside .*, which is a store; type"),
        ("logitstore convert {store} {folder}/warm.zarr", r"warm.zarr was built with temperature 2"),
        ("logitstore convert {store} {data}/below.zip", r"below.zip cannot be written: (File exists|Not a directory)"),
        ("logitstore convert {folder}/newer.zarr {new}.zarr", r"has format 99"),
        ("logitstore merge {store} {folder}/warm.zarr {new}.zarr", r"with temperature 1.0, .*warm.zarr with 2.0; only"),
        ("logitstore merge {store} {folder}/bare {new}.zarr", r"bare is not a store"),
        ("logitstore gc {folder}/bare", r"bare is not a store"),
        ("logitstore export {store} {new}.csv", r"type a path that ends in .parquet"),
        ("logitstore export {store} {new}.parquet --temperature 3", r"serves temperature 1, .* asks for 3"),
        ("logitstore export {store} {data}/below.parquet", r"cannot be written: (File exists|Not a directory)"),
        ("logitstore stats {folder}/none.zarr", r"there is no store at"),
        ("logitstore stats {store} --html {store}/page.html", r"lies inside .*, which is a store; type"),
        ("logitstore stats {store} --html {folder}/small.zip", r"small.zip is a store .* type --html page.html"),
        ("logitstore stats {store} --html {folder}/small.lmdb", r"small.lmdb is a store .* type --html page.html"),
        ("logitstore stats {store} --html {data}/below.html", r"cannot be written: (File exists|Not a directory)"),
        ("logitstore verify {store} --live 3", r"--live asks the teacher again; type --teacher T"),
        ("logitstore verify {store} --teacher {teacher}", r"nothing to do; type --live N, or --repair"),
        ("logitstore verify {store} --adapter-path A", r"is the teacher's; type --teacher T with it"),
        ("logitstore gc {store} --overlay-gb 5", r"how much of the overlay may stay; type --overlay with it"),
        ("logitstore verify {store} --repair --dataset {data}", r"type --repair --teacher T with it"),
        ("logitstore verify {store} --live 3 --teacher {student}", r"built with teacher weights .*, this run has"),
        ("logitstore verify {store} --repair --teacher {student}", r"built with teacher weights .*, this run has"),
        ("logitstore verify {store} --repair --teacher {folder}/none", r"no model at .*; expected a directory"),
        ("logitstore verify {folder}/none.zarr --repair --teacher {teacher}", r"there is no store at"),
        ("logitstore verify {data} --repair", r"is no folder, and only folders can be repaired"),
        (
            "logitstore import {data} --format best --out {new}.zarr --teacher T --tokenizer {teacher}",
            r"format 'best' is not known; type one of: distillkit",
        ),
        # numbers
        (BUILD + " --select threshold:0", r"keeps 0 entries; type"),
        (
            BUILD + " --select top-k:385",
            r"keeps 385 entries, but the teacher's vocabulary has 384 tokens; type --select",
        ),
        (BUILD + " --select best:3", r"'best:3' is not known; type --select threshold:16"),
        (BUILD + " --temperature 0", r"temperature 0 is not .*above 0; type --temperature 1"),
        (BUILD + " --temperature nan", r"temperature nan is not .*above 0; type --temperature 1"),
        (BUILD + " --max-seq-length 1", r"is 1, expected at least 2"),
        (BUILD + " --batch-tokens 0", r"batch_tokens is 0, expected at least 1; type --batch-tokens"),
        (BUILD + " --limit 0", r"limit is 0, expected at least 1"),
        (BUILD + " --shard 3/2", r"shard '3/2' is not I/N .*; type --shard 1/2"),
        (TRAIN + " --alpha 1.5", r"alpha is 1.5, expected 0 to 1; type --alpha 0.9"),
        (TRAIN + " --alpha nan", r"alpha is nan, expected 0 to 1; type --alpha 0.9"),
        (TRAIN + " --alpha '0.9->2'", r"alpha is 0.9->2, expected 0 to 1; type --alpha 0.9"),
        (
            TRAIN + " --alpha '0.9->0:step'",
            r"alpha is '0.9->0:step', expected a number .*, in quotes .*; type --alpha 0.9",
        ),
        (TRAIN + " --max-grad-norm 0", r"max_grad_norm is 0.0, expected a number above 0; type --max-grad-norm 1"),
        (TRAIN + " --grad-accumulation-steps 0", r"is 0, expected at least 1; type --grad-accumulation-steps 1"),
        (TRAIN + " --save-every 0", r"save_every is 0, expected at least 1; type --save-every 100"),
        (TRAIN + " --temperature -1", r"temperature is -1.0, expected a number above 0; type --temperature 1"),
        (TRAIN + " --learning-rate nan", r"learning_rate is nan, expected a number above 0; type --learning-rate"),
        (TRAIN + " --batch-size 0", r"batch_size is 0, expected at least 1; type --batch-size"),
        # what does not go together
        (TRAIN + " --on-miss online", r"--on-miss online needs a teacher to ask; type --teacher T"),
        (TRAIN + " --write-back", r"--write-back keeps a teacher's answers in a store; type"),
        (TRAIN + " --out {teacher}", r"teacher holds something already; type --out with a new folder"),
        (TRAIN + " --out {data}", r"data.jsonl holds something already; type --out with a new folder"),
        (TRAIN + " --resume", r"new holds no run to go on with; type --out with a run's folder, or leave --resume out"),
        (TRAIN + " --out {data} --resume", r"data.jsonl holds no run to go on with; type --out with a run's folder"),
        (TRAIN + " --out {data}/below", r"below cannot be written: Not a directory; .* --out"),
        (TRAIN + " --config {folder}/typo.yaml", r"has the key 'itres', which is not known; did you mean 'iters'"),
        (TRAIN + " --config {folder}/none.yaml", r"config .*none.yaml cannot be read: .*; expected YAML"),
        (
            "distill-train --student {student} --dataset {data} --out {new}",
            r"nothing to distil from; type --store STORE, --teacher T, or --alpha 0",
        ),
        (
            "distill-train --student {student} --teacher {folder}/foreign --on-policy 1 --dataset {data} --out {new}",
            r"has tokenizer .*, student .* has .*, and --on-policy needs the teacher's; leave it out",
        ),
        (
            "distill-train --student {student} --teacher {teacher} --select top-k:999 --dataset {data} --out {new}",
            r"keeps 999 entries, but the teacher's vocabulary has 384 tokens",
        ),
        (
            "distill-train --student ~nobody-of-this-name/s --dataset {data} --alpha 0 --out {new}",
            "the name of no user",
        ),
        ("logitstore info ~nobody-of-this-name/store.zarr", "begins with ~ and the name of no user; type another path"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_made_or_changed(world: World, line: str, expected: str) -> None:
    before = tree(world.folder)
    result = run(filled(line, world, world.folder / "new"))
    assert tree(world.folder) == before
    assert re.search(expected, error_of(result)), result.stderr


@pytest.mark.parametrize("name", ["cut.gguf", "noise.gguf"])
def test_a_gguf_file_that_is_cut_short_or_none_at_all_is_told_in_one_line(world: World, name: str) -> None:
    # in a process of its own: what reads the file is C code
    done = command(["build", "--teacher", name, "--dataset", str(world.data), "--out", "new.zarr"], world.folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Error: ") == 1
    assert f"{name} cannot be read as GGUF" in done.stderr
    assert not (world.folder / "new.zarr").exists()


def command(
    args: Sequence[str], cwd: Path, before: str = "", name: str = "logitstore"
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, after some Python."""
    code = f"{before}\nfrom distill_cli.{name} import main\nmain(prog_name={name!r})"
    return subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True)


def test_a_document_that_is_too_long_is_cut_counted_and_reported(world: World, tmp_path: Path) -> None:
    built = run(
        f"logitstore build --teacher {world.teacher} --dataset {world.data} --out {tmp_path}/s --max-seq-length 9"
    )
    assert built.exit_code == 0
    assert "6 cut at --max-seq-length (127 tokens dropped)" in built.stdout
    trained = run(
        f"distill-train --student {world.student} --dataset {world.data} --store {tmp_path}/s --max-seq-length 9 "
        f"--iters 1 --out {tmp_path}/o"
    )
    assert trained.exit_code == 0, trained.output
    assert "6 cut at --max-seq-length (127 tokens dropped)" in trained.stdout


def test_a_full_disk_ends_a_build_in_one_line_and_the_same_command_finishes_it(world: World, tmp_path: Path) -> None:
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    args = ["build", "--quiet", "--teacher", str(world.teacher), "--dataset", str(world.data), "--out", "s.zarr"]
    full = command([*args, "--batch-tokens", "40"], tmp_path, small)
    assert (full.returncode, full.stderr.count("Error: ")) == (2, 1), full.stderr
    assert "cannot be written: File too large" in full.stderr
    assert not verify(tmp_path / "s.zarr", quiet=True).problems
    assert command([*args, "--batch-tokens", "40"], tmp_path).returncode == 0
    assert verify(tmp_path / "s.zarr", quiet=True).documents == 6


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_full_disk_ends_training_in_one_line(world: World, tmp_path: Path, kind: str) -> None:
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    line = f"--quiet --student {world.student} --dataset {world.data} --store {world.store} --iters 1 --out o"
    full = command([*shlex.split(line), "--fine-tune-type", kind], tmp_path, small, "distill_train")
    assert (full.returncode, full.stderr.count("Error: ")) == (2, 1), full.stderr
    assert "o cannot be written: [write] Unable to write" in full.stderr
    assert not any("safetensors" in path for path in tree(tmp_path / "o"))


def test_a_disk_without_room_for_the_result_is_told_before_the_first_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused = error_of(run(filled(TRAIN, world, tmp_path / "o")))
    assert re.search(r"o cannot be written: .* bytes are free, the result takes [\d,]+", refused)
    assert not (tmp_path / "o").exists()


def test_an_error_that_is_not_of_writing_is_not_told_as_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise ConnectionResetError("the network")

    monkeypatch.setattr(TargetSource, "answer", failing)
    assert isinstance(run(filled(TRAIN, world, tmp_path / "o")).exception, ConnectionResetError)
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_told_in_one_line(world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        build = run(filled(BUILD, world, tmp_path / "s"))
        train = run(filled(TRAIN, world, tmp_path / "o"))
    finally:
        tmp_path.chmod(0o700)
    assert "cannot be written: Permission denied" in error_of(build)
    assert "cannot be written: Permission denied" in error_of(train)


def test_a_store_that_is_damaged_is_refused_and_verify_names_the_file(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.store, tmp_path / "s.zarr")
    (entries,) = (tmp_path / "s.zarr" / "shards").glob("*/entries-0/c/0/0")
    data = bytearray(entries.read_bytes())
    data[len(data) // 2] ^= 1
    entries.write_bytes(data)
    train = run(filled(TRAIN, world, tmp_path / "o").replace(str(world.store), f"{tmp_path}/s.zarr"))
    assert "entries-0" in error_of(train)
    assert not (tmp_path / "o").exists()
    report = run(f"logitstore verify --json {tmp_path}/s.zarr")
    assert report.exit_code == 1
    assert [p["file"] for p in json.loads(report.stdout)["problems"]] == [str(entries.relative_to(tmp_path / "s.zarr"))]


def test_a_store_that_fails_in_the_middle_loses_nothing_of_what_was_learned(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, calls = TargetSource.answer, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise CorruptStoreError("a shard was damaged while it was read")
        return answer(*args)

    monkeypatch.setattr(TargetSource, "answer", failing)
    refused = error_of(run(filled(TRAIN, world, tmp_path / "o")))
    assert refused.endswith(
        f"a shard was damaged while it was read; what was learned in 2 steps is saved in {tmp_path}/o"
    )
    assert (tmp_path / "o" / "adapters.safetensors").exists()


def test_a_student_with_padding_ids_is_as_good_as_one_without(world: World, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "wide", vocab_size=416)
    line = f"distill-train --quiet --dataset {world.data} --store {world.store} --iters 1 --student {tmp_path}/wide"
    assert run(f"{line} --out {tmp_path}/o").exit_code == 0
