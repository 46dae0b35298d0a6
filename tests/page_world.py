"""What the page is shown: small stores with hostile texts; and a real Chromium that looks at it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from logitstore.manifest import Manifest
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.vocabulary import Vocabulary
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCAB, guessed, manifest

WORDS = ("store", "teacher", "token", "reads", "what", "said", "every", "position", "a", "the", "of", "once")
HOSTILE = (
    b"<script>window.harmed = 1</script>",
    b'"><img src=x onerror="window.harmed = 1">',
    b"</span></section>",
    "\u202eevil\u2066".encode(),
    b"\xf0\x9f",
    b"\x98\x80",
    b"\n",
    b" ",
    b"\x00\x1b[31m",
    "Ω\u200b".encode(),
)
"""Tokens 2 and up."""
LENGTHS = (40, 2, 300, 25, 60)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def page_vocabulary() -> Vocabulary:
    """End of text, padding, hostile tokens, then words."""
    words = [f" {WORDS[i % len(WORDS)]}{i // len(WORDS) or ''}".encode() for i in range(VOCAB - 2 - len(HOSTILE))]
    return Vocabulary((b"<|end|>", b"<|pad|>", *HOSTILE, *words), frozenset({0, 1}), None, 0)


def page_manifest(select: str, teacher: str = "tiny", **changed: Any) -> Manifest:
    made = manifest(select, **changed)
    vocabulary = page_vocabulary()
    tokenizer = replace(made.tokenizer, fingerprint=vocabulary.fingerprint())
    return replace(made, teacher=replace(made.teacher, name=teacher), tokenizer=tokenizer)


def page_store(
    path: Path, select: str, *, seed: int = 0, teacher: str = "tiny", lengths: Sequence[int] = LENGTHS, **changed: Any
) -> ZarrStore:
    """Documents that all stores have, each answered by a teacher that guesses, with luck."""
    made = page_manifest(select, teacher, **changed)
    store = ZarrStore.create(path, made, page_vocabulary())
    rng = np.random.default_rng(seed)
    for part in (lengths[:2], lengths[2:]):
        some = [page_tokens(length) for length in part]
        if some:
            store.write_documents([guessed(token_ids, made.recipe, rng) for token_ids in some])
    return store


def page_tokens(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A document: hostile tokens first, then words."""
    hostile = np.arange(2, 2 + len(HOSTILE))
    words = np.random.default_rng(length).integers(2 + len(HOSTILE), VOCAB, length)
    return np.concatenate([hostile, words]).astype(np.int32)[:length]


def record(token_ids: Any, made: Manifest) -> DocumentRecord:
    return guessed(token_ids, made.recipe, np.random.default_rng(7))


class Guesser:
    """A teacher that guesses, once it may."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.may = Event()

    def manifest(self, recipe: Recipe) -> Manifest:
        return replace(page_manifest(str(recipe.selection)), recipe=recipe)

    def records(self, documents: Sequence[Any], recipe: Recipe) -> list[DocumentRecord]:
        assert self.may.wait(30)
        return [record(token_ids, self.manifest(recipe)) for token_ids in documents]


@contextmanager
def chromium() -> Iterator[Any]:
    """A Chromium of this machine, with a new, empty profile; the test is skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH; tools/browser.sh installs one")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page of which everything that it says and asks is kept."""

    def __init__(self, browser: Any, base: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.base = base
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str) -> Any:
        """A view, drawn from nothing."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/{address}")
        self.page.locator("main[aria-busy]").wait_for(state="detached")
        self.page.locator("main h1").wait_for()
        return self.page

    def foreign(self) -> list[str]:
        """Requests to anybody else."""
        return [url for url in self.asked if not url.startswith((self.base + "/", "about:"))]
