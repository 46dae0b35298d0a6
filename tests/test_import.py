"""Another tool's cache as a store: its numbers within a code's error, and what it does not know marked as unknown."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from distill_cli.logitstore import main
from logitstore.errors import IncompatibleStoreError
from logitstore.foreign import open_foreign
from logitstore.import_cache import ImportConfig, import_cache
from logitstore.journal import ShardWriter
from logitstore.manifest import Manifest
from logitstore.store import open_store
from logitstore.verify import verify
from tests.stores import contents, manifest
from tests.test_convert import held
from tests.test_foreign_axolotl import prepared
from tests.test_foreign_axolotl import write as write_axolotl
from tests.test_foreign_document import teacher, top
from tests.test_foreign_dwq import save
from tests.test_foreign_mlx_kld import K
from tests.test_foreign_mlx_kld import write as write_mlx_kld
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def config(tmp_path: Path, source: Path, **options: Any) -> ImportConfig:
    usual = {"format": "mlx-kld", "out": tmp_path / "s.zarr", "teacher": "org/teacher", "vocab_size": 384}
    return ImportConfig(source=source, tokenizer=str(tmp_path / "tokenizer"), quiet=True, **usual | options)


@pytest.mark.parametrize("suffix", ["zarr", "zip", "lmdb"])
def test_a_cache_becomes_a_top_k_store_that_says_what_it_does_not_know(tmp_path: Path, suffix: str) -> None:
    source = write_mlx_kld(tmp_path / "cache")
    out = tmp_path / f"s.{suffix}"
    report = import_cache(config(tmp_path, source, out=out))
    assert (report.documents, report.repeated, report.unanswered) == (3, 0, 0)
    store = open_store(out)
    assert str(store.manifest.recipe.selection) == f"top-k:{K}"
    assert (store.manifest.imported, store.manifest.teacher.name) == ("mlx-kld", "org/teacher")
    assert {"tokenizer", "entropy", "label log-prob where the label was not kept"} <= set(store.manifest.unknown)
    assert verify(out, quiet=True).problems == []
    for document in open_foreign("mlx-kld", source).documents:
        targets = store.get(document.token_ids)
        assert targets is not None and (targets.head_count == K).all()
        order = np.argsort(document.ids, axis=1)
        np.testing.assert_array_equal(targets.ids, np.take_along_axis(document.ids, order, axis=1))
        exact = np.exp(np.take_along_axis(document.log_probs, order, axis=1))
        assert np.abs(targets.weights - exact).sum(axis=1).mean() < 0.05
        total = targets.weights.sum(axis=1) + np.exp(targets.log_tail_mass)
        np.testing.assert_allclose(total, 1, atol=1e-5)
        label, told = document.label_log_prob, targets.label_log_prob
        known = ~np.isnan(label)
        assert known.any() and (~known).any()
        np.testing.assert_allclose(told[known], np.maximum(label[known], -15.875), atol=1 / 32 + 1e-6)
        assert (told[~known] == -15.875).all() and (targets.entropy == 15.9375).all()


def test_what_an_import_does_not_know_is_shown_nowhere_as_a_number(tmp_path: Path) -> None:
    source, page = write_mlx_kld(tmp_path / "cache"), tmp_path / "page.html"
    import_cache(config(tmp_path, source))
    title, _, *lines = run("inspect", tmp_path / "s.zarr").output.splitlines()
    label = next(open_foreign("mlx-kld", source).documents).label_log_prob
    assert "perplexity" not in title and "15.94" not in "".join(lines)
    dashes = [len(re.findall(r" -(?= )", line)) for line in lines if line.strip()]
    assert dashes == [1 + int(np.isnan(value)) for value in label]
    found = json.loads(run("stats", tmp_path / "s.zarr", "--json", "--html", page).stdout)
    assert found["teacher_perplexity"] is None and found["positions"] > 0 and page.exists()
    for name in ("entropy", "label_log_prob"):
        assert found["histograms"][name]["mean"] is None and not sum(found["histograms"][name]["counts"])
    run("export", tmp_path / "s.zarr", tmp_path / "o.parquet")
    row = pq.read_table(tmp_path / "o.parquet").to_pylist()[0]
    assert row["entropy"] == [None] * len(label)
    assert [value is None for value in row["label_log_prob"]] == np.isnan(label).tolist()


def test_no_live_teacher_fits_an_import_and_two_imports_that_know_different_things_differ(
    tmp_path: Path,
) -> None:
    import_cache(config(tmp_path, write_mlx_kld(tmp_path / "cache")))
    made = open_store(tmp_path / "s.zarr").manifest
    assert made.teacher.weights_digest.startswith("unknown-")
    with pytest.raises(IncompatibleStoreError, match="teacher weights unknown-"):
        made.require_compatible(manifest(f"top-k:{K}", vocab_size=384), "s.zarr")
    less = write_mlx_kld(tmp_path / "less", teacher_revision="abc")
    import_cache(config(tmp_path, less, out=tmp_path / "t.zarr"))
    assert open_store(tmp_path / "t.zarr").manifest.fingerprint != made.fingerprint


def test_the_manifest_of_an_import_comes_back_and_that_of_a_build_is_as_it_was() -> None:
    built = manifest()
    assert not {"imported", "unknown"} & built.to_json().keys()
    imported = replace(built, imported="dwq", unknown=("entropy",))
    assert Manifest.from_json(json.loads(json.dumps(imported.to_json())), "x") == imported
    for wrong in ({"imported": 3}, {"imported": "dwq", "unknown": "entropy"}, {"imported": "dwq", "unknown": [1]}):
        with pytest.raises(TypeError):
            Manifest.from_json(built.to_json() | wrong, "x")


def axolotl(folder: Path) -> Path:
    tokens, log_probs = teacher(80, 90)
    return write_axolotl(folder, [prepared(tokens, log_probs, 10, legacy=False)])


def dwq(folder: Path) -> tuple[Path, Path]:
    tokens, log_probs = teacher(60, 90)
    ids, values = top(log_probs[:-1], 12)
    folder.mkdir()
    save(
        folder / f"{0:010d}.safetensors",
        {"logits": ("F32", values[None].astype(np.float32)), "indices": ("U32", ids[None].astype(np.uint32))},
    )
    rows = folder.with_suffix(".jsonl")
    rows.write_text(json.dumps([tokens.tolist()]) + "\n")
    return folder, rows


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_tail_that_nobody_knows_is_not_stored_as_none_unless_it_is_typed(tmp_path: Path, tokenizer: Path) -> None:
    cache, rows = dwq(tmp_path / "dwq")
    common = ("--teacher", "T", "--tokenizer", tokenizer, "--quiet", "--out", tmp_path / "s.zarr")
    for line in (
        ("import", axolotl(tmp_path / "axolotl"), "--format", "axolotl", "--alignment", "current", *common),
        ("import", cache, "--format", "dwq", "--tokens", rows, *common[:-1], tmp_path / "t.zarr"),
    ):
        refused = run(*line)
        assert refused.exit_code == 2 and "type --assume-normalised" in refused.stderr
        assert not line[-1].exists()  # type: ignore[attr-defined]
        done = run(*line, "--assume-normalised")
        assert done.exit_code == 0, done.output
        assert "unknown, and marked so: " in done.stdout and "tail mass (assumed to be none)" in done.stdout
        store = open_store(str(line[-1]))
        assert "tail mass (assumed to be none)" in store.manifest.unknown
        np.testing.assert_allclose(store.document(0)[1].weights.sum(axis=1), 1, atol=1e-5)
        assert "tail mass (assumed" in run("info", line[-1]).stdout
        assert "tail mass (assumed" in json.loads(run("stats", line[-1], "--json").stdout)["about"]["unknown"]


@pytest.mark.parametrize("row", ["[1e3, 2]", "[-1, 2]", "[100000000000000000000, 2]", "[true, 2]"])
def test_tokens_that_are_no_ids_are_told_with_their_line(tmp_path: Path, tokenizer: Path, row: str) -> None:
    cache, rows = dwq(tmp_path / "dwq")
    rows.write_text(f"\n[{row}]\n")
    words = ("--format", "dwq", "--tokens", rows, "--teacher", "T", "--tokenizer", tokenizer, "--assume-normalised")
    result = run("import", cache, *words, "--quiet", "--out", tmp_path / "s.zarr")
    assert result.exit_code == 2 and f"{rows.name}:2: expected a list of rows of token ids" in result.stderr


def test_typed_again_it_changes_nothing_and_another_cache_is_refused(tmp_path: Path) -> None:
    source = write_mlx_kld(tmp_path / "cache")
    import_cache(config(tmp_path, source))
    before = contents(tmp_path / "s.zarr")
    assert import_cache(config(tmp_path, source)).documents == 3
    with pytest.raises(IncompatibleStoreError, match="teacher weights"):
        import_cache(config(tmp_path, source, teacher="another"))
    assert contents(tmp_path / "s.zarr") == before


def test_a_cache_that_is_read_with_other_options_is_refused_and_nothing_is_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"format": "axolotl", "assume_normalised": True, "renormalised": False, "alignment": "current"}
    right, wrong = (config(tmp_path, axolotl(tmp_path / "c"), temperature=t, **usual) for t in (2.0, 3.0))
    import_cache(right)
    before = contents(tmp_path / "s.zarr")
    with pytest.raises(IncompatibleStoreError, match=r"^documents [0-9a-f]{12} have other targets in \S+s.zarr than"):
        import_cache(wrong)
    assert contents(tmp_path / "s.zarr") == before
    for suffix in ("zarr", "zip"):
        right, wrong = (replace(each, out=tmp_path / f"t.{suffix}") for each in (right, wrong))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(ShardWriter, "commit", Mock(side_effect=KeyboardInterrupt))
            import_cache(wrong)
        if suffix == "zarr":
            with pytest.raises(IncompatibleStoreError, match="nothing was written"):
                import_cache(right)
        else:  # it is no store yet, and begun anew
            import_cache(right)
            assert held(tmp_path / "t.zip") == held(tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--format best", r"format 'best' is not known"),
        ("--format dwq", r"dwq does not record the tokens; type --tokens FILE.jsonl"),
        ("--format mlx-kld --alignment legacy", r"mlx-kld takes no alignment"),
        ("--format mlx-kld --tokens x.jsonl", r"mlx-kld takes no tokens"),
        ("--format mlx-kld --tokenizer ./none", r"--tokenizer ./none does not load: .*; type a folder"),
        ("--format mlx-kld --vocab-size 50", r"has 384 tokens, the cache's teacher 50; type --tokenizer"),
        ("--format mlx-kld", r"has 384 tokens, the cache's teacher 90; type --tokenizer"),
        ("--format mlx-kld --vocab-size 1519360000", r"said to be 1,519,360,000 wide, .*; type --vocab-size"),
        ("--format mlx-kld --out s.tar", r"type a path that ends in"),
        ("--format axolotl", r"cache holds no|cache"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_mlx_kld(tmp_path / "cache")
    before = contents(tmp_path)
    result = run(
        *["import", "cache", "--out", "s.zarr", "--teacher", "T", "--tokenizer", "tokenizer", "--quiet"], *line.split()
    )
    assert result.exit_code == 2, result.output
    (told,) = [text for text in result.stderr.splitlines() if text.startswith("Error: ")]
    assert re.search(says, told)
    assert contents(tmp_path) == before


def test_a_document_that_the_cache_has_twice_is_there_once_and_said(tmp_path: Path) -> None:
    tokens, log_probs = teacher(80, 90)
    row = prepared(tokens, log_probs, 10, legacy=False)
    source = write_axolotl(tmp_path / "cache", [row, row])
    made = config(tmp_path, source, format="axolotl", alignment="current", assume_normalised=True)
    report = import_cache(made)
    assert (report.documents, report.repeated) == (1, 1)


def test_a_cache_that_ends_in_rubbish_is_found_before_anything_is_written(tmp_path: Path, tokenizer: Path) -> None:
    source = write_mlx_kld(tmp_path / "cache", corpus_tokens_hash="0" * 16)
    result = run(
        *["import", source, "--format", "mlx-kld", "--out", tmp_path / "s.zarr", "--teacher", "T"],
        *["--tokenizer", tokenizer, "--vocab-size", 384, "--quiet"],
    )
    assert result.exit_code == 2 and "its files are of two runs" in result.stderr
    assert not (tmp_path / "s.zarr").exists()
