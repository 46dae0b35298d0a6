"""Imports point one way, third parties stay in their place, a fast BLAS is there before MLX: read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "distill_kernels": ROOT / "kernels",
    "logitstore": ROOT,
    "distill_trainer": ROOT / "trainer",
    "distill_cli": ROOT / "cli",
}
MAY_IMPORT = {
    "distill_kernels": set(),
    "logitstore": {"distill_kernels"},
    "distill_trainer": {"logitstore", "distill_kernels"},
    "distill_cli": {"distill_trainer", "logitstore", "distill_kernels"},
}
ONLY_IN = {
    "zarr": {"logitstore.zarr_arrays"},
    "zstandard": {"logitstore.chunks"},
    "lmdb": {"logitstore.lmdb_file"},
    "obstore": {"logitstore.remote_files"},
    "huggingface_hub": {"logitstore.hub"},
    "click": {"distill_cli.*"},
    "mlx_lm": {
        "logitstore.model",
        "logitstore.gguf",
        "distill_trainer.answers",
        "distill_trainer.on_policy",
        "distill_trainer.optimizer",
        "distill_trainer.student",
    },
    "datasets": {"logitstore.documents"},
    "starlette": {"logitstore.service.*"},
    "uvicorn": {"logitstore.service.connections", "logitstore.service.serve"},
    "prometheus_client": {"logitstore.service.meters"},
    "httpx2": {"logitstore.http_client"},
}
NEED_MLX = {
    f"logitstore.{name}"
    for name in (
        "build",
        "device_selection",
        "dry_run",
        "forward",
        "gguf",
        "live",
        "model",
        "teacher",
        "trace",
    )
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package, root in PACKAGES.items()
        for path in sorted((root / package).rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    package = module.partition(".")[0]
    others = {name.partition(".")[0] for name in imports(MODULES[module])} & set(PACKAGES) - {package}
    assert others <= MAY_IMPORT[package]


@pytest.mark.parametrize("third_party", ONLY_IN)
def test_a_third_party_stays_in_its_place(third_party: str) -> None:
    found = {m for m, path in MODULES.items() if third_party in {n.partition(".")[0] for n in imports(path)}}
    allowed = ONLY_IN[third_party]
    assert found and all(m in allowed or f"{m.rpartition('.')[0]}.*" in allowed for m in found), found


def test_the_folders_of_packages_are_no_packages_themselves() -> None:
    for folder in ("kernels", "trainer", "cli"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert [p.name for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"] == [
            next(name for name, root in PACKAGES.items() if root == ROOT / folder)
        ]


IMPORT_EACH = """
import importlib, os, sys

class AtMlx:
    '''Ends the process where MLX is first asked for: 10 if a BLAS was loaded before, else 11.'''

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlx":
            blas = sys.modules.get("distill_kernels.blas")
            os._exit(10 if blas is not None and blas.load.cache_info().currsize else 11)

sys.meta_path.insert(0, AtMlx())
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(module)
        os._exit(0)
    print(module, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_every_module_imported_alone_loads_a_blas_before_mlx_or_no_mlx_at_all() -> None:
    command = [sys.executable, "-c", IMPORT_EACH, *MODULES]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ended = dict(line.split() for line in output.splitlines())
    assert ended.keys() == MODULES.keys()
    assert {module for module, code in ended.items() if code not in ("0", "10")} == set()
    assert {module for module, code in ended.items() if module.startswith("logitstore") and code == "10"} == NEED_MLX
