"""Caches that other tools left, read as documents with their targets: the reading half of `logitstore import`.

    source = open_foreign("distillkit", Path("captured/"))
    for document in source.documents: ...

Nothing is written here, and nothing made up: what a format does not record is in the source's `unknown`. Every reader
looks at one document at a time, handles the shift between rows and tokens once, and refuses a cache whose targets
plainly belong to other tokens (`foreign.alignment`) unless told `check_alignment=False`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from logitstore.errors import ConfigError
from logitstore.foreign.axolotl import read_axolotl
from logitstore.foreign.distillkit import read_distillkit
from logitstore.foreign.document import ForeignDocument, ForeignSource
from logitstore.foreign.dwq import read_dwq
from logitstore.foreign.mlx_kld import read_mlx_kld

__all__ = ["FORMATS", "ForeignDocument", "ForeignSource", "open_foreign", "options_of"]

FORMATS: Mapping[str, Callable[..., ForeignSource]] = {
    "distillkit": read_distillkit,
    "axolotl": read_axolotl,
    "dwq": read_dwq,
    "mlx-kld": read_mlx_kld,
}


def open_foreign(name: str, path: Path, **options: Any) -> ForeignSource:
    """Open a cache of a format in `FORMATS`, with the options that its reader takes.

    Raises:
        ConfigError: no such format, an option that it does not take, or one that it needs and did not get.
        DatasetError: the cache cannot be read: at once, or on a document's turn.
    """
    taken = options_of(name)
    for option in options:
        if option not in taken:
            raise ConfigError(f"{name} takes no {option}{_nearest(option, taken)}; type one of: {', '.join(taken)}")
    missing = [option for option, needed in taken.items() if needed and options.get(option) is None]
    if missing:
        raise ConfigError(f"{name} does not record {missing[0]}, which must be given: the cache has none of it")
    return FORMATS[name](path, **options)


def options_of(name: str) -> Mapping[str, bool]:
    """The options that a format's reader takes, and whether it cannot do without.

    Raises:
        ConfigError: no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is not known{_nearest(name, FORMATS)}; type one of: {', '.join(FORMATS)}")
    parameters = list(inspect.signature(FORMATS[name]).parameters.values())[1:]
    return {parameter.name: parameter.default is parameter.empty for parameter in parameters}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {found[0]}" if found else ""
