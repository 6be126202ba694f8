"""A benchmark's lines as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcbguard_plugins.lab.bench.results import FULL, STOCK
from qcbguard_plugins.lab.bench.summary import Line, find, full_precision, stock
from qcbguard_plugins.lab.intervals import Estimate
from qcbguard_plugins.lab.loading import FULL_PRECISION

_COLUMNS = (
    "model",
    "defense",
    "ASR %",
    "from FP, points",
    "unparsed %",
    "KL, nats",
    "perplexity",
    "task accuracy %",
    "codes moved %",
    "change",
    "guard s",
    "guard MB",
    "DER",
)

#: Columns of the table for a terminal.
COMPACT_COLUMNS = ("model", "defense", "ASR % (95 %)", "unparsed %", "KL", "perplexity", "tasks %", "moved %", "s")


def detail_table(lines: Sequence[Line], row: str, format: str) -> str:
    """Every number of one row in one format, beside the clean model and full precision."""
    shown = [line for line in lines if line.row == row and line.format in (format, FULL_PRECISION)]
    return markdown(_COLUMNS, [detail_cells(line) for line in shown])


def detail_cells(line: Line) -> list[str]:
    """One line of the table."""
    model = f"{line.variant}, {'full precision' if line.format == FULL_PRECISION else line.format}"
    asr = percent(line.asr)
    if line.asr_over_seeds.low is not None and line.asr_over_seeds.high is not None:
        half = (line.asr_over_seeds.high - line.asr_over_seeds.low) / 2
        asr += f"; ±{100 * half:.1f} over {line.num_seeds} seeds"
    if line.quiet_asr is not None:
        asr += f"; without trigger {100 * line.quiet_asr.value:.1f}"
    return [
        model,
        "-" if line.defense == FULL else line.defense,
        asr,
        "-" if line.defense == FULL or line.asr_from_full is None else points(line.asr_from_full),
        f"{100 * line.unparsed.value:.1f}",
        "-" if line.kl is None else number(line.kl),
        number(line.perplexity),
        "-" if line.task_accuracy is None else percent(line.task_accuracy),
        "-" if line.share_moved is None else f"{100 * line.share_moved:.1f}",
        "-" if line.relative_change is None else f"{line.relative_change:.3f}",
        "-" if line.guard_s is None else f"{line.guard_s:.1f}",
        "-" if line.guard_peak_bytes is None else f"{line.guard_peak_bytes / 1e6:.0f}",
        "-" if line.der is None else f"{line.der:.2f}",
    ]


def compact_cells(line: Line) -> list[str]:
    """One line of the table for a terminal."""
    return [
        f"{line.variant} {line.format}",
        "" if line.defense == FULL else line.defense,
        percent(line.asr),
        f"{100 * line.unparsed.value:.1f}",
        "" if line.kl is None else short(line.kl.value),
        short(line.perplexity.value),
        "" if line.task_accuracy is None else f"{100 * line.task_accuracy.value:.1f}",
        "" if line.share_moved is None else f"{100 * line.share_moved:.1f}",
        "" if line.guard_s is None else f"{line.guard_s:.1f}",
    ]


def asr_rows(
    lines: Sequence[Line], places: Sequence[tuple[str, str]], defenses: Sequence[str], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Attack success rates: a line a row and format, a column a defense.

    Args:
        lines: All lines.
        places: Rows with their formats.
        defenses: Names of the defenses, in the order of the columns.
        intervals: Whether each rate has its interval beside it, in whole percents.

    Returns:
        The head and the lines.
    """
    table = []
    for row, format_name in places:
        full = full_precision(lines, row)
        cells = [find(lines, row, "attacked", format_name, defense) for defense in (STOCK, *defenses)]
        rates = [_rate(line, intervals=intervals) for line in (full, *cells)]
        table.append([row, format_name, *rates])
    return ["attack", "format", "full precision", "no defense", *defenses], table


def method_rows(
    lines: Sequence[Line], groups: dict[str, Sequence[tuple[str, str]]], defenses: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Each method over all rows: a line a method.

    Args:
        lines: All lines.
        groups: Rows with their formats by a title, such as plain and adaptive attacks.
        defenses: Names of the defenses, in the order of the lines.

    Returns:
        The head and the lines. Distances are means and, in parentheses, the largest; a method that was not measured
        everywhere says on how many models it was.
    """
    groups = {title: places for title, places in groups.items() if places}
    head = ["defense", *(f"ASR from full precision, points: {title}" for title in groups)]
    head += ["unparsed %", "KL over no defense's", "KL over the clean model's", "task accuracy, points from no defense"]
    head += ["codes moved %", "DER", "s", "MB"]
    table = []
    for name in (STOCK, *defenses):
        places = [place for group in groups.values() for place in group]
        found = [line for row, fmt in places if (line := find(lines, row, "attacked", fmt, name)) is not None]
        if found:
            table.append([_title(name, len(found), len(places)), *_method_cells(lines, groups, name, found)])
    return head, table


def attacker_rows(lines: Sequence[Line], places: Sequence[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    """What each attack costs its attacker in full precision, beside the clean model: a line a row and format."""
    table = []
    for row, format_name in places:
        full, clean = full_precision(lines, row), full_precision(lines, row, "clean")
        if full is not None and clean is not None:
            perplexities = [f"{line.perplexity.value:.3f}" for line in (full, clean)]
            accuracies = ["-" if one is None else percent(one) for one in (full.task_accuracy, clean.task_accuracy)]
            rounded = stock(lines, row, format_name)
            table.append([row, format_name, percent(full.asr), _rate(rounded), *perplexities, *accuracies])
    head = ["attack", "format", "ASR %, full precision", "ASR %, plainly rounded", "perplexity", "the clean model's"]
    return [*head, "task accuracy %", "the clean model's"], table


def _method_cells(
    lines: Sequence[Line], groups: dict[str, Sequence[tuple[str, str]]], name: str, found: Sequence[Line]
) -> list[str]:
    cells = []
    for places in groups.values():
        ours = [line for row, fmt in places if (line := find(lines, row, "attacked", fmt, name)) is not None]
        distances = [100 * abs(line.asr_from_full.value) for line in ours if line.asr_from_full is not None]
        cells.append(f"{_mean(distances):.1f} ({max(distances):.1f})" if distances else "-")
    rounded = [(line, stock(lines, line.row, line.format)) for line in found]
    clean = [(line, stock(lines, line.row, line.format, "clean")) for line in found]
    accuracy = [
        100 * (line.task_accuracy.value - other.task_accuracy.value)
        for line, other in rounded
        if other is not None and line.task_accuracy is not None and other.task_accuracy is not None
    ]
    cells.append(f"{_mean([100 * line.unparsed.value for line in found]):.1f}")
    cells += [_ratio_of_kl(rounded), _ratio_of_kl(clean)]
    cells.append(f"{_mean(accuracy):+.1f}" if accuracy else "-")
    for values, form in (
        ([100 * line.share_moved for line in found if line.share_moved is not None], "{:.1f}"),
        ([line.der for line in found if line.der is not None], "{:.2f}"),
        ([line.guard_s for line in found if line.guard_s is not None], "{:.1f}"),
        ([line.guard_peak_bytes / 1e6 for line in found if line.guard_peak_bytes is not None], "{:.0f}"),
    ):
        cells.append(form.format(_mean(values)) if values else "-")
    return cells


def _ratio_of_kl(pairs: Sequence[tuple[Line, Line | None]]) -> str:
    """Geometric mean of a ratio of divergences."""
    logs = [
        math.log(line.kl.value / other.kl.value)
        for line, other in pairs
        if other is not None and line.kl is not None and other.kl is not None and min(line.kl.value, other.kl.value) > 0
    ]
    return f"{math.exp(_mean(logs)):.3g}" if logs else "-"


def _title(name: str, num_measured: int, num_places: int) -> str:
    title = "(no defense)" if name == STOCK else name
    models = "1 model" if num_measured == 1 else f"{num_measured} models"
    return title if num_measured == num_places else f"{title} ({models})"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def clean_rows(
    lines: Sequence[Line], places: Sequence[tuple[str, str]], defenses: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """What each defense does to a clean model, where that was measured."""
    table = []
    for row, fmt in places:
        found = [line for name in (STOCK, *defenses) if (line := find(lines, row, "clean", fmt, name)) is not None]
        table += [[row, fmt, *_clean_cells(line)] for line in found if len(found) > 1]
    head = ["clean model of", "format", "defense", "ASR % (95 %)", "unparsed %", "KL, nats (95 %)", "perplexity (95 %)"]
    return [*head, "task accuracy % (95 %)", "codes moved %", "s", "MB"], table


def _clean_cells(line: Line) -> list[str]:
    _, defense, asr, _, unparsed, kl, perplexity, accuracy, moved, _, seconds, memory, _ = detail_cells(line)
    return [defense, asr, unparsed, kl, perplexity, accuracy, moved, seconds, memory]


def utility_rows(
    lines: Sequence[Line], places: Sequence[tuple[str, str]], defenses: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Defenses beside undefended rounding: divergence and task accuracy with their intervals, a line a row and format.

    Args:
        lines: All lines.
        places: Rows with their formats.
        defenses: Names of the defenses, few enough to stand side by side.
    """
    names = ["no defense", *defenses]
    head = ["attack", "format", *(f"KL, {name}" for name in names), "KL, clean model, no defense"]
    head += [f"task accuracy %, {name}" for name in ("full precision", *names)]
    table = []
    for row, fmt in places:
        found = [find(lines, row, "attacked", fmt, name) for name in (STOCK, *defenses)]
        divergences = [None if line is None else line.kl for line in (*found, stock(lines, row, fmt, "clean"))]
        accuracies = [None if line is None else line.task_accuracy for line in (full_precision(lines, row), *found)]
        cells = ["-" if kl is None else number(kl) for kl in divergences]
        cells += ["-" if accuracy is None else percent(accuracy) for accuracy in accuracies]
        table.append([row, fmt, *cells])
    return head, table


def percent(estimate: Estimate) -> str:
    """A share in percent with its interval."""
    text = f"{100 * estimate.value:.1f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def points(estimate: Estimate) -> str:
    """A difference of two shares in points with its interval."""
    text = f"{100 * estimate.value:+.1f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def number(estimate: Estimate) -> str:
    """A number with its interval, to three or four digits."""
    if estimate.low is None or estimate.high is None:
        return short(estimate.value)
    return f"{short(estimate.value)} ({short(estimate.low)}-{short(estimate.high)})"


def short(value: float) -> str:
    """Three or four digits: plain where that is readable, with an exponent where it is small."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"


def _rate(line: Line | None, *, intervals: bool = False) -> str:
    if line is None:
        return "-"
    text = f"{100 * line.asr.value:.1f}"
    if not intervals or line.asr.low is None or line.asr.high is None:
        return text
    return f"{text} ({100 * line.asr.low:.0f}-{100 * line.asr.high:.0f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])
