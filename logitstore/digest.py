"""Names a model by its content: digests of weights, config and adapter, read from the files. No MLX, nothing is loaded.

Two copies of one model have the same digests wherever they lie; who asks for a store's targets is held against these.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from logitstore.errors import ModelError, first_line

_ADAPTER_FIELDS = ("fine_tune_type", "lora_parameters", "num_layers")
_NOT_COMPUTED = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "name_or_path",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_BLOCK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def weights_digest(path: Path, *, quiet: bool = False) -> str:
    """BLAKE2b-128, in hex, of a model's weights: a .gguf file's bytes, or a directory's ``model*.safetensors``.

    Tensors enter sorted by name, each with dtype, shape and bytes: re-sharding the same weights changes nothing.

    Raises:
        ModelError: no weights, or a safetensors file that contradicts itself.
    """
    if path.is_file() and path.suffix == ".gguf":
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file, _progress(path.stat().st_size, quiet) as bar:
            for block in _blocks(file, path.stat().st_size, path):
                digest.update(block)
                bar.update(len(block))
        return digest.hexdigest()
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no model*.safetensors and is no .gguf file; expected a model's weights")
    return _tensors_digest(files, quiet=quiet)


def config_digest(path: Path) -> str | None:
    """BLAKE2b-128, in hex, of the fields of a directory's config.json that change what the model computes.

    None for a .gguf file: its config is among the bytes of its weights digest.

    Raises:
        ModelError: no config.json, or one that is not a JSON object.
    """
    if path.is_file():
        return None
    fields = read_json_object(path / "config.json", "a model saved by mlx-lm")
    if "quantization" in fields:
        fields.pop("quantization_config", None)  # mlx-lm's copy of it
    kept = {name: value for name, value in fields.items() if name not in _NOT_COMPUTED and not name.startswith("_")}
    return _digest_text(json.dumps(kept, sort_keys=True))


def adapter_digest(adapter_path: Path, *, quiet: bool = False) -> str:
    """BLAKE2b-128, in hex, of an adapter: its tensors, and the config fields that say how they act.

    Raises:
        ModelError: no adapter there, or a broken one.
    """
    config = read_json_object(adapter_path / "adapter_config.json", "an adapter directory")
    fields = json.dumps({field: config.get(field) for field in _ADAPTER_FIELDS}, sort_keys=True)
    tensors = _tensors_digest([adapter_path / "adapters.safetensors"], quiet=quiet)
    return _digest_text(f"{fields}\n{tensors}")


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """A file's JSON object.

    Args:
        expected: what should be there, for the message.

    Raises:
        ModelError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"found a JSON {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; expected {expected}") from error
    return value


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tensors_digest(files: list[Path], *, quiet: bool) -> str:
    lines: dict[str, str] = {}
    headers = [(path, *read_safetensors_header(path)) for path in files]
    with _progress(sum(path.stat().st_size for path in files), quiet) as bar:
        for path, tensors, data_start in headers:
            with path.open("rb") as file:
                for name, (dtype, shape, begin, end) in tensors.items():
                    if name in lines:
                        raise ModelError(
                            f"{path} holds tensor `{name}` a second time; remove the files of another model"
                        )
                    digest = hashlib.blake2b(digest_size=16)
                    file.seek(data_start + begin)
                    for block in _blocks(file, end - begin, path):
                        digest.update(block)
                        bar.update(len(block))
                    lines[name] = json.dumps([name, dtype, shape, digest.hexdigest()])
    return _digest_text("\n".join(lines[name] for name in sorted(lines)))


def read_safetensors_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """Every tensor's dtype, shape, and first and last byte after the header; and where the header ends."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: (t["dtype"], t["shape"], *map(int, t["data_offsets"])) for name, t in header.items()}
        data_bytes = size - 8 - length
        if bad := next((name for name, (_, _, a, b) in tensors.items() if not 0 <= a <= b <= data_bytes), None):
            raise ValueError(f"tensor `{bad}` extends past the end of the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {first_line(error)}; download it again") from error
    return tensors, 8 + length


def _blocks(file: BinaryIO, count: int, path: Path) -> Iterator[bytes]:
    while count > 0:
        block = file.read(min(count, _BLOCK_BYTES))
        if not block:
            raise ModelError(f"{path} became shorter while it was read; wait until its download is complete")
        count -= len(block)
        yield block


def _progress(total_bytes: int, quiet: bool) -> "tqdm[Any]":
    """A bar that appears only for work of over a second."""
    return tqdm(
        total=total_bytes, unit="B", unit_scale=True, desc="weights digest", delay=1, leave=False, disable=quiet
    )
