"""Every target reads its seeds, and raises nothing but the package's errors on some hundred changed ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hostile.fuzz.registry import MAX_BYTES
from tests.hostile.fuzz.targets import TARGETS

_NUM_INPUTS = {"config": 30, "manifest": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_raise_nothing_else(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    prepared = target.prepare(tmp_path)
    for seed in prepared.seeds:
        assert prepared.run(seed) is None
    rng = random.Random(0)
    for _ in range(_NUM_INPUTS.get(name, 150)):
        prepared.run(target.mutate(rng.choice(prepared.seeds), MAX_BYTES, rng))


def test_the_fuzzer_runs_every_target(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install 'qcbguard-plugins[fuzz]'")
    figures = tmp_path / "figures.json"
    command = [
        "-m",
        "tests.hostile.fuzz.run",
        "all",
        "--minutes",
        "0.01",
        "--work-dir",
        str(tmp_path),
        "--json",
        str(figures),
    ]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(figures.read_text())
    assert found.keys() == TARGETS.keys()
    assert all(figure["executions"] and figure["edges"] for figure in found.values())
