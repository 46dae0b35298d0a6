"""A GGUF file's metadata as plain Python values: what the config and the tokenizer are made from. Needs no MLX."""

from pathlib import Path
from typing import Any

import numpy as np

from logitstore.errors import ModelError


class Metadata:
    """A GGUF file's key-value pairs as plain Python values, whether MLX's arrays hold them or NumPy's."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self._raw = raw

    def get(self, key: str, default: Any = None) -> Any:
        value = self._raw.get(key, default)
        if not hasattr(value, "tolist"):
            return value
        if value.ndim == 0 and str(value.dtype).endswith("float32"):
            return float(str(np.array(value)))  # 1e-05, not 9.999999747378752e-06
        return value.tolist()

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.path} has no `{key}` in its metadata; expected a GGUF of a llama-family model")
        return value
