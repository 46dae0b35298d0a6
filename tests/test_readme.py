"""The README's file tree is the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (
    "logitstore",
    "logitstore/foreign",
    "logitstore/service",
    "logitstore/service/page",
    "kernels/distill_kernels",
    "trainer/distill_trainer",
    "cli/distill_cli",
    "tools",
    "tools/recipes",
)


def test_the_file_tree_names_every_file_and_no_other() -> None:
    tree = README.partition("## Files")[2]
    for folder in FOLDERS:
        section = re.search(rf"^{folder}/.*\n((?:  .*\n)+)", tree, re.MULTILINE)
        assert section, folder
        named = {line.split()[0] for line in section[1].splitlines()}
        assert named - {"metal_emulator/", "screenshots/"} == {
            f.name for f in (ROOT / folder).iterdir() if f.is_file() and f.name != "__init__.py"
        }


def test_it_opens_with_the_two_commands() -> None:
    first = re.findall(r"^tools/\w+", README[:400], re.MULTILINE)
    assert first == ["tools/demo", "tools/check"]
    assert all((ROOT / command).stat().st_mode & 0o100 for command in first)
