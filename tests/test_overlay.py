"""What was fetched has a place of its own for every URL, and a budget; killed processes leave nothing for good."""

import os
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from distill_cli import logitstore
from logitstore import overlay
from logitstore.errors import StoreWriteError
from logitstore.overlay import INDEX, STORE, TAUGHT, fetched, folder_of, gc_overlay, remove_left, trim, used

URL = "http://h:8470/s"


def put(path: Path, size: int, age_s: float = 0.0) -> Path:
    """A shard that was used so long ago."""
    path.mkdir(parents=True)
    (path / "zarr.json").write_bytes(b"x" * size)
    os.utime(path / "zarr.json", (time.time() - age_s,) * 2)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def shard(folder: Path, name: str, size: int, age_s: float = 0.0) -> Path:
    return put(folder / STORE / "shards" / name, size, age_s)


def test_every_url_has_a_folder_and_finds_it_again(tmp_path: Path) -> None:
    urls = [
        URL,
        "https://h:8470/s",
        "http://h/8470/s",
        "http://h-8470/s",
        "http://[::1]:8470/s",
        "http://h/.." + "é" * 300,
    ]
    folders = [folder_of(tmp_path, url) for url in urls]
    assert len(set(folders)) == len(urls) and [folder_of(tmp_path, url) for url in urls] == folders
    assert all(f.parent == tmp_path and (f / "url").read_text() == u for f, u in zip(folders, urls, strict=True))


def test_many_begin_a_folder_at_once(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(folder_of(tmp_path / "o", URL))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [path.name for path in found[0].iterdir()] == ["url"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("a file")
    with pytest.raises(StoreWriteError, match="cannot be written: ") as caught:
        folder_of(tmp_path / "o", URL)
    assert "\n" not in str(caught.value)


def test_the_least_used_goes_first_and_never_what_is_to_be_kept(tmp_path: Path) -> None:
    a, b = (folder_of(tmp_path, f"http://h/{name}") for name in "ab")
    oldest, newest, middle = shard(a, "1", 100, 900), shard(a, "2", 100, 100), shard(b, "3", 100, 500)
    index = put(a / INDEX, 100, 700)
    (b / TAUGHT).write_bytes(b"x" * 100)
    assert sum(each.size_bytes for each in fetched(tmp_path)) == 500
    assert trim(tmp_path, 500) == []
    assert [each.path for each in trim(tmp_path, 250, keep=oldest)] == [index, middle, newest]
    assert oldest.exists() and (b / TAUGHT).exists() and not middle.exists()


def test_a_use_is_noted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, URL)
    first, second = shard(folder, "1", 100, 900), shard(folder, "2", 100, 500)
    used(first)
    used(tmp_path / "none")
    assert [each.path for each in trim(tmp_path, 100)] == [second]


def test_what_is_not_ours_is_not_counted_and_stays(tmp_path: Path) -> None:
    mine = shard(tmp_path / "other", "1", 100)
    assert trim(tmp_path, 0) == [] and remove_left(tmp_path) == 0 and mine.exists()
    assert list(fetched(tmp_path / "none")) == []


def test_what_killed_processes_left_goes_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, URL)
    old, young = shard(folder, ".partial-1", 70, 9000), shard(folder, ".partial-2", 100)
    grows = shard(folder, ".partial-3", 100, 9000)
    (grows / "c").write_bytes(b"written a moment ago")
    (folder / f".{TAUGHT}-run-1").touch()
    assert list(fetched(tmp_path)) == [] and remove_left(tmp_path, dry_run=True) == 70 and old.exists()
    assert remove_left(tmp_path) == 70 and not old.exists() and young.exists() and grows.exists()
    monkeypatch.setattr(overlay, "LEFT_S", -1)
    remove_left(tmp_path)
    assert [path.name for path in folder.iterdir() if path.name != STORE] == ["url"]


def test_gc_of_an_overlay_says_what_went_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(overlay, "default_overlay", lambda: tmp_path / "logitstore")
    a, b = (folder_of(tmp_path / "logitstore", f"http://h/{name}") for name in "ab")
    old, kept = shard(a, "1", 700, 900), shard(b, "2", 600)

    def run(*words: object) -> list[str]:
        result = CliRunner().invoke(logitstore.main, ["gc", "--overlay", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    listed = run("--overlay-gb", "0.000001", "--dry-run")
    assert old.exists() and listed[:2] == [
        "http://h/a: 700 bytes to free, 0 stay",
        "http://h/b: 0 bytes to free, 600 stay",
    ]
    assert run("--overlay-gb", "0.000001")[-1] == f"{tmp_path / 'logitstore'}: 700 bytes freed, 600 stay"
    assert not old.exists() and kept.exists()
    assert run(tmp_path / "logitstore", "--overlay-gb", 0)[-1].endswith(": 600 bytes freed, 0 stay")
    assert run()[-1].endswith(": 0 bytes freed, 0 stay") and gc_overlay(tmp_path / "none", 0).gone == []


def test_gc_without_a_store_says_what_to_type() -> None:
    for words, expected in (([], "--overlay"), (["--overlay", "--overlay-gb", "nan"], "expected a number")):
        result = CliRunner().invoke(logitstore.main, ["gc", *words])
        assert result.exit_code == 2 and expected in result.output
