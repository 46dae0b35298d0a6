"""`stats` of a store: reads its documents once, in its own order, and writes the page."""

from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

from tqdm import tqdm

from logitstore.contract import Store
from logitstore.entries import require_outside_stores
from logitstore.errors import ConfigError
from logitstore.manifest import Manifest
from logitstore.measures import unknown
from logitstore.replaced import replaced
from logitstore.stats import Histogram, StoreStats, collect
from logitstore.stats_report import to_html
from logitstore.store import is_lmdb_store


def of_store(store: Store, *, quiet: bool = False) -> StoreStats:
    """Go once over all documents of a store.

    Raises:
        CorruptStoreError: the bytes are not those that were written.
    """
    numbers = tqdm(range(len(store)), unit="doc", desc="stats", delay=1, leave=False, disable=quiet)
    name = Path(str(store.path).rstrip("/")).name
    found = collect(
        map(store.document, numbers), store.plane_bytes(), store.fidelity, name=name, about=about(store.manifest)
    )
    return known(found, store.manifest)


def known(stats: StoreStats, manifest: Manifest) -> StoreStats:
    """The same without what the store does not know: codes of an imported cache, and the tail of `random:N`."""
    lacking = unknown(manifest)
    if "entropy" in lacking:
        stats = replace(stats, entropy=_empty(stats.entropy))
    if "tail_mass" in lacking:
        stats = replace(stats, tail_mass=_empty(stats.tail_mass))
    if "nll" in lacking:
        stats = replace(stats, teacher_perplexity=None, label_log_prob=_empty(stats.label_log_prob))
    return stats


def _empty(histogram: Histogram) -> Histogram:
    return replace(histogram, counts=(0,) * len(histogram.counts), mean=None)


def about(manifest: Manifest) -> dict[str, str]:
    """What made a store, in words, to show beside its numbers."""
    recipe = manifest.recipe
    found = {
        "teacher": manifest.teacher.name,
        "selection": str(recipe.selection),
        "temperature": ", ".join(f"{t:g}" for t in recipe.temperatures),
        "fingerprint": manifest.fingerprint,
    }
    if manifest.imported:
        found |= {"imported from": manifest.imported, "unknown": ", ".join(manifest.unknown) or "nothing"}
    return found


def require_page(path: Path) -> None:
    """Check that a page may be written there.

    Raises:
        ConfigError: it would lie inside a store, or take the place of one.
    """
    require_outside_stores(path)
    if path.is_file() and (is_lmdb_store(path) or is_zipfile(path)):
        raise ConfigError(f"{path} is a store or another archive, which a page would replace; type --html page.html")


def save_html(stats: StoreStats, path: Path) -> None:
    """Write the page; one that is there is replaced.

    Raises:
        ConfigError: as `require_page`.
        StoreWriteError: full disk or no permission.
    """
    require_page(path)
    with replaced(path) as file:
        file.write(to_html(stats).encode())
