"""Defenses of a profile that differ in one parameter, or in two: lines and maps of a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.profile import DefenseEntry

_SHORTEST_SWEEP = 3


@dataclass(frozen=True)
class Sweep:
    """One method along one parameter.

    Attributes:
        method: Its name.
        parameter: The parameter.
        points: Its values, rising, with the name of the defense in the table.
    """

    method: str
    parameter: str
    points: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ParameterGrid:
    """One method on a grid of two parameters.

    Attributes:
        method: Its name.
        x: Name of the first parameter.
        y: Name of the second.
        points: Names of defenses by both values.
    """

    method: str
    x: str
    y: str
    points: dict[tuple[float, float], str]


def find_grids(entries: Sequence[DefenseEntry]) -> list[ParameterGrid]:
    """Full grids of at least two values by two."""
    grids = []
    for (method, free, _), members in _families(entries, 2).items():
        points = {(values[0], values[1]): name for values, name in members}
        sizes = [len({key[axis] for key in points}) for axis in (0, 1)]
        if min(sizes) > 1 and len(points) == sizes[0] * sizes[1]:
            grids.append(ParameterGrid(method, free[0], free[1], points))
    return grids


def find_sweeps(entries: Sequence[DefenseEntry]) -> list[Sweep]:
    """Runs of at least three values of one parameter, the others fixed; those inside a grid are left out."""
    gridded = {name for grid in find_grids(entries) for name in grid.points.values()}
    rest = [entry for entry in entries if entry.name not in gridded]
    sweeps = []
    for (method, free, _), members in _families(rest, 1).items():
        points = {values[0]: name for values, name in members}
        if len(points) >= _SHORTEST_SWEEP:
            sweeps.append(Sweep(method, free[0], tuple(sorted(points.items()))))
    return sweeps


_Family = tuple[str, tuple[str, ...], str]


def _families(entries: Sequence[DefenseEntry], num_free: int) -> dict[_Family, list[tuple[tuple[float, ...], str]]]:
    """Defenses by method, free parameters and the values of all others."""
    families: dict[_Family, list[tuple[tuple[float, ...], str]]] = {}
    for entry in entries:
        defense = parse_defense(entry.spec)
        parameters = defense.parameters()
        numeric = [k for k, v in parameters.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        for free in combinations(numeric, num_free):
            fixed = json.dumps({k: v for k, v in parameters.items() if k not in free}, sort_keys=True)
            values = tuple(float(parameters[name]) for name in free)
            families.setdefault((defense.name, free, fixed), []).append((values, entry.name))
    return families
