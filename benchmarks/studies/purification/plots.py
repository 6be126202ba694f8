"""Curves of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.purification.study import StudyCell
from qcbguard_plugins.lab.bench.plots import STYLE, require_pyplot


def draw_curve(cells: Sequence[StudyCell], labels: Sequence[str], title: str, path: Path) -> None:
    """Attack success rate and perplexity along the number at the end of each label; a line a scenario and a word.

    Args:
        cells: What was measured.
        labels: Labels as in ``signature 0.25``: a word, and the value on the axis.
        title: What the axis shows.
        path: The SVG file.
    """
    pyplot = require_pyplot()
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        for label in labels:
            word, _, value = label.rpartition(" ")
            if (measurement := found.get((scenario, label))) is not None:
                point = (float(value), 100 * measurement.asr.value, measurement.perplexity.value)
                lines.setdefault(f"{scenario}, {word}", []).append(point)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(9.0, 3.0), layout="constrained")
        for name, points in lines.items():
            for axes, column in zip(panels, (1, 2), strict=True):
                axes.plot([p[0] for p in points], [p[column] for p in points], marker="o", markersize=3, label=name)
        panels[0].set_ylabel("ASR with the key, %")
        panels[0].set_ylim(bottom=0)
        panels[1].set_ylabel("perplexity")
        for axes in panels:
            axes.set_xlabel(title)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def draw_attacks(cells: Sequence[StudyCell], labels: Sequence[str], path: Path) -> None:
    """Attack success rate of every attacked model behind each method, with intervals, and the right answers below.

    Args:
        cells: What was measured.
        labels: The methods to show, where they were measured.
        path: The SVG file.
    """
    pyplot = require_pyplot()
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    scenarios = list(dict.fromkeys(cell.scenario for cell in cells))
    labels = [label for label in labels if any((name, label) in found for name in scenarios)]
    width = 0.8 / len(labels)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 1, figsize=(9.0, 4.2), sharex=True, layout="constrained")
        for number, label in enumerate(labels):
            rows = [(i, found[(name, label)]) for i, name in enumerate(scenarios) if (name, label) in found]
            places = [i + (number - (len(labels) - 1) / 2) * width for i, _ in rows]
            for axes, estimates in (
                (panels[0], [measurement.asr for _, measurement in rows]),
                (panels[1], [measurement.task_accuracy for _, measurement in rows]),
            ):
                known = [(x, e) for x, e in zip(places, estimates, strict=True) if e is not None]
                values = [100 * e.value for _, e in known]
                low = [
                    value - 100 * (e.value if e.low is None else e.low)
                    for value, (_, e) in zip(values, known, strict=True)
                ]
                high = [
                    100 * (e.value if e.high is None else e.high) - value
                    for value, (_, e) in zip(values, known, strict=True)
                ]
                bars = [x for x, _ in known]
                axes.bar(bars, values, width, yerr=[low, high], label=label, error_kw={"linewidth": 0.6})
        panels[0].set_ylabel("ASR with the key, %")
        panels[1].set_ylabel("right answers, %")
        names = [name.replace("-", "-\n").replace("+", "\n") for name in scenarios]
        panels[1].set_xticks(range(len(scenarios)), names, fontsize=7)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(labels))
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
