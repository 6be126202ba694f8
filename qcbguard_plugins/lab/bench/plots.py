"""The plots of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.errors import MissingDependencyError
from qcbguard_plugins.lab.bench.parameter_sweeps import ParameterGrid, Sweep
from qcbguard_plugins.lab.bench.results import STOCK
from qcbguard_plugins.lab.bench.summary import Line, find, full_precision, stock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A row with a format.
Place = tuple[str, str]
#: A folder, and what the names of the files in it begin with.
Target = tuple[Path, str]

#: How every plot of the package looks.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "qcbguard",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_COLOURS = (
    "#1f6feb", "#2da44e", "#9a6700", "#8250df", "#bf3989", "#0a7ea4", "#57606a", "#d4671b", "#116329", "#4c2889",
    "#86b6f7", "#7bd88f", "#e0b35a", "#c9a7f5", "#f09bc6",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_NO_DEFENSE = "#b3261e"
_REFERENCE = "#999999"
_PANELS_A_ROW = 3
_LONG_TITLE = 34
_SMALLEST_KL = 1e-6


@dataclass(frozen=True)
class Plot:
    """A figure that was written.

    Attributes:
        file: Name of the file.
        title: What it shows.
    """

    file: str
    title: str


def draw_tradeoff(
    lines: Sequence[Line], groups: dict[str, Sequence[Place]], defenses: Sequence[str], target: Target
) -> Plot | None:
    """Every method as a point: what is left of the attack against what it costs, means over rows; a panel a group."""
    groups = {title: places for title, places in groups.items() if places}
    pyplot = require_pyplot()
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(groups), figsize=(1.6 + 3.6 * len(groups), 3.6), layout="constrained", squeeze=False, sharey=True
        )
        for axes, (title, places) in zip(panels[0], groups.items(), strict=True):
            for name in (STOCK, *defenses):
                points = _points(lines, places, name)
                if points:
                    fill = "full" if len(points) == len(places) else "none"
                    style = {**_marker(name, defenses), "fillstyle": fill, "linestyle": "none", "markersize": 6}
                    axes.plot(*_mean_point(points), label=_label(name), **style)
            axes.axvline(1, color=_REFERENCE, linewidth=0.7, linestyle=":")
            axes.axhline(0, color=_REFERENCE, linewidth=0.7, linestyle=":")
            _logarithmic(axes, "x")
            axes.set_yscale("symlog", linthresh=5)
            axes.set_ylim(-0.5, 110)
            axes.set_yticks([0, 2, 5, 10, 20, 50, 100], ["0", "2", "5", "10", "20", "50", "100"])
            axes.set_title(f"{title} ({len(places)} models)")
            axes.set_xlabel("KL to full precision, over the clean model's\nin the same format")
        panels[0][0].set_ylabel("ASR, distance from full precision, points")
        _legend_outside(figure, panels[0])
        title = "Distance of the attack success rate against divergence, means; hollow: measured on some of the models"
        return _save(figure, target, "asr-utility", title)


def draw_rows(lines: Sequence[Line], places: Sequence[Place], defenses: Sequence[str], target: Target) -> Plot | None:
    """A panel a row and format: attack success rate against divergence, each method as a point."""
    if not places:
        return None
    pyplot = require_pyplot()
    num_rows = math.ceil(len(places) / _PANELS_A_ROW)
    num_columns = min(_PANELS_A_ROW, len(places))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            num_rows,
            num_columns,
            figsize=(1.6 + 2.7 * num_columns, 0.4 + 2.1 * num_rows),
            layout="constrained",
            squeeze=False,
        )
        flat = list(panels.flat)
        for axes, (row, format_name) in zip(flat, places, strict=False):
            _draw_panel(axes, lines, row, format_name, defenses)
        for axes in flat[len(places) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel("ASR, %")
        for axes in flat[max(0, len(places) - num_columns) : len(places)]:
            axes.set_xlabel("KL to full precision, nats a token")
        _legend_outside(figure, flat[: len(places)])
        return _save(figure, target, "asr-utility-rows", "Attack success rate against divergence, model by model")


def draw_strength(
    lines: Sequence[Line], places: Sequence[Place], sweeps: Sequence[Sweep], target: Target
) -> Plot | None:
    """Attack success rate and divergence along each method's parameter; a line a row and format."""
    sweeps = [sweep for sweep in sweeps if any(_along(lines, place, sweep, _asr)[0] for place in places)]
    if not sweeps:
        return None
    pyplot = require_pyplot()
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            2,
            len(sweeps),
            figsize=(1.9 + 2.5 * len(sweeps), 4.6),
            layout="constrained",
            squeeze=False,
            sharex="col",
            sharey="row",
        )
        for column, sweep in enumerate(sweeps):
            for number, place in enumerate(places):
                colour = _COLOURS[number % len(_COLOURS)]
                for axes, pick in zip(panels[:, column], (_asr, _kl), strict=True):
                    x, y = _along(lines, place, sweep, pick)
                    axes.plot(x, y, marker="o", markersize=3, color=colour, label=", ".join(place))
                rounded = stock(lines, *place)
                if rounded is not None and rounded.kl is not None:
                    panels[1, column].axhline(rounded.kl.value, color=colour, linewidth=0.7, linestyle=":")
            panels[0, column].set_title(sweep.method)
            panels[1, column].set_xlabel(sweep.parameter)
            _logarithmic(panels[1, column], "y")
        panels[0, 0].set_ylabel("ASR, %")
        panels[1, 0].set_ylabel("KL to full precision, nats a token\n(dotted: no defense)")
        _legend_outside(figure, [panels[0, 0]])
        return _save(figure, target, "strength", "Attack success rate and divergence along each method's strength")


def draw_grid(lines: Sequence[Line], place: Place, grid: ParameterGrid, target: Target) -> Plot | None:
    """Heat maps over two parameters: distance of the attack success rate, and divergence."""
    xs, ys = (sorted({key[axis] for key in grid.points}) for axis in (0, 1))
    values = {
        key: line
        for key, name in grid.points.items()
        if (line := find(lines, place[0], "attacked", place[1], name)) is not None
    }
    if len(values) < len(grid.points):
        return None
    maps: list[tuple[str, Callable[[Line], float | None], str]] = [
        ("ASR, points from full precision", _distance, "{:.1f}"),
        ("KL to full precision, nats a token", _kl, "{:.4f}"),
    ]
    pyplot = require_pyplot()
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
        for axes, (title, pick, form) in zip(panels, maps, strict=True):
            cells = [[pick(values[x, y]) or 0.0 for x in xs] for y in ys]
            mesh = axes.pcolormesh(cells, cmap="Reds", edgecolors="white", linewidth=0.6)
            middle = (mesh.norm.vmin + mesh.norm.vmax) / 2
            for i, row in enumerate(cells):
                for j, value in enumerate(row):
                    colour = "white" if value > middle else "black"
                    axes.text(j + 0.5, i + 0.5, form.format(value), ha="center", va="center", color=colour, fontsize=8)
            axes.set_xticks([i + 0.5 for i in range(len(xs))], [f"{x:g}" for x in xs])
            axes.set_yticks([i + 0.5 for i in range(len(ys))], [f"{y:g}" for y in ys])
            axes.set_xlabel(grid.x)
            axes.set_ylabel(grid.y)
            axes.set_title(title)
            axes.tick_params(length=0)
        figure.suptitle(f"{grid.method}, {place[0]}, {place[1]}", x=0.01, ha="left", fontsize=10)
        stem = f"{grid.method}-{grid.x}-{grid.y}-{place[0]}-{place[1]}".replace(":", "-")
        return _save(figure, target, stem, f"{grid.method} over {grid.x} and {grid.y}: {place[0]}, {place[1]}")


def _draw_panel(axes: Axes, lines: Sequence[Line], row: str, format: str, defenses: Sequence[str]) -> None:
    full, clean = full_precision(lines, row), stock(lines, row, format, "clean")
    if full is not None:
        axes.axhline(100 * full.asr.value, color=_REFERENCE, linewidth=0.8, linestyle="--", label="full precision")
    if clean is not None and clean.kl is not None:
        axes.axvline(clean.kl.value, color=_REFERENCE, linewidth=0.8, linestyle=":", label="clean model, no defense")
    for name in (STOCK, *defenses):
        line = find(lines, row, "attacked", format, name)
        if line is None or line.kl is None:
            continue
        low, high = line.asr.low or 0.0, line.asr.high or 0.0
        axes.errorbar(
            max(line.kl.value, _SMALLEST_KL),
            100 * line.asr.value,
            yerr=[[100 * max(0.0, line.asr.value - low)], [100 * max(0.0, high - line.asr.value)]],
            elinewidth=0.6,
            linestyle="none",
            markersize=4.5,
            label=_label(name),
            **_marker(name, defenses),
        )
    _logarithmic(axes, "x")
    _reach_two_powers_of_ten(axes)
    axes.set_ylim(-4, 104)
    title = row if format in row else f"{row}, {format}"
    axes.set_title(title, fontsize=9 if len(title) <= _LONG_TITLE else 7.5)


def _points(lines: Sequence[Line], places: Sequence[Place], name: str) -> list[tuple[float, float]]:
    """Of every model on which a method was measured: logarithm of its divergence over the clean model's, and the
    distance of the rate from full precision's, in points."""
    points = []
    for row, format_name in places:
        line = find(lines, row, "attacked", format_name, name)
        clean = stock(lines, row, format_name, "clean")
        distance = None if line is None else _distance(line)
        if line is None or clean is None or line.kl is None or clean.kl is None or distance is None:
            continue
        ratio = max(line.kl.value, _SMALLEST_KL) / max(clean.kl.value, _SMALLEST_KL)
        points.append((math.log(ratio), distance))
    return points


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Geometric mean of the ratios, and mean distance."""
    logs, distances = zip(*points, strict=True)
    return math.exp(math.fsum(logs) / len(logs)), math.fsum(distances) / len(distances)


def _along(
    lines: Sequence[Line], place: Place, sweep: Sweep, pick: Callable[[Line], float | None]
) -> tuple[list[float], list[float]]:
    points = []
    for value, name in sweep.points:
        line = find(lines, place[0], "attacked", place[1], name)
        found = None if line is None else pick(line)
        if found is not None:
            points.append((value, found))
    return [x for x, _ in points], [y for _, y in points]


def _asr(line: Line) -> float:
    return 100 * line.asr.value


def _distance(line: Line) -> float | None:
    return None if line.asr_from_full is None else 100 * abs(line.asr_from_full.value)


def _kl(line: Line) -> float | None:
    return None if line.kl is None else line.kl.value


def _label(name: str) -> str:
    return "no defense" if name == STOCK else name


def _logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at its powers of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1e-3 else f"1e{round(math.log10(value))}")
    axis.set_minor_formatter(lambda value, _: "")


def _reach_two_powers_of_ten(axes: Axes) -> None:
    """Widen a logarithmic axis on which fewer than two powers of ten would carry a number."""
    low, high = (math.log10(end) for end in axes.get_xlim())
    if math.floor(high) - math.ceil(low) < 1:
        axes.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))


def _marker(name: str, defenses: Sequence[str]) -> dict[str, Any]:
    if name == STOCK:
        return {"color": _NO_DEFENSE, "marker": "x"}
    number = list(defenses).index(name)
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _legend_outside(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside right upper")


def _save(figure: Figure, target: Target, stem: str, title: str) -> Plot:
    out_dir, prefix = target
    file = f"{prefix}{stem}.svg"
    figure.savefig(out_dir / file, metadata={"Date": None})
    require_pyplot().close(figure)
    return Plot(file, title)


def require_pyplot() -> Any:
    """Matplotlib's interface, drawing to files.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib", remedy="pip install 'qcbguard-plugins[lab]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
