"""What the lab measured, as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from qcbguard_plugins.lab.bench.one_folder import EvaluationReport
from qcbguard_plugins.lab.bench.output import places_of
from qcbguard_plugins.lab.bench.profile import BenchProfile
from qcbguard_plugins.lab.bench.results import BenchReport
from qcbguard_plugins.lab.bench.summary import summarize
from qcbguard_plugins.lab.bench.tables import COMPACT_COLUMNS, asr_rows, compact_cells


def evaluation_table(report: EvaluationReport) -> Table:
    """The cells of one model; the JSON report has the rest."""
    table = Table(*COMPACT_COLUMNS, title=report.scenario, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for line in summarize(report.cells):
        table.add_row(*compact_cells(line))
    return table


def summary_table(report: BenchReport, profile: BenchProfile) -> Table:
    """Attack success rates: a line for each row and format, a column for each defense."""
    lines = summarize(report.cells)
    names = [entry.name for entry in profile.defenses]
    columns, rows = asr_rows(lines, places_of(lines, profile), names, intervals=False)
    table = Table(*columns, title="attack success rate, percent", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
