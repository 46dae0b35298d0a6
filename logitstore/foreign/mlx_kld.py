"""Teacher caches of mlx-kld: a folder with a manifest and one safetensors file per batch, tokens included.

``batch-{i:05d}.safetensors`` holds `token_ids` i32 [B, T], `attention_mask` bool [B, T], `top_k_log_softmax` bf16
[B, T, K] over the whole vocabulary at temperature 1, and `top_k_indices` i32 [B, T, K]. Row t is about token t + 1; the
last is about a token that is not there. ``manifest.json``, written last, names the teacher, the numbers of batches and
sequences, and a hash of all tokens, which is held against them at the end. mlx-kld 0.1.1, format 1.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitstore.errors import DatasetError, first_line
from logitstore.foreign.alignment import aligned
from logitstore.foreign.document import ForeignDocument, ForeignSource, foreign_document
from logitstore.foreign.tensors import FLOATS, TensorFile

FORMAT_VERSION = 1
_MAX_MANIFEST_BYTES = 1 << 20
_AGAIN = "run mlx-kld with --rebuild-cache"
_COUNTS = ("num_batches", "num_samples", "top_k", "vocab_size")
_KNOWN = ("teacher_path", "teacher_revision", "teacher_precision", "dataset", "tokenizer_hash", "top_k", "vocab_size")


def read_mlx_kld(path: Path, *, check_alignment: bool = True) -> ForeignSource:
    """Open an entry of the cache: a folder with a ``manifest.json``.

    Raises:
        DatasetError: no finished entry of format 1.
    """
    manifest = _read_manifest(path)
    for number in range(manifest["num_batches"]):
        if not _batch_file(path, number).is_file():
            raise DatasetError(f"{path} lacks batch {number} of {manifest['num_batches']}; {_AGAIN}")
    documents = _documents(path, manifest)
    known = {name: manifest[name] for name in _KNOWN if isinstance(manifest.get(name), str | int)}
    return ForeignSource(
        format="mlx-kld",
        documents=aligned(documents, _AGAIN) if check_alignment else documents,
        unknown=(
            *(() if "teacher_path" in known else ("teacher",)),
            *(() if "teacher_revision" in known else ("teacher's revision",)),
            "tokenizer",
            "label log-prob where the label was not kept",
            "entropy",
        ),
        known=known,
    )


def _documents(folder: Path, manifest: Mapping[str, Any]) -> Iterator[ForeignDocument]:
    tokens_hash, sequences = hashlib.sha256(), 0
    for number in range(manifest["num_batches"]):
        file = _batch_file(folder, number)
        with TensorFile(file) as tensors:
            shape = tensors.shape("top_k_log_softmax", FLOATS, 3)
            same = tensors.shape("top_k_indices", ("I32",), 3) == shape
            whole = (
                tensors.shape("token_ids", ("I32",), 2) == tensors.shape("attention_mask", ("BOOL",), 2) == shape[:2]
            )
            if not same or not whole or shape[2] != manifest["top_k"]:
                raise DatasetError(
                    f"{file}: found log-probs of shape {list(shape)}, expected ids and tokens of the same shape and "
                    f"{manifest['top_k']} entries; {_AGAIN}"
                )
            for b in range(shape[0]):
                tokens, mask = tensors.row("token_ids", b), tensors.row("attention_mask", b)
                tokens_hash.update(tokens.tobytes())
                where = f"{file.name} row {b}"
                length = int(mask.sum())
                if not mask[:length].all():
                    raise DatasetError(f"{where}: attention_mask has a gap, expected padding at the end; {_AGAIN}")
                if length > 1:
                    positions = slice(0, length - 1)  # the one shift: row t is about token t + 1
                    ids = tensors.row("top_k_indices", b)[positions]
                    log_probs = tensors.row("top_k_log_softmax", b)[positions]
                    vocab_size = manifest["vocab_size"]
                    yield foreign_document(tokens[:length], ids, log_probs, where, vocab_size=vocab_size)
            sequences += shape[0]
    if sequences != manifest["num_samples"] or tokens_hash.hexdigest()[:16] != manifest["corpus_tokens_hash"]:
        raise DatasetError(
            f"{folder}: found {sequences} sequences with token hash {tokens_hash.hexdigest()[:16]}, expected "
            f"{manifest['num_samples']} with {manifest['corpus_tokens_hash']:.40}: its files are of two runs; {_AGAIN}"
        )


def _batch_file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:05d}.safetensors"


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        entries = [entry.parent.name for entry in sorted(folder.glob("*/manifest.json"))]
        found = f"found entries {', '.join(entries[:5])}; type the path of one" if entries else f"found none; {_AGAIN}"
        raise DatasetError(f"{folder} has no manifest.json, expected a finished entry of mlx-kld's cache; {found}")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
        if len(data) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {_MAX_MANIFEST_BYTES:,} bytes")
        manifest = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {first_line(error)}; {_AGAIN}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or version != FORMAT_VERSION:
        raise DatasetError(f"{path} has format_version {version!r:.40}, expected {FORMAT_VERSION}; {_AGAIN}")
    for name in _COUNTS:
        value = manifest.get(name)
        if type(value) is not int or not 1 <= value < 2**31:
            raise DatasetError(f"{path} has {name} {value!r:.40}, expected a number of 1 or more; {_AGAIN}")
    if not isinstance(manifest.get("corpus_tokens_hash"), str):
        raise DatasetError(f"{path} has no corpus_tokens_hash; {_AGAIN}")
    return manifest
