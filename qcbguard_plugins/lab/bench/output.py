"""Write what a benchmark found: JSON, a Markdown page, plots."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qcbguard_plugins.errors import MissingDependencyError, TargetExistsError
from qcbguard_plugins.lab.bench.parameter_sweeps import find_grids, find_sweeps
from qcbguard_plugins.lab.bench.plots import Place, Plot, draw_grid, draw_rows, draw_strength, draw_tradeoff
from qcbguard_plugins.lab.bench.profile import BenchProfile
from qcbguard_plugins.lab.bench.results import BenchReport, Machine
from qcbguard_plugins.lab.bench.summary import Line, summarize
from qcbguard_plugins.lab.bench.tables import asr_rows, detail_table, markdown, method_rows
from qcbguard_plugins.lab.loading import FULL_PRECISION

if TYPE_CHECKING:
    pass

RESULTS_FILE, PAGE_FILE = "results.json", "results.md"
_MAX_PANELS = 30


def require_own_folder(out_dir: Path, profile: BenchProfile) -> None:
    """Refuse a folder with anything in it but an earlier result of this profile.

    Raises:
        TargetExistsError: It holds something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    report = read_report(out_dir / RESULTS_FILE)
    if report is None or report.profile.get("name") != profile.name:
        raise TargetExistsError(
            f"{out_dir} exists and holds no result of {profile.name}", remedy="Name a new folder with --out."
        )


def read_report(path: Path) -> BenchReport | None:
    """An earlier result; ``None`` where there is none that can be read."""
    try:
        return BenchReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_results(report: BenchReport, profile: BenchProfile, out_dir: Path) -> None:
    """Write ``results.json``, ``results.md`` and the plots, in place of those of an earlier run."""
    out_dir.mkdir(parents=True, exist_ok=True)
    # First, because it makes the folder ours: a run that is stopped while it draws can be run again.
    _replace(out_dir / RESULTS_FILE, report.model_dump_json(indent=1) + "\n")
    _replace(out_dir / PAGE_FILE, render_page(report, profile, draw_all(report, profile, out_dir)))


def draw_all(report: BenchReport, profile: BenchProfile, out_dir: Path, prefix: str = "") -> list[Plot]:
    """Draw every plot that the cells give; the names of their files begin with the prefix."""
    target = (out_dir, prefix)
    lines = summarize(report.cells)
    places = places_of(lines, profile)
    sweeps, grids = find_sweeps(profile.defenses), find_grids(profile.defenses)
    swept = {name for sweep in sweeps for _, name in sweep.points} | {n for g in grids for n in g.points.values()}
    shown = [entry.name for entry in profile.defenses if entry.name not in swept or entry.name == profile.recommended]
    figures = [draw_strength(lines, places, sweeps, target)]
    # A single method beside sweeps is no comparison.
    if shown and not (swept and len(shown) == 1):
        figures.insert(0, draw_tradeoff(lines, groups_of(places, profile), shown, target))
        figures.insert(1, draw_rows(lines, places[:_MAX_PANELS], shown, target))
    figures += [draw_grid(lines, place, grid, target) for grid in grids for place in places]
    return [figure for figure in figures if figure is not None]


def places_of(lines: Sequence[Line], profile: BenchProfile) -> list[Place]:
    """Rows and formats with an attacked model, in the order of the profile."""
    found = {(line.row, line.format) for line in lines if line.variant == "attacked" and line.format != FULL_PRECISION}
    return [(row, name) for row in profile.row_names for name in profile.formats_of(row) if (row, name) in found]


def groups_of(places: Sequence[Place], profile: BenchProfile) -> dict[str, Sequence[Place]]:
    """Rows whose attacker knows the defense apart from the others."""
    adaptive = [place for place in places if profile.row_of(place[0]).adaptive]
    return {"plain attacks": [place for place in places if place not in adaptive], "adaptive attacks": adaptive}


def render_page(report: BenchReport, profile: BenchProfile, figures: Sequence[Plot]) -> str:
    """The Markdown page."""
    lines = summarize(report.cells)
    places = places_of(lines, profile)
    return render(
        "results.md.j2",
        name=profile.name,
        summary=profile.summary,
        num_cells=len(report.cells),
        num_failed=report.num_failed,
        machine=describe_machine(report.machine),
        commits=", ".join(commits_of(report)) or "no commit: not run from a checkout",
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        notices=report.notices,
        checks=report.checks,
        missed=[check for check in report.checks if not check.held],
        num_held=sum(check.held for check in report.checks),
        matrix=markdown(*asr_rows(lines, places, [entry.name for entry in profile.defenses])),
        methods=markdown(*method_rows(lines, groups_of(places, profile), [e.name for e in profile.defenses])),
        figures=figures,
        sections=[{"title": f"{row}, {name}", "table": detail_table(lines, row, name)} for row, name in places],
        failures=[cell for cell in report.cells if cell.measurement is None],
    )


def render(template: str, **values: object) -> str:
    """Fill one of the package's templates.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("the page needs jinja2", remedy="pip install 'qcbguard-plugins[lab]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qcbguard_plugins.lab.bench"),
        autoescape=False,  # noqa: S701  Markdown, not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def describe_machine(machine: Machine) -> str:
    """Processor, cores, GPU."""
    cores = "1 core" if machine.num_cores == 1 else f"{machine.num_cores} cores"
    return f"{cores}, {machine.processor}, {machine.gpu or 'no GPU'}"


def commits_of(report: BenchReport) -> list[str]:
    """The commits that the cells were measured at."""
    return list(dict.fromkeys(cell.commit for cell in report.cells if cell.commit))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
