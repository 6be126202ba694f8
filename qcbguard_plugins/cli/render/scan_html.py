"""A scan as one self-contained page: no script, no remote asset, nothing taken from the model but escaped names."""

from __future__ import annotations

from qcbguard_plugins.cli.render.advice import explanation, format_line, headline, next_steps, p_text, printable
from qcbguard_plugins.cli.render.page import render_page
from qcbguard_plugins.cli.render.plots import cell_histogram, heat_map
from qcbguard_plugins.detection.weights.report import ScanReport

_MAX_ROWS = 400


def render_html(report: ScanReport) -> str:
    """The page.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    rows = sorted(report.evidence, key=lambda e: (e.spectral_p, e.residual_p, e.name))
    shapes = {tensor.name: "x".join(map(str, tensor.shape)) for tensor in report.tensors}
    maps = {evidence.format: heat_map(report, evidence.format) for evidence in report.formats}
    return render_page(
        "scan.html.j2",
        {"p": p_text, "printable": printable},
        report=report,
        headline=headline(report),
        explanation=explanation(report),
        steps=next_steps(report),
        format_line=format_line,
        heat_maps={name: svg for name, svg in maps.items() if svg},
        histograms=[svg for svg in map(cell_histogram, report.formats) if svg],
        rows=rows[:_MAX_ROWS],
        num_left_out=max(0, len(rows) - _MAX_ROWS),
        shapes=shapes,
        outliers=[tensor for tensor in report.tensors if tensor.outlier_p <= report.alpha],
    )
