"""A store goes to the hub through its real client, with a card, and comes back; a small hub on loopback takes it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from logitstore.card import WRITTEN, card
from logitstore.errors import ConfigError
from logitstore.hub import repository
from logitstore.incoming import FOLDER as INCOMING
from logitstore.verify import verify
from logitstore.zip_store import write_zip
from tests.fake_hub import Hub, HubHandler
from tests.stores import contents, records, shard_folder, small_store
from tests.test_files import served
from tests.test_parts import whole

ROOT = Path(__file__).parent.parent
PLACE = "hf://datasets/team/targets"


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def url(hub: Hub) -> Iterator[str]:
    with served(partial(HubHandler, hub=hub)) as found:
        yield found.removesuffix("/s")


def run(url: str, home: Path, *arguments: object, token: str = "hf_right") -> str:
    """`logitstore` in a process of its own, which knows the hub by its environment; what it says."""
    code = "from distill_cli.logitstore import main; main()"
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",  # its storage is no part of the client
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", code, *map(str, arguments), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=90)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_a_store_goes_to_the_hub_with_a_card_and_comes_back(hub: Hub, url: str, tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    said = run(url, tmp_path / "home", "push", store.folder, PLACE)
    assert said.startswith(f"{PLACE}: 5 parts moved"), said
    assert hub.files("team/targets").keys() == contents(store.folder).keys() | {"README.md"}
    assert hub.private["team/targets"] and len(hub.datasets["team/targets"]) == 2
    assert any(line.startswith("PUT /large/") for line in hub.asked)
    said = run(url, tmp_path / "home", "pull", PLACE, tmp_path / "t")
    assert said.startswith(f"{tmp_path / 't'}: 5 parts moved"), said
    assert contents(tmp_path / "t") == contents(store.folder)


def test_a_second_push_sends_what_is_new_in_one_commit(hub: Hub, url: str, tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr")
    run(url, tmp_path / "home", "push", store.folder, PLACE)
    hub.datasets["team/targets"][-1]["README.md"] = b"a card of the team's own"
    store.write_documents(records([9, 8], seed=7))
    with (tmp_path / "s.zip").open("wb") as file:
        write_zip(store.folder, file)
    hub.asked.clear()
    said = run(url, tmp_path / "home", "push", tmp_path / "s.zip", PLACE)
    assert said.startswith(f"{PLACE}: 1 parts moved") and "3 were there" in said, said
    assert sum("/commit/main" in line for line in hub.asked) == 1
    assert hub.files("team/targets")["README.md"] == b"a card of the team's own"
    run(url, tmp_path / "home", "pull", PLACE, tmp_path / "t")
    assert verify(tmp_path / "t", quiet=True).problems == [] and verify(tmp_path / "t", quiet=True).documents == 8


def test_what_the_hub_refuses_is_one_line_and_goes_on_later(hub: Hub, url: str, tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    for token, full, message in (
        ("hf_wrong", False, "cannot be read"),
        ("hf_right", True, r"takes no commit (403 Forbidden: None: Storage quota exceeded)"),
    ):
        hub.full = full
        said = run(url, tmp_path / "home", "push", store.folder, PLACE, token=token)
        assert said.startswith(f"Error: {PLACE} {message}") and said.count("\n") == 1, said
        assert said.endswith("and type the same command again\n") and "`hf auth login`" in said
        assert not hub.files("team/targets") if "team/targets" in hub.datasets else True
    hub.full = False
    hub.asked.clear()
    run(url, tmp_path / "home", "push", store.folder, PLACE)
    assert not any(line.startswith("PUT /large/") for line in hub.asked)  # what has arrived is not sent again
    assert "zarr.json" in hub.files("team/targets")


def test_damage_is_neither_sent_to_the_hub_nor_taken_from_it(hub: Hub, url: str, tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    file = shard_folder(store) / "entries-0" / "c" / "0" / "0"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = run(url, tmp_path / "home", "push", store.folder, PLACE)
    assert said.startswith("Error: ") and "its bytes are not those that were written" in said and not hub.datasets
    file.write_bytes(data)
    run(url, tmp_path / "home", "push", store.folder, PLACE)
    name = file.relative_to(store.folder).as_posix()
    hub.files("team/targets")[name] = data[:-1] + bytes([data[-1] ^ 1])
    said = run(url, tmp_path / "home", "pull", PLACE, tmp_path / "t")
    assert f"{name}: its bytes are not those that were written" in said and said.startswith("Error: ")
    assert verify(tmp_path / "t", quiet=True).problems == [] and (tmp_path / "t" / INCOMING).exists()
    said = run(url, tmp_path / "home", "pull", "hf://datasets/team/none", tmp_path / "u")
    assert said.startswith("Error: there is no dataset team/none on the hub") and not (tmp_path / "u").exists()


def test_the_card_says_what_the_manifest_says(tmp_path: Path) -> None:
    text = card(whole(tmp_path / "s"), PLACE)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"tags": ["logitstore", "knowledge-distillation"], "size_categories": ["n<1K"]}
    for word in (WRITTEN, "# What tiny says of 6 documents", f"logitstore pull {PLACE} store.zarr", "threshold:4"):
        assert word in body
    assert body.count("```") == 4


def test_places_on_the_hub() -> None:
    for place in ("hf://datasets/a/b", "hf://a/b", "hf://a/b/"):
        assert repository(place) == "a/b"
    for place in ("hf://a", "hf://datasets/a/b/c", "hf://", "hf://a/b?x"):
        with pytest.raises(ConfigError, match="type hf://datasets/OWNER/NAME"):
            repository(place)
