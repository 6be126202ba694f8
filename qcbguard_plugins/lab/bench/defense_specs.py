"""Defenses as a profile spells them: ``feedback``, ``flipguard(share=0.1)``."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

from qcbguard_plugins.defenses import Defense, get_defense
from qcbguard_plugins.errors import UsageError

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

    The code is the module of its class, and all of the package that the module is in where a method has one of its own.
    """
    path = Path(inspect.getfile(type(defense)))
    own_package = path.parent != Path(inspect.getfile(Defense)).parent
    files = sorted(path.parent.rglob("*.py")) if own_package else [path]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"method": defense.name, "parameters": defense.parameters(), "source_sha256": digest}
