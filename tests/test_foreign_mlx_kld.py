import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstore.errors import ConfigError, DatasetError
from logitstore.foreign import FORMATS, ForeignDocument, open_foreign, options_of
from tests.test_foreign_document import teacher, top
from tests.test_foreign_dwq import Tensors, bfloat16, save

K, LENGTH, VOCAB = 8, 60, 90
SEQUENCES = [teacher(LENGTH, VOCAB, seed=i) for i in range(3)]


def batch(numbers: list[int]) -> Tensors:
    """As mlx-kld saves a batch: L rows for L tokens, sorted, in bfloat16."""
    tokens = np.stack([SEQUENCES[i][0] for i in numbers]).astype(np.int32)
    entries = [top(SEQUENCES[i][1], K) for i in numbers]
    return {
        "top_k_log_softmax": ("BF16", bfloat16(np.stack([values for _, values in entries]))),
        "top_k_indices": ("I32", np.stack([ids for ids, _ in entries]).astype(np.int32)),
        "token_ids": ("I32", tokens),
        "attention_mask": ("BOOL", np.ones(tokens.shape, np.bool_)),
        "floor_kld": ("F32", np.zeros(tokens.shape, np.float32)),
    }


def manifest(**changes: Any) -> dict[str, Any]:
    tokens = np.stack([tokens for tokens, _ in SEQUENCES]).astype(np.int32)
    return {
        "format_version": 1,
        "teacher_path": "org/teacher",
        "teacher_revision": None,
        "dataset": "wikitext",
        "num_samples": 3,
        "max_seq_len": LENGTH,
        "top_k": K,
        "vocab_size": VOCAB,
        "tokenizer_hash": "ab12",
        "corpus_tokens_hash": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
        "num_batches": 2,
        "batch_size": 2,
        "logit_dtype": "bfloat16",
    } | changes


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save(folder / "batch-00000.safetensors", batch([0, 1]))
    save(folder / "batch-00001.safetensors", batch([2]))
    (folder / "manifest.json").write_text(json.dumps(manifest(**changes)))
    return folder


def read(path: Path, **options: Any) -> list[ForeignDocument]:
    return list(open_foreign("mlx-kld", path, **options).documents)


def test_every_sequence_is_a_document_over_the_whole_vocabulary(tmp_path: Path) -> None:
    source = open_foreign("mlx-kld", write(tmp_path / "e"))
    found = list(source.documents)
    assert [d.where for d in found] == [f"batch-0000{i}.safetensors row {b}" for i, b in ((0, 0), (0, 1), (1, 0))]
    for document, (tokens, log_probs) in zip(found, SEQUENCES, strict=True):
        ids, values = top(log_probs[:-1], K)
        assert document.token_ids.tolist() == tokens.tolist()
        np.testing.assert_array_equal(document.ids[:, 0], ids[:, 0])
        np.testing.assert_allclose(document.log_probs, values, rtol=2**-7)
        mass = np.exp(document.log_probs).sum(axis=1)
        np.testing.assert_allclose(np.exp(document.log_tail_mass), np.maximum(1 - mass, 0), atol=1e-12)
    assert source.known["teacher_path"] == "org/teacher" and source.known["vocab_size"] == VOCAB
    assert "teacher" not in source.unknown and "teacher's revision" in source.unknown and "tokenizer" in source.unknown


def test_masked_tokens_at_the_end_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "e")
    tensors = batch([2])
    tensors["attention_mask"][1][0, 20:] = False
    save(folder / "batch-00001.safetensors", tensors)
    assert [len(d.token_ids) for d in read(folder)] == [60, 60, 20]
    tensors["attention_mask"][1][0, 30] = True
    save(folder / "batch-00001.safetensors", tensors)
    with pytest.raises(DatasetError, match="row 0: attention_mask has a gap"):
        read(folder)


@pytest.mark.parametrize("by", [1, -1])
def test_tokens_one_position_off_are_refused(tmp_path: Path, by: int) -> None:
    folder = write(tmp_path / "e")
    tensors = batch([0, 1])
    tensors["token_ids"] = ("I32", np.roll(tensors["token_ids"][1], by, axis=1))
    save(folder / "batch-00000.safetensors", tensors)
    with pytest.raises(DatasetError, match=r"expected most on token t \+ 1"):
        read(folder)
    with pytest.raises(DatasetError, match="its files are of two runs"):  # the hash of the tokens says so too
        read(folder, check_alignment=False)


def test_batches_of_two_runs_are_refused_at_the_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "e")
    save(folder / "batch-00001.safetensors", batch([0]))
    with pytest.raises(DatasetError, match=r"found 3 sequences with token hash [0-9a-f]{16}, expected 3 with"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "has format_version 2, expected 1"),
        ({"num_batches": 3}, "lacks batch 2 of 3"),
        ({"num_batches": True}, "has num_batches True"),
        ({"num_batches": 2**40}, "has num_batches 1099511627776"),
        ({"top_k": 9}, "and 9 entries"),
        ({"vocab_size": 50}, "expected 0 to 49"),
        ({"num_samples": 4}, "found 3 sequences"),
        ({"corpus_tokens_hash": None}, "has no corpus_tokens_hash"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DatasetError, match=says) as raised:
        read(write(tmp_path / "e", **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000, " " * (1 << 20) + "{}", "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "e")
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=r"cannot be read as JSON|has format_version None"):
        read(folder)


def test_the_folder_above_names_its_entries(tmp_path: Path) -> None:
    write(tmp_path / "abc123")
    with pytest.raises(DatasetError, match=r"has no manifest\.json, .*; found entries abc123; type the path of one"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["top_k_log_softmax", "top_k_indices", "token_ids", "attention_mask"])
def test_a_tensor_that_lacks_or_has_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "e")
    tensors = batch([0, 1])
    dtype, array = tensors[name]
    save(folder / "batch-00000.safetensors", tensors | {name: (dtype, array[:, :-1].copy())})
    with pytest.raises(DatasetError, match="expected ids and tokens of the same shape"):
        read(folder)
    del tensors[name]
    save(folder / "batch-00000.safetensors", tensors)
    with pytest.raises(DatasetError, match=f"lacks the tensor {name}"):
        read(folder)


def test_formats_and_options_are_known_by_name(tmp_path: Path) -> None:
    assert list(FORMATS) == ["distillkit", "axolotl", "dwq", "mlx-kld"]
    assert options_of("dwq") == {"token_batches": True, "split": False, "check_alignment": False}
    with pytest.raises(
        ConfigError, match="format 'distilkit' is not known, did you mean distillkit; type one of: dist"
    ):
        open_foreign("distilkit", tmp_path)
    with pytest.raises(ConfigError, match="mlx-kld takes no check_alignmnt, did you mean check_alignment"):
        open_foreign("mlx-kld", tmp_path, check_alignmnt=False)
