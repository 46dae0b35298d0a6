"""What the losses and the fused head cost beside the same mathematics written as people write it.

    .venv/bin/python tools/bench_kernels.py OUT_DIR [--only fused_head]

Each section is a module `tools.bench_SECTION` with `measure()`, which gives JSON values from processes of their own,
and `found(measured)`, which makes tables and targets of them. Writes OUT_DIR/bench_kernels.{txt,json}. The fused head
takes about 6 minutes of one core and 14 GB of memory, which plain dense KL needs at V = 151,936.
"""

import argparse
import json
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from tools.bench_parts import Found, Measured
from tools.bench_store import target_table

SECTIONS = ("fused_head",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    arguments = parser.parse_args()
    sections = arguments.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; expected some of {','.join(SECTIONS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    subtitle = f"MLX {version('mlx')} on {platform.system()} {platform.machine()}, one core"
    measured: dict[str, Measured] = {}
    every: list[Found] = []
    for section in sections:
        module = import_module(f"tools.bench_{section}")
        measured[section] = module.measure()
        every.append(module.found(measured[section]))
    verdict = target_table([target for found in every for target in found.targets])
    text = "\n".join(titled.text() for titled in (*(t for found in every for t in found.tables), verdict))
    print(f"{subtitle}\n\n{text}")
    (arguments.out / "bench_kernels.txt").write_text(f"{subtitle}\n\n{text}", encoding="utf-8")
    (arguments.out / "bench_kernels.json").write_text(json.dumps({"run": subtitle, **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
