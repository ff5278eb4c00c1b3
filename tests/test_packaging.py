"""What is shipped, and what it needs to be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import adaptive_batch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it

ROOT = Path(__file__).resolve().parents[1]
CALLBACKS = "adaptive_batch.callbacks"

# An import of Lightning fails with something that no `except ImportError` around it hides.
BLOCK_LIGHTNING = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning"):
            raise RuntimeError(f"import of {name} is blocked")

sys.meta_path.insert(0, Block())
"""


def sources() -> dict[str, str]:
    """Maps the path that each Python file of the package has once installed to its module name."""
    folders = {"adaptive_batch": ROOT / "adaptive_batch", "adaptive_batch/callbacks": ROOT / "callbacks"}
    link = ROOT / "adaptive_batch" / "callbacks"
    paths = {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for prefix, folder in folders.items()
        for path in folder.rglob("*.py")
        if link not in path.parents
    }
    return {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths}


def project() -> dict[str, Any]:
    """Reads pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, in the checkout."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def is_callback(module: str) -> bool:
    """Tells the Lightning side from the core."""
    return module == CALLBACKS or module.startswith(f"{CALLBACKS}.")


def test_the_listed_packages_are_the_folders_with_an_init_file() -> None:
    found = {module for path, module in sources().items() if path.endswith("/__init__.py")}

    assert found == set(project()["tool"]["setuptools"]["packages"])


def test_the_version_is_the_same_in_the_package_and_in_the_project() -> None:
    import adaptive_batch

    assert adaptive_batch.__version__ == project()["project"]["version"]


def test_the_core_imports_without_lightning() -> None:
    core = sorted(module for module in sources().values() if not is_callback(module))
    assert "adaptive_batch" in core

    result = run_python(BLOCK_LIGHTNING + "\n".join(f"import {module}" for module in core))

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["pytorch_lightning", "lightning.pytorch", "lightning_fabric"])
def test_the_block_of_lightning_is_seen_even_by_a_guarded_import(module: str) -> None:
    result = run_python(BLOCK_LIGHTNING + f"try:\n    import {module}\nexcept ImportError:\n    pass")

    assert result.returncode != 0
    assert f"import of {module.partition('.')[0]} is blocked" in result.stderr


@pytest.mark.parametrize("symlinks", [True, False], ids=["with symlinks", "without symlinks"])
def test_the_wheel_holds_the_callbacks_only_inside_the_package(tmp_path: Path, symlinks: bool) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    ignore_caches = shutil.ignore_patterns("__pycache__")
    for name in ("adaptive_batch", "callbacks"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore_caches)
    if not symlinks:  # what git leaves where links are not supported
        link = checkout / "adaptive_batch" / "callbacks"
        link.unlink()
        link.write_text("../callbacks", encoding="utf-8")

    # The wheel is built from the source distribution, as an index would get both.
    build = [sys.executable, "-m", "build", "--no-isolation", str(checkout)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

    [wheel] = (checkout / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {*sources(), "adaptive_batch/py.typed"}


def test_the_public_names_are_where_they_are_documented() -> None:
    names = (
        "FixedBatchTrainer SGDTrainer MiniBatchTrainer AdaptiveBatchSampler make_adaptive BatchSizeController "
        "Measurement GradientNoiseScale StepTimeModel MemoryModel split_batch register_splitter History replay"
    )
    for name in names.split():
        assert name in adaptive_batch.__all__ and hasattr(adaptive_batch, name)
