import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.errors import ConfigError, DatasetError
from logitstore.foreign import ForeignDocument, open_foreign
from tests.test_foreign_document import Teacher, teacher

K = 10
Tensors = dict[str, tuple[str, npt.NDArray[Any]]]


def bfloat16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def save(path: Path, tensors: Tensors) -> None:
    """A safetensors file by hand: length of the header, header, bytes."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header | {"__metadata__": {"format": "mlx"}}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def kept(log_probs: npt.NDArray[np.float64], seed: int = 0) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]:
    """The K largest of each row in no order, as logits: 7 above the log-probs."""
    ids = np.argpartition(log_probs, -K, axis=1)[:, -K:]
    ids = np.random.default_rng(seed).permuted(ids, axis=1)
    return ids.astype(np.uint32), np.take_along_axis(log_probs, ids, axis=1) + 7


def tensors_of(batch: list[Teacher]) -> Tensors:
    """As dwq saves a batch: rows padded to a multiple of 32 positions, targets over the padding too."""
    width = -(-max(len(tokens) for tokens, _ in batch) // 32) * 32
    ids = np.zeros((len(batch), width, K), np.uint32) + np.arange(K, dtype=np.uint32)
    logits = np.ones((len(batch), width, K))
    for b, (_, log_probs) in enumerate(batch):
        ids[b, : len(log_probs)], logits[b, : len(log_probs)] = kept(log_probs)
    return {"logits": ("BF16", bfloat16(logits)), "indices": ("U32", ids)}


def write(folder: Path, batches: list[list[Teacher]], split: str = "train") -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    for i, batch in enumerate(batches):
        save(folder / split / f"{i:010d}.safetensors", tensors_of(batch))
    return folder


def tokens_of(batches: list[list[Teacher]]) -> list[list[list[int]]]:
    return [[tokens.tolist() for tokens, _ in batch] for batch in batches]


def read(path: Path, **options: Any) -> list[ForeignDocument]:
    return list(open_foreign("dwq", path, **options).documents)


BATCHES = [[teacher(length, 90, seed=length) for length in pair] for pair in ((70, 61), (33, 2), (64, 5))]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_each_row_is_a_document_over_its_kept_entries(tmp_path: Path, split: str) -> None:
    source = open_foreign("dwq", write(tmp_path, BATCHES, split), token_batches=tokens_of(BATCHES), split=split)
    found = list(source.documents)
    assert [d.where for d in found] == [f"{i:010d}.safetensors row {b}" for i in range(3) for b in range(2)]
    for document, (tokens, log_probs) in zip(found, [row for batch in BATCHES for row in batch], strict=True):
        assert document.token_ids.tolist() == tokens.tolist()
        top = np.sort(log_probs[:-1], axis=1)[:, ::-1][:, :K]
        expected = top - np.log(np.exp(top).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(document.log_probs, expected, atol=0.07)
        np.testing.assert_array_equal(document.ids[:, 0], log_probs[:-1].argmax(axis=1))
        assert np.isneginf(document.log_tail_mass).mean() > 0.2 and document.log_tail_mass.max() < -30
    assert {"teacher", "tokenizer", "row order", "tail mass"} <= set(source.unknown)
    assert source.known == {"top_k": K, "files": 3}


def test_what_mlx_lm_itself_writes_is_read(tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.quant.dwq import compute_dwq_targets
    from mlx_lm.tuner.trainer import iterate_batches

    vocab = 1_100  # it keeps 1,024
    table = np.random.default_rng(0).standard_normal((vocab, vocab)) * 2
    data = [(list(range(i, i + length)), 0) for i, length in enumerate((40, 70, 33, 9, 100, 2))]

    def model(batch: Any) -> Any:
        return mx.array(table[np.array(batch)]).astype(mx.bfloat16)

    compute_dwq_targets(model, tmp_path, data, data[:2], batch_size=2, max_seq_length=80, seed=7)
    batches = [
        [row[:n].tolist() for row, n in zip(np.array(batch), np.array(spans)[:, 1], strict=True)]
        for batch, spans in iterate_batches(data, 2, 80, seed=7)
    ]
    found = read(tmp_path, token_batches=batches, check_alignment=False)  # tokens that the table would not draw
    assert sorted(len(d.token_ids) for d in found) == [2, 9, 33, 40, 70, 80]
    for document in found:
        logits = table[document.token_ids[:-1]]
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        mine = np.take_along_axis(log_probs, document.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(document.log_probs, mine, atol=0.03)  # bfloat16, and the 76 tokens left out
        np.testing.assert_allclose(mine[:, 0], log_probs.max(axis=1), atol=0.03)


def test_float32_and_float16_logits_are_read(tmp_path: Path) -> None:
    tokens, log_probs = teacher(32, 90)
    ids, logits = kept(log_probs)
    for dtype, kind in (("F32", np.float32), ("F16", np.float16)):
        tensors = {"logits": (dtype, logits[None].astype(kind)), "indices": ("U32", ids[None])}
        save(tmp_path / f"{0:010d}.safetensors", tensors)
        (found,) = read(tmp_path, token_batches=[[tokens.tolist()]])
        np.testing.assert_allclose(np.exp(found.log_probs).sum(axis=1), 1)


def test_a_row_cut_at_the_longest_length_fills_its_batch(tmp_path: Path) -> None:
    tokens, log_probs = teacher(50, 90)
    ids, logits = kept(log_probs[:-1])
    save(
        tmp_path / f"{0:010d}.safetensors", {"logits": ("BF16", bfloat16(logits[None])), "indices": ("U32", ids[None])}
    )
    (found,) = read(tmp_path, token_batches=[[tokens.tolist()]])
    assert found.ids.shape == (49, K)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b[:2], "found 2 batches of tokens for 3 files"),
        (lambda b: [*b, b[0]], "is the last file, but more batches of tokens were given"),
        (lambda b: [b[0][:1], *b[1:]], "found targets for 2 rows of 97 columns, expected 1 rows"),
        (lambda b: [b[1], b[0], b[2]], "found targets for 2 rows of 97 columns, expected 2 rows, the longest of 33"),
        (lambda b: [[row * 2 for row in b[0]], *b[1:]], "the longest of 140 tokens"),
        (
            lambda b: [[list(reversed(row)) for row in batch] for batch in b],
            "they belong to other tokens; give the batches",
        ),
        (lambda b: [[row[1:] for row in b[0]], *b[1:]], r"most on token t \+ 1; give the batches"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, change: Any, says: str) -> None:
    batches = [[teacher(400, 90, seed=5), BATCHES[0][1]], *BATCHES[1:]] if "other" in says else BATCHES
    with pytest.raises(DatasetError, match=says) as raised:
        read(write(tmp_path, batches), token_batches=change(tokens_of(batches)))
    assert "\n" not in str(raised.value)


def test_a_folder_with_holes_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no \.safetensors files"):
        read(tmp_path, token_batches=[])
    folder = write(tmp_path, BATCHES)
    (folder / "train" / f"{1:010d}.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"found 0000000002\.safetensors, expected 0000000001"):
        read(folder, token_batches=[])
    with pytest.raises(ConfigError, match="dwq does not record token_batches"):
        open_foreign("dwq", folder)


def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path) -> None:
    file, tokens = write(tmp_path, BATCHES) / "train" / f"{0:010d}.safetensors", tokens_of(BATCHES)
    whole = file.read_bytes()
    huge = struct.pack("<Q", 2**62) + whole[8:]
    for data in (b"", whole[:5], whole[:40], whole[:-1], whole + b"?", huge, whole.replace(b"BF16", b"BF99")):
        file.write_bytes(data)
        with pytest.raises(DatasetError, match="is not a whole safetensors file") as raised:
            read(tmp_path, token_batches=tokens)
        assert "\n" not in str(raised.value)
    for other, says in (
        (b'"logits"', "lacks the tensor logits, found "),
        (b'"U32"', r"indices is I32 \[2, 96, 10\], expected U32"),
    ):
        replacement = b'"logitz"' if other == b'"logits"' else b'"I32"'
        file.write_bytes(whole.replace(other, replacement))
        with pytest.raises(DatasetError, match=says):
            read(tmp_path, token_batches=tokens)


def test_shapes_that_disagree_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(BATCHES[0])
    dtype, ids = tensors["indices"]
    save(tmp_path / f"{0:010d}.safetensors", tensors | {"indices": (dtype, ids[:, :-1])})
    with pytest.raises(DatasetError, match="logits and indices differ in shape"):
        read(tmp_path, token_batches=tokens_of(BATCHES[:1]))


def test_a_logit_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(BATCHES[0])
    tensors["logits"][1][1, 3, 4] = 0x7F80  # infinity
    save(tmp_path / f"{0:010d}.safetensors", tensors)
    with pytest.raises(DatasetError, match=r"0000000000\.safetensors row 1: found log-prob nan at position 3"):
        read(tmp_path, token_batches=tokens_of(BATCHES[:1]))
