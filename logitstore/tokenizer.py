"""The tokenizer of a model without its weights: a folder's or a hub id's `tokenizer.json`, or a GGUF file's. No MLX."""

import os
from pathlib import Path
from typing import Any

from logitstore.errors import ModelError, first_line


def load_tokenizer(source: str, flag: str) -> Any:
    """The Hugging Face tokenizer of a model.

    Args:
        flag: under which `source` was typed, for messages.

    Raises:
        ModelError: there is none, or a broken one.
    """
    # Else transformers says on stderr that there is no PyTorch, which nothing here needs; mlx-lm does the same.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    try:
        if path.is_file():
            from logitstore.gguf_header import read_metadata
            from logitstore.gguf_metadata import Metadata
            from logitstore.gguf_tokenizer import build_tokenizer

            return build_tokenizer(Metadata(path, read_metadata(path)))
        return AutoTokenizer.from_pretrained(path if path.is_dir() else source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # network, hub and file formats: no common base short of this one
        bare = path.is_dir() and not (path / "tokenizer.json").is_file()
        raise ModelError(
            f"{flag} {source} does not load: {'it has no tokenizer.json' if bare else first_line(error)}; "
            "type a folder with tokenizer.json, a .gguf file, or a hub id"
        ) from error
