"""The record of a purification as a table for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcbguard_plugins._util.memory import human_bytes
from qcbguard_plugins.cli.render.text import human_seconds
from qcbguard_plugins.purification.report import PurifyPlanReport, PurifyReport

_WORDS = {"channel": "MLP channels", "head": "attention heads", "rank": "rank components of the adapter"}


def render_plan(report: PurifyPlanReport) -> Group:
    """What a purification would train and change, and what that takes."""
    lines = [
        f"{report.num_suppressed[kind]} of {total} {_WORDS[kind]} will be suppressed"
        for kind, total in report.num_units.items()
    ]
    lines += [
        f"{report.num_trainings} trainings, {report.num_steps} steps; {report.num_trained} of {report.num_parameters} "
        f"parameters of {report.source} ({report.architecture}) are trained",
        f"memory about {human_bytes(report.memory_bytes)} and what a batch of {report.batch_size} takes; "
        f"at most {human_bytes(report.disk_bytes)} of disk until the end",
    ]
    return Group(Text("\n".join(lines)))


def render_purification(report: PurifyReport) -> Group:
    """What was suppressed where, and what each stage took."""
    table = Table(box=None, pad_edge=False)
    for column in ("place", "suppressed", "of"):
        table.add_column(column, overflow="fold", justify="left" if column == "place" else "right")
    for group in report.groups:
        if group.suppressed:
            table.add_row(group.name, str(len(group.suppressed)), str(group.num_units))
    lines = [f"left out, weights in another form: {name}" for name in report.left_out]
    for stage in report.stages:
        memory = "" if stage.peak_bytes is None else f", {human_bytes(stage.peak_bytes)} at the peak"
        gpu = "" if stage.peak_gpu_bytes is None else f", {human_bytes(stage.peak_gpu_bytes)} on the accelerator"
        lines.append(f"{stage.name}  {human_seconds(stage.elapsed_s)}{memory}{gpu}")
    if not report.variants:
        lines.append("healed, with nothing suppressed")
    for kind in dict.fromkeys(group.kind for group in report.groups if report.variants):
        suppressed, total = report.count(kind)
        lines.append(f"{suppressed} of {total} {_WORDS[kind]} suppressed, found by {len(report.variants)} variants")
    return Group(table, Text("\n".join(lines)))
