"""A URL is no path on this machine: nothing is written into a folder called `http:`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from distill_cli.logitstore import main
from tests.stores import small_store

URL = "http://127.0.0.1:8470/s"


@pytest.mark.parametrize(
    "args",
    [
        ("build", "--teacher", "t", "--dataset", "d", "--out", URL),
        ("convert", "s.zarr", URL),
        ("merge", "s.zarr", URL),
        ("gc", URL),
        ("verify", URL, "--repair"),
    ],
)
def test_a_command_that_works_on_this_machine_refuses_a_url(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_store(Path("s.zarr"))
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and f"{URL} is a URL" in result.stderr and "type " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(
    ("args", "word"),
    [(("info", "127.0.0.1:8470/s"), "http://127.0.0.1:8470/s"), (("gc", "--overlay", "none"), "no folder none")],
)
def test_what_is_nearly_right_is_told_what_is(args: tuple[str, ...], word: str) -> None:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and word in result.stderr
