"""The file that Optimum imports at every start of its command line breaks nothing."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

REGISTER = ROOT / "integrations" / "optimum" / "optimum" / "commands" / "register" / "register_qcbguard.py"


def registered() -> list[Any]:
    spec = importlib.util.spec_from_file_location("register_qcbguard", REGISTER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.REGISTER_COMMANDS)


def test_without_optimum_there_are_no_commands() -> None:
    # Of the package "optimum" there may be our own part of its namespace.
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.commands.base"):
        pytest.skip("Optimum is installed; its own tests look at the commands")
    assert registered() == []


def test_a_defect_of_ours_leaves_the_other_commands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("qcbguard_plugins.cli.optimum")
    broken.commands = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    with pytest.warns(UserWarning, match="not available"):
        assert registered() == []


def test_the_namespace_stays_open_for_others() -> None:
    """An ``__init__.py`` there would hide the commands of every other package."""
    assert not list(Path(ROOT / "integrations" / "optimum").rglob("__init__.py"))
