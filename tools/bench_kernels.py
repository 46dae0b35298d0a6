"""What the losses and the fused head cost beside the same mathematics written as people write it.

    .venv/bin/python tools/bench_kernels.py OUT_DIR [--only fused_head,losses]

Each section is a module `tools.bench_SECTION` with `measure()`, which gives JSON values from processes of their own,
and `found(measured)`, which makes tables and targets of them. Writes OUT_DIR/bench_kernels.{txt,json}. On one core of
a Linux machine the fused head takes about 6 minutes and 14 GB of memory, which plain dense KL needs at V = 151,936;
the losses take 2 minutes and 1 GB.

On a Mac the same command measures the losses on both tiers, plain MLX and Metal kernels, on its GPU. That has not been
done yet: please attach OUT_DIR/bench_kernels.json to an issue of the project. It names the chip, memory, macOS and MLX
that the numbers come from, and nothing of you.
"""

import argparse
import json
import os
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from distill_kernels import why

import mlx.core as mx

from tools.bench_parts import Found, Measured
from tools.bench_store import target_table

SECTIONS = ("fused_head", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    arguments = parser.parse_args()
    sections = arguments.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; expected some of {','.join(SECTIONS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    here = machine()
    subtitle = "MLX {mlx} on {chip}, {memory_gb:.0f} GB, {system}; {tier}".format(**here)
    measured: dict[str, Measured] = {}
    every: list[Found] = []
    for section in sections:
        module = import_module(f"tools.bench_{section}")
        measured[section] = module.measure()
        every.append(module.found(measured[section]))
    targets = [target for found in every for target in found.targets]
    verdict = [target_table(targets)] if targets else []
    text = "\n".join(titled.text() for titled in (*(t for found in every for t in found.tables), *verdict))
    print(f"{subtitle}\n\n{text}")
    (arguments.out / "bench_kernels.txt").write_text(f"{subtitle}\n\n{text}", encoding="utf-8")
    (arguments.out / "bench_kernels.json").write_text(
        json.dumps({"run": subtitle, "machine": here, "targets": [vars(t) for t in targets], **measured}, indent=1)
        + "\n"
    )


def machine() -> Measured:
    """What the numbers come from: enough to compare two machines by, and nothing of whose they are."""
    macos = platform.mac_ver()[0]
    return {
        "chip": mx.device_info().get("device_name", platform.machine()),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}",
        "macos": macos,
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "device": str(mx.default_device()),
        "tier": why(),
    }


if __name__ == "__main__":
    main()
