"""What the two distributions put into an environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "qcbguard_plugins", "integrations")


def build(tmp_path: Path, subfolder: str = "") -> list[str]:
    """Names in the wheel that pip builds from a copy of the sources, its own metadata left out."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path]
    done = subprocess.run([*map(str, command), str(source / subfolder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


@pytest.fixture(autouse=True)
def _needs_setuptools() -> None:
    pytest.importorskip("setuptools", reason="the wheels are built without downloads")


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """A folder named "optimum" would make transformers' is_optimum_available() true, and break its GPTQ."""
    names = build(tmp_path)
    assert {name.split("/")[0] for name in names} == {"qcbguard_plugins"}
    assert "qcbguard_plugins/__init__.py" in names and "qcbguard_plugins/py.typed" in names


def test_the_commands_of_optimum_are_a_wheel_of_their_own(tmp_path: Path) -> None:
    assert build(tmp_path, "integrations/optimum") == ["optimum/commands/register/register_qcbguard.py"]


def test_the_commands_bring_optimum_with_them() -> None:
    project = tomllib.loads((ROOT / "integrations" / "optimum" / "pyproject.toml").read_text())["project"]
    assert {"qcbguard-plugins", "optimum>=2.1"} == set(project["dependencies"])
