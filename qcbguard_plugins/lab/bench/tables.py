"""A benchmark's lines as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from qcbguard_plugins.lab.bench.results import FULL, STOCK
from qcbguard_plugins.lab.bench.summary import Line, find, full_precision
from qcbguard_plugins.lab.intervals import Estimate
from qcbguard_plugins.lab.quantized import FULL_PRECISION

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
        "-" if line.defense == FULL or line.asr_from_full is None else f"{100 * line.asr_from_full:+.1f}",
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
    lines: Sequence[Line], places: Sequence[tuple[str, str]], defenses: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Attack success rates: a line a row and format, a column a defense.

    Args:
        lines: All lines.
        places: Rows with their formats.
        defenses: Names of the defenses, in the order of the columns.

    Returns:
        The head and the lines.
    """
    table = []
    for row, format_name in places:
        full = full_precision(lines, row)
        cells = [find(lines, row, "attacked", format_name, defense) for defense in (STOCK, *defenses)]
        rates = [_rate(line) for line in (full, *cells)]
        table.append([row, format_name, *rates])
    return ["attack", "format", "full precision", "no defense", *defenses], table


def percent(estimate: Estimate) -> str:
    """A share in percent with its interval."""
    text = f"{100 * estimate.value:.1f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


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


def _rate(line: Line | None) -> str:
    return "-" if line is None else f"{100 * line.asr.value:.1f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])
