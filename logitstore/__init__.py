"""Cache a teacher's next-token distributions in a few bytes per token, and read them back.

A store is opened, read and verified without MLX; `logitstore.teacher` and `logitstore.build` need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logitstore.errors import LogitstoreError

if TYPE_CHECKING:
    from logitstore.store import open_store
    from logitstore.targets import SparseTargets

__all__ = ["LogitstoreError", "SparseTargets", "open_store"]
__version__ = "0.1.0"

_LAZY = {"open_store": "logitstore.store", "SparseTargets": "logitstore.targets"}


def __getattr__(name: str) -> Any:
    """Import zarr and NumPy only when they are needed, so that `logitstore --help` answers at once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'logitstore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
