"""A check as text for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcbguard_plugins.cli.render.advice import p_text, printable, quoted
from qcbguard_plugins.cli.render.text import human_seconds
from qcbguard_plugins.detection.check_report import CheckReport

_STYLES = {"attacked": "bold red", "incomplete": "bold yellow", "nothing found": "bold"}
_STATUS = {
    "finding": "FINDING",
    "nothing": "nothing",
    "incomplete": "in part",
    "failed": "FAILED",
    "skipped": "not done",
}


def check_headline(report: CheckReport) -> str:
    """The verdict in one line."""
    formats = ", ".join(report.formats)
    if report.verdict == "attacked":
        return f"Attacked: quantizing this model to {formats} changes what it does"
    undone = [step.name for step in report.steps if step.status in ("failed", "incomplete")]
    if report.verdict == "incomplete":
        return f"Incomplete: nothing found, but not everything could be tested ({', '.join(undone)})"
    done = [step.name for step in report.steps if step.status == "nothing"]
    return f"Nothing found in {_listed(done)}, for {formats}"


def render_check(report: CheckReport, path: Path) -> Group:
    """The verdict, a line a step, what no step can see, and what to do next.

    Args:
        report: The report.
        path: The model as the user named it.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("step", "result", "p", "time", "what it saw"):
        table.add_column(column, overflow="fold")
    for step in report.steps:
        done = step.status not in ("skipped", "failed")
        table.add_row(
            step.name,
            Text(_STATUS[step.status], style="red" if step.status in ("finding", "failed") else ""),
            p_text(step.p_value) if done else "",
            human_seconds(step.elapsed_s) if done else "",
            Text(printable(step.saw, 400)),
        )
    parts: list[Text | Table] = [Text(check_headline(report), style=_STYLES[report.verdict]), Text(""), table]
    if report.verdict != "attacked":
        parts.append(Text("\nWhat no step can see"))
        parts += [Text(f"  - {sentence}") for sentence in report.unseen]
    parts += [Text(f"\n{sentence}  {command}") for sentence, command in _next_steps(report, path)]
    return Group(*parts)


def _next_steps(report: CheckReport, path: Path) -> list[tuple[str, str]]:
    model, first = quoted(path), report.formats[0]
    steps = []
    if report.verdict == "attacked" and not report.behaviour:
        steps.append(("See what the quantized model says:", f"qcbguard diff {model} --for {first}"))
    if report.verdict != "incomplete" and path.is_dir():
        why = (
            "Make a guarded copy:"
            if report.verdict == "attacked"
            else "To be safe from what is unseen, make a guarded copy:"
        )
        steps.append((why, f"qcbguard guard {model} --for {first} --out {quoted(f'{path.resolve().name}-guarded')}"))
    return steps


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
