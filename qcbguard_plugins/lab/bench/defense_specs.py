"""Defenses as a profile spells them: ``feedback``, ``flipguard(share=0.1)``."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from qcbguard_plugins.defenses import Defense, get_defense
from qcbguard_plugins.errors import UsageError

_PACKAGE = Defense.__module__.rpartition(".")[0]
_SPEC = re.compile(r"\s*(?P<name>[a-z][a-z0-9_-]*)\s*(?:\((?P<parameters>.*)\))?\s*")
_PARAMETER = re.compile(r"\s*(?P<key>[a-z_][a-z0-9_]*)\s*=\s*(?P<value>.+?)\s*")


def parse_defense(spec: str) -> Defense:
    """Build a defense from its spelling.

    Args:
        spec: A method's name, with parameters in parentheses where they differ from the defaults; the values are JSON.

    Raises:
        UsageError: It is not spelled so, the method or a parameter is unknown, or a value is out of range.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec!r} is no defense", remedy="For example: feedback, or flipguard(share=0.1)")
    parameters: dict[str, Any] = {}
    for part in filter(str.strip, (match["parameters"] or "").split(",")):
        parameter = _PARAMETER.fullmatch(part)
        try:
            if parameter is None or parameter["key"] in parameters:
                raise ValueError
            parameters[parameter["key"]] = json.loads(parameter["value"])
        except ValueError as error:
            raise UsageError(f"{spec!r}: {part.strip()!r} is not name=value", remedy="Values are JSON.") from error
    return get_defense(match["name"], **parameters)


def signature(defense: Defense) -> dict[str, Any]:
    """What a cached result of a defense depends on: its name, its parameters, and the code that it is made of.

    The code is the module of its class and all that it imports from the package of defenses, without the words that are
    only for people.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(type(defense).__module__, set())):
        digest.update(ast.dump(_without_words(ast.parse(path.read_text(encoding="utf-8")))).encode())
    return {"method": defense.name, "parameters": defense.parameters(), "source_sha256": digest.hexdigest()}


def _without_words(tree: ast.Module) -> ast.Module:
    """A module without docstrings and decorators, which register a method and describe it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            body = node.body
            first = body[0] if body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                body[0] = ast.Pass()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            node.decorator_list = []
    return tree


def _sources(module: str, seen: set[Path]) -> set[Path]:
    """Files of a module and of what it imports from the package of defenses, the contract of all of them left out."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or Path(found.origin) in seen:
        return seen
    path = Path(found.origin)
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        imported = node.module if isinstance(node, ast.ImportFrom) else None
        if imported and imported.startswith(f"{_PACKAGE}.") and imported != Defense.__module__:
            _sources(imported, seen)
    return seen
