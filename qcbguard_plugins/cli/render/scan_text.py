"""A scan as text: for a terminal, and as Markdown for a model card."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcbguard_plugins.cli.render.advice import explanation, format_line, headline, next_steps, p_text, printable
from qcbguard_plugins.detection.weights.report import ScanReport, TensorEvidence

_MAX_TENSORS = 8
_MAX_SKIPPED = 20
_STYLES = {"attacked": "bold red", "incomplete": "bold yellow", "clean": "bold"}


def render_scan(report: ScanReport, path: Path | None = None) -> Group:
    """The verdict, a table of formats, and the tensors that stand out; spectral and histogram are excesses.

    Args:
        report: The report.
        path: The model as the user named it.
    """
    parts: list[Text | Table] = [
        Text(headline(report), style=_STYLES[report.verdict]),
        Text(explanation(report)),
        Text(f"{report.coverage}; seed {report.seed}; {report.elapsed_s:.1f} s"),
        Text(""),
        _format_table(report),
    ]
    worst = worst_tensors(report)
    if worst:
        parts += [Text(""), _tensor_table(worst)]
    if report.skipped:
        parts.append(Text("\nNot tested"))
        parts += [Text(f"  {printable(s.name)}  {s.reason}") for s in report.skipped[:_MAX_SKIPPED]]
        if len(report.skipped) > _MAX_SKIPPED:
            parts.append(Text(f"  ... and {len(report.skipped) - _MAX_SKIPPED} more, in the report"))
    if report.untested_files:
        parts.append(Text("\nOther weight files, not tested"))
        parts += [Text(f"  {printable(f.name)}  {f.taken_by}") for f in report.untested_files[:_MAX_SKIPPED]]
        if len(report.untested_files) > _MAX_SKIPPED:
            parts.append(Text(f"  ... and {len(report.untested_files) - _MAX_SKIPPED} more, in the report"))
    parts.append(Text(""))
    for sentence, command in next_steps(report, path):
        parts.append(Text(f"{sentence}  {command}".rstrip()))
    return Group(*parts)


def render_markdown(report: ScanReport) -> str:
    """A section for a model card."""
    name = printable(report.model)
    lines = [
        f"## Scan for quantization-conditioned backdoors: {_escape(headline(report))}",
        "",
        f"{_escape(explanation(report))}",
        "",
        f"- Model: `{name.replace('`', '')}`",
        f"- Coverage: {report.coverage}",
        *(f"- Not tested: {_escape(printable(f.name))} ({f.taken_by})" for f in report.untested_files),
        f"- Scanned {report.created} with qcbguard-plugins {report.versions.get('qcbguard-plugins', 'unknown')}, "
        f"seed {report.seed}",
        "",
        "| format | result | corrected p | spectral excess | histogram excess |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {f.format} | {format_line(f)} | {p_text(f.p_value)} | {_percent(f.spectral.effect)} "
        f"| {f.residual.effect:+.2f} |"
        for f in report.formats
    ]
    lines += [
        "",
        *(
            f"- {_escape(sentence)} {f'`{command}`' if command else ''}".rstrip()
            for sentence, command in next_steps(report)
        ),
    ]
    return "\n".join(lines) + "\n"


def worst_tensors(report: ScanReport, limit: int = _MAX_TENSORS) -> list[TensorEvidence]:
    """The tensors of attacked formats that stand out, the most evident first."""
    found = [
        e
        for e in report.evidence
        if e.format in report.likely_formats and min(e.spectral_p, e.residual_p) < report.alpha
    ]
    return sorted(found, key=lambda e: (e.spectral_p, e.residual_p))[:limit]


def _format_table(report: ScanReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("format", "result", "corrected p", "spectral", "histogram", "on its grid"):
        table.add_column(column, overflow="fold")
    for f in report.formats:
        style = "red" if f.attacked else ""
        table.add_row(
            Text(f.format),
            Text(format_line(f), style=style),
            p_text(f.p_value),
            _percent(f.spectral.effect),
            f"{f.residual.effect:+.2f}",
            f"{f.num_on_grid} tensors" if f.num_on_grid else "",
        )
    return table


def _tensor_table(evidence: list[TensorEvidence]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold", min_width=36)
    for column in ("format", "spectral", "p", "histogram", "p"):
        table.add_column(column)
    for e in evidence:
        table.add_row(
            Text(printable(e.name)),
            e.format,
            f"{e.spectral_effect:+.0%}",
            p_text(e.spectral_p),
            f"{e.residual_effect:+.2f}",
            p_text(e.residual_p),
        )
    return table


def _percent(log_excess: float) -> str:
    return f"{2.718281828459045**log_excess - 1:+.1%}"


def _escape(text: str) -> str:
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
