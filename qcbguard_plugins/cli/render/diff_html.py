"""A behavioural comparison as one self-contained page."""

from __future__ import annotations

from qcbguard_plugins.cli.render.advice import p_text, printable, visible
from qcbguard_plugins.cli.render.diff_text import diff_explanation, diff_headline
from qcbguard_plugins.cli.render.page import render_page
from qcbguard_plugins.detection.behaviour.report import DiffReport


def render_diff_html(report: DiffReport) -> str:
    """The page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    return render_page(
        "diff.html.j2",
        {"p": p_text, "printable": printable, "visible": visible},
        report=report,
        headline=diff_headline(report),
        explanation=diff_explanation(report),
    )
