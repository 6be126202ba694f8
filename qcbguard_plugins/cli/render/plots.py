"""The plots of a report, as SVG that stands inside a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.cli.render.advice import printable
from qcbguard_plugins.detection.weights.report import FormatEvidence, ScanReport
from qcbguard_plugins.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_PROJECTIONS = 24
_MAX_LAYERS = 160

# Names come from the file: no mathematics is read in them. Text stays text, so that it can be searched and read aloud.
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "qcbguard",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_OBSERVED, _EXPECTED = "#b3261e", "#5f6b7a"


def heat_map(report: ScanReport, format: str) -> str:
    """Excess of the spectral test by layer and projection; an empty string where names tell no layers."""
    values = {e.name: e.spectral_effect for e in report.evidence if e.format == format}
    tensors = [tensor for tensor in report.tensors if tensor.layer is not None and tensor.name in values]
    layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})[:_MAX_LAYERS]
    projections = sorted({tensor.projection for tensor in tensors})[:_MAX_PROJECTIONS]
    if not layers:
        return ""
    grid = [[float("nan")] * len(layers) for _ in projections]
    for tensor in tensors:
        if tensor.layer in layers and tensor.projection in projections:
            grid[projections.index(tensor.projection)][layers.index(tensor.layer)] = values[tensor.name]
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(4.2, 0.7 + 0.26 * len(projections)), layout="constrained")
        # One scale for all formats, so that the pages' maps compare at a glance.
        highest = max(0.25, *(e.spectral_effect for e in report.evidence))
        mesh = axes.pcolormesh(grid, cmap="Reds", vmin=0, vmax=highest, edgecolors="white", linewidth=0.5)
        axes.set_yticks([i + 0.5 for i in range(len(projections))], [printable(name, 28) for name in projections])
        step = max(1, len(layers) // 10)
        axes.set_xticks([i + 0.5 for i in range(0, len(layers), step)], [str(layer) for layer in layers[::step]])
        axes.set_xlabel("layer")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        figure.colorbar(mesh, ax=axes, format=lambda value, _: f"{value:+.0%}", pad=0.02)
        return _svg(figure, f"Heat map of the spectral excess for {format}")


def cell_histogram(evidence: FormatEvidence) -> str:
    """Where in their cells the weights lie, beside the same on neighbouring grids."""
    bins = len(evidence.histogram)
    if not any(evidence.histogram):
        return ""
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(3.6, 2.3), layout="constrained")
        edges = [i / bins for i in range(bins + 1)]
        axes.stairs(
            [bins * share for share in evidence.expected_histogram], edges, color=_EXPECTED, label="neighbouring grids"
        )
        axes.stairs(
            [bins * share for share in evidence.histogram], edges, color=_OBSERVED, label="this grid", linewidth=1.6
        )
        axes.axvline(0.5, color="#999999", linewidth=0.6, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("place between two grid points")
        axes.set_ylabel("density")
        axes.set_title(evidence.format, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower center")
        return _svg(figure, f"Histogram of places in rounding cells for {evidence.format}")


def _svg(figure: Figure, title: str) -> str:
    """Draw and close a figure; only the ``svg`` element itself, which scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib", remedy="pip install 'qcbguard-plugins[scan]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
