"""What fuzzing has found of ways into the readers, tried again: no error comes out but ours (`tools/fuzz_store.py`)."""

from pathlib import Path

import pytest

from tests import hostile

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.iterdir() if path.is_file())
GROUPS = 8


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("group", range(GROUPS))
def test_a_store_that_means_harm_does_none(group: int, tmp_path: Path) -> None:
    for path in INPUTS[group::GROUPS]:
        try:
            hostile.try_to_harm(path.read_bytes(), tmp_path)
        except BaseException as error:
            error.add_note(f"input: tests/corpus/{path.name}")
            raise


def test_the_corpus_is_there_and_small() -> None:
    assert len(INPUTS) > 50 and sum(path.stat().st_size for path in INPUTS) < 300_000
