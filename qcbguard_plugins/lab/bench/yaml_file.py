"""Read a YAML file into a strict model; what is wrong with it is told with its line and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qcbguard_plugins.errors import UsageError

_M = TypeVar("_M", bound=BaseModel)
_Place = tuple[str | int, ...]


def read_yaml(path: Path, model: type[_M], complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> _M:
    """Read a file.

    Args:
        path: The file.
        model: What it must be.
        complete: Adds to the values of the file before they are checked.

    Raises:
        UsageError: It cannot be read, is not YAML, names a key twice, or is not what the model wants; each problem is
            named with its line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} holds no keys")
    lines: dict[_Place, int] = {}
    repeated = _visit(root, (), lines)
    if repeated:
        raise UsageError(f"{path.name} names a key twice", details=repeated)
    try:
        return model.model_validate(complete(values) if complete else values)
    except ValidationError as error:
        details = [_describe(problem, lines) for problem in error.errors(include_url=False)]
        raise UsageError(f"{path.name} has {len(details)} problems", details=list(dict.fromkeys(details))) from error


def _visit(node: Any, place: _Place, lines: dict[_Place, int]) -> list[str]:
    """Note the line of every value; return keys that stand twice in one mapping."""
    lines[place] = node.start_mark.line + 1
    repeated: list[str] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                repeated.append(f"line {key.start_mark.line + 1}: {key.value}")
            seen.add(key.value)
            repeated += _visit(value, (*place, key.value), lines)
            lines[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            repeated += _visit(value, (*place, number), lines)
    return repeated


def _describe(problem: Any, lines: dict[_Place, int]) -> str:
    """One problem with the line of the nearest value that stands in the file.

    Pydantic's places name the members of unions too, which no file has.
    """
    place: _Place = ()
    for step in problem["loc"]:
        if (*place, step) in lines:
            place = (*place, step)
    name = ".".join(map(str, place))
    last = problem["loc"][-1] if problem["loc"] else ""
    missing = f".{last}" if problem["type"] == "missing" else ""
    message = problem["msg"].removeprefix("Value error, ")
    return f"line {lines[place]}: {name}{missing}: {message}" if name or missing else message
