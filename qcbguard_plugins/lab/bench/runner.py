"""Run a benchmark cell by cell. Every cell is kept under a name made of all that it depends on.

A run that was stopped goes on where it was, one more defense costs only its own cells, and two runs with one cache
share their work. A cell that fails is recorded with its error; the others go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.errors import QcbguardError, UsageError
from qcbguard_plugins.lab.bench.defense_specs import parse_defense, signature
from qcbguard_plugins.lab.bench.expectations import NOT_MEASURED, check_all
from qcbguard_plugins.lab.bench.profile import BenchProfile, DefenseEntry
from qcbguard_plugins.lab.bench.results import (
    FULL,
    STOCK,
    BenchReport,
    Cell,
    Place,
    Variant,
    commit_of_checkout,
    this_machine,
)
from qcbguard_plugins.lab.bench.rows import Subject, exam_digest, folder_digest, is_made, make_subject
from qcbguard_plugins.lab.evaluation import METRIC_VERSION, Measurement, evaluate, read_reference
from qcbguard_plugins.lab.loading import FULL_PRECISION
from qcbguard_plugins.lab.specs import FolderEntry
from qcbguard_plugins.lab.token_probabilities import Reading
from qcbguard_plugins.pipeline.settings import Guard

#: Called with the title of every cell when it is done.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """A cell to be measured, and the defense that it is measured behind."""

    place: Place
    defense: DefenseEntry | None = None


def run_bench(
    profile: BenchProfile,
    cache_dir: Path,
    *,
    only: str = "*",
    cached: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Run a benchmark.

    Args:
        profile: What to measure.
        cache_dir: Where models and cells are kept between runs.
        only: Pattern of the rows to run.
        cached: Make and measure nothing: report what earlier runs left, and say in a notice what is missing.
        progress: Called with the title of every cell when it is done.

    Raises:
        UsageError: The pattern matches no row.
    """
    start = time.monotonic()
    rows, notices = _rows(profile, only)
    cells: list[Cell] = []
    bench = _Bench(profile, cache_dir, cached=cached)
    for row in rows:
        for seed in profile.row_of(row).seeds:
            for cell in bench.run(row, seed):
                cells.append(cell)
                if progress is not None:
                    progress(cell.place.title)
    if cached:
        missing = [cell.place for cell in cells if cell.measurement is None]
        cells = [cell for cell in cells if cell.measurement is not None]
        rows = [row for row in rows if any(cell.place.row == row for cell in cells)]
        if missing:
            notices.append(_what_is_missing(missing, [cell.place for cell in cells]))
    return BenchReport(
        versions=versions(),
        machine=this_machine(),
        profile=profile.model_dump(mode="json"),
        notices=notices,
        cells=cells,
        checks=[check for check in check_all(profile, cells, rows) if not (cached and check.found == NOT_MEASURED)],
        elapsed_s=time.monotonic() - start,
    )


def _what_is_missing(missing: Sequence[Place], measured: Sequence[Place]) -> str:
    """Rows of which no attacked model is measured, seeds, and defenses with the rows where they are missing."""
    known = {(place.row, place.seed) for place in measured if place.variant == "attacked" and place.defense == STOCK}
    rows = list(dict.fromkeys(place.row for place in missing))
    absent = [row for row in rows if not any(row == known_row for known_row, _ in known)]
    by_what: dict[str, list[str]] = {}
    for row in rows:
        places = [place for place in missing if place.row == row and row not in absent]
        seeds = sorted({place.seed for place in places if (row, place.seed) not in known})
        rest = [place for place in places if place.seed not in seeds]
        whats = [f"seeds {', '.join(map(str, seeds))}"] if seeds else []
        for variant, suffix in (("attacked", ""), ("clean", " for the clean model")):
            defenses = dict.fromkeys(place.defense for place in rest if place.variant == variant)
            whats += [", ".join(defenses) + suffix] if defenses else []
        for what in whats:
            by_what.setdefault(what, []).append(row)
    parts = [f"all of {', '.join(absent)}"] if absent else []
    parts += [f"{what} on {', '.join(rows)}" for what, rows in by_what.items()]
    return f"{len(missing)} cells are not measured yet: {'; '.join(parts)}"


def num_cells(profile: BenchProfile, only: str = "*") -> int:
    """How many cells :func:`run_bench` will measure."""
    rows, _ = _rows(profile, only)
    return sum(len(list(tasks_of(profile, row, seed))) for row in rows for seed in profile.row_of(row).seeds)


def tasks_of(profile: BenchProfile, row: str, seed: int) -> Iterator[_Task]:
    """The cells of a row and seed: clean and attacked, in full precision, plainly rounded, and behind each defense."""
    entry = profile.row_of(row)
    formats = profile.formats_of(row)
    variants: tuple[Variant, ...] = ("clean", "attacked")
    for variant in variants:
        yield _Task(Place(row=row, variant=variant, format=FULL_PRECISION, defense=FULL, seed=seed))
        for format_name in formats:
            yield _Task(Place(row=row, variant=variant, format=format_name, defense=STOCK, seed=seed))
            if variant == "clean" and not entry.defend_clean:
                continue
            for defense in profile.defenses:
                if defense.applies_to(row, format_name, seed):
                    place = Place(row=row, variant=variant, format=format_name, defense=defense.name, seed=seed)
                    yield _Task(place, defense)


def _rows(profile: BenchProfile, only: str) -> tuple[list[str], list[str]]:
    """The rows to run, and what is said about those that are left out."""
    rows, notices = [], []
    for name in profile.row_names:
        if not fnmatchcase(name, only):
            continue
        entry = profile.row_of(name)
        absent = isinstance(entry, FolderEntry) and not all(map(os.path.exists, (entry.path, entry.clean, entry.pairs)))
        if absent and isinstance(entry, FolderEntry) and entry.optional:
            notices.append(f"{name} is left out: {entry.path} is not on this machine")
        else:
            rows.append(name)
    if not rows:
        raise UsageError(
            f"no row to run: {only!r} matches none that is here", remedy=f"Rows: {', '.join(profile.row_names)}."
        )
    return rows, notices


class _Bench:
    """Measures the cells of one profile."""

    def __init__(self, profile: BenchProfile, cache_dir: Path, *, cached: bool) -> None:
        self._profile = profile
        self._cache_dir = cache_dir
        self._cached = cached
        self._commit = commit_of_checkout()
        self._references: dict[tuple[Path, str], list[Reading]] = {}

    def run(self, row: str, seed: int) -> Iterator[Cell]:
        """Measure all cells of a row and seed."""
        tasks = list(tasks_of(self._profile, row, seed))
        try:
            if self._cached and not is_made(self._profile, row, seed, self._cache_dir):
                raise UsageError("the model is not made yet")
            subject = make_subject(self._profile, row, seed, self._cache_dir)
            digest = exam_digest(subject.exam)
        except Exception as error:  # one model that cannot be made must not cost the others
            yield from (Cell(place=task.place, error=_one_line(error), commit=self._commit) for task in tasks)
            return
        for task in tasks:
            yield self._cell(task, subject, digest)
        self._references.clear()

    def _cell(self, task: _Task, subject: Subject, digest: str) -> Cell:
        folder = subject.folder(task.place.variant)
        key = ""
        try:
            guard = None if task.defense is None else Guard(parse_defense(task.defense.spec), seed=task.place.seed)
            key = _key(folder, digest, task.place.format, guard)
            path = self._cache_dir / "cells" / f"{key}.json"
            cached = _read_cell(path)
            if cached is not None:
                return cached.model_copy(update={"place": task.place, "cached": True})
            if self._cached:
                raise UsageError("not measured yet")
            reference = None if task.place.defense == FULL else self._reference(folder, digest, subject)
            found: Measurement | None = evaluate(folder, task.place.format, subject.exam, guard, reference)
            cell = Cell(place=task.place, key=key, measurement=found, commit=self._commit)
            _write_cell(path, cell)
        except Exception as error:  # recorded, and the run goes on; the exit code tells
            cell = Cell(place=task.place, key=key, error=_one_line(error), commit=self._commit)
        return cell

    def _reference(self, folder: Path, digest: str, subject: Subject) -> list[Reading]:
        if (folder, digest) not in self._references:
            self._references[folder, digest] = read_reference(folder, subject.exam)
        return self._references[folder, digest]


def _key(folder: Path, exam: str, format: str, guard: Guard | None) -> str:
    content: dict[str, Any] = {
        "metric_version": METRIC_VERSION,
        "folder": folder_digest(folder),
        "exam": exam,
        "format": format,
        "guard": None if guard is None else {**guard.describe(), **signature(guard.method)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_cell(path: Path) -> Cell | None:
    """A kept cell; ``None`` where there is none, or one that cannot be read, which is then measured anew."""
    try:
        return Cell.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _write_cell(path: Path, cell: Cell) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(cell.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _one_line(error: Exception) -> str:
    if isinstance(error, QcbguardError):
        return "; ".join([error.summary, *error.details[:2]])
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
