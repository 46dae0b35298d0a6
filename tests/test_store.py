"""A store is opened, read and verified through `import logitstore` where MLX does not exist."""

import subprocess
import sys
from pathlib import Path

import pytest

import logitstore
from tests.stores import small_store

ROOT = Path(__file__).parent.parent

BLOCKED = """
import sys

class NoMlx:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlx", "mlx_lm", "distill_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoMlx())
"""

READ = """
import logitstore
from logitstore.inspect import inspect
from logitstore.info import info, to_text
from logitstore.verify import verify
from pathlib import Path

store = logitstore.open_store(sys.argv[1])
token_ids, targets = store.document(1)
again = store.get(token_ids)
assert isinstance(again, logitstore.SparseTargets) and (again.weights == targets.weights).all()
assert store.get([1, 2, 3]) is None
assert len(list(inspect(store, 0))) == 2 + len(store.document(0)[1])
assert "threshold:4" in to_text(info(store), sys.argv[1])
assert verify(Path(sys.argv[1]), quiet=True).problems == []
print(len(store), store.positions)
"""


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_store_is_read_and_verified_where_mlx_cannot_be_imported(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    assert python(BLOCKED + READ, tmp_path / "s") == "6 72\n"


def test_import_logitstore_loads_nothing_heavy() -> None:
    loaded = python("import sys, logitstore; print(*sys.modules)").split()
    assert not {"mlx", "zarr", "numpy", "mlx_lm", "transformers", "datasets", "distill_kernels"} & set(loaded)


def test_what_is_promised_is_there_and_nothing_else() -> None:
    assert sorted(logitstore.__all__) == ["LogitstoreError", "SparseTargets", "open_store"]
    assert all(hasattr(logitstore, name) for name in logitstore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        logitstore.nothing  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{logitstore.__version__}"\n' in text
