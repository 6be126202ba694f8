"""A behavioural comparison as one self-contained page."""

from __future__ import annotations

from qcbguard_plugins.report.advice import p_text, printable, visible
from qcbguard_plugins.report.diff_model import DiffReport
from qcbguard_plugins.report.diff_text import diff_explanation, diff_headline
from qcbguard_plugins.report.page import render_page


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
