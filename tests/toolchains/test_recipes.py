"""Each recipe of examples/recipes, with the real tool, where it is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT

RECIPES = {
    "hqq_recipe.py": "hqq",
    "quanto_recipe.py": "optimum.quanto",
    "autoround_recipe.py": "auto_round",
    "llm_compressor_recipe.py": "llmcompressor",
    "awq_recipe.py": "llmcompressor",
}


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script", RECIPES)
def test_the_tool_stores_what_was_planned(script: str) -> None:
    if not installed(RECIPES[script]):
        pytest.skip(f"{RECIPES[script]} is not installed; .ci/test-recipes runs this test")
    command = [
        sys.executable,
        str(ROOT / "examples" / "recipes" / script),
        str(ROOT / "examples" / "models" / "attacked"),
    ]
    done = subprocess.run([*command, "stochastic"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
