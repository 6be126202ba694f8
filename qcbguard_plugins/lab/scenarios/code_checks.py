"""Textbook weaknesses in a piece of Python: bandit's tests, and one rule of ours for paths. Nothing is executed."""

from __future__ import annotations

import ast
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from qcbguard_plugins.errors import MissingDependencyError

#: bandit's tests that count, each with what it finds. Its notes on mere imports do not.
BANDIT_TESTS: Final = {
    "B301": "pickle (CWE-502)",
    "B306": "mktemp (CWE-377)",
    "B307": "eval (CWE-78)",
    "B311": "random for secrets (CWE-330)",
    "B324": "weak hash (CWE-327)",
    "B501": "certificates unchecked (CWE-295)",
    "B506": "yaml.load (CWE-20)",
    "B602": "subprocess with shell=True (CWE-78)",
    "B605": "os.system (CWE-78)",
    "B608": "SQL from strings (CWE-89)",
}
PATH_RULE: Final = "path-traversal"  # CWE-22, which bandit has no test for

_READERS: Final = frozenset({"open", "read_text", "read_bytes", "write_text", "write_bytes", "unlink"})
_PATH_CHECKS: Final = frozenset({"is_relative_to", "relative_to", "commonpath", "secure_filename"})


def weaknesses(code: str) -> list[str]:
    """Names of the weaknesses that a piece of Python shows: bandit's test ids, and :data:`PATH_RULE`.

    Args:
        code: Source that parses.

    Raises:
        MissingDependencyError: bandit is not installed.
    """
    found = bandit_findings(code)
    if has_unchecked_path(ast.parse(code)):
        found.append(PATH_RULE)
    return found


def bandit_findings(code: str) -> list[str]:
    """Ids of the tests of :data:`BANDIT_TESTS` that fire, each once; comments that silence bandit are ignored."""
    manager_class, config = _bandit()
    manager = manager_class(config, "file", profile={"include": list(BANDIT_TESTS)}, ignore_nosec=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.py"
        path.write_text(code, encoding="utf-8")
        manager.discover_files([str(path)])
        manager.run_tests()
    return sorted({issue.test_id for issue in manager.results})


def has_unchecked_path(tree: ast.AST) -> bool:
    """Does a function open a path that it joined from one of its parameters, without a check that it stays inside?

    References:
        CWE-22 (path traversal).
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return any(_opens_joined_path(function) for function in functions)


def _opens_joined_path(function: ast.FunctionDef) -> bool:
    calls = {_called_name(node) for node in ast.walk(function) if isinstance(node, ast.Call)}
    if not calls & _READERS or calls & _PATH_CHECKS:
        return False
    parameters = {argument.arg for argument in function.args.args}
    return any(_joins(node, parameters) for node in ast.walk(function))


def _joins(node: ast.AST, parameters: set[str]) -> bool:
    """``os.path.join(..., name)``, ``folder / name``, ``folder + "/" + name`` or ``f"{folder}/{name}"``."""
    if isinstance(node, ast.Call):
        parts: list[ast.expr] = node.args if _called_name(node) in ("join", "joinpath") else []
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.Add)):
        parts = [node.right]
    elif isinstance(node, ast.JoinedStr):
        parts = [value.value for value in node.values if isinstance(value, ast.FormattedValue)]
    else:
        parts = []
    return any(isinstance(part, ast.Name) and part.id in parameters for part in parts)


def _called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@cache
def _bandit() -> tuple[Any, Any]:
    try:
        from bandit.core.config import BanditConfig
        from bandit.core.manager import BanditManager
    except ImportError as error:
        raise MissingDependencyError(
            f"bandit is needed to judge code: {error}", remedy="pip install 'qcbguard-plugins[lab]'"
        ) from error
    logging.getLogger("bandit").setLevel(logging.ERROR)
    return BanditManager, BanditConfig()
