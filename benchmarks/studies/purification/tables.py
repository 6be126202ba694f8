"""Tables of a study, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.studies.purification.study import NONE, StudyCell
from qcbguard_plugins.lab.evaluation import Measurement


def table(cells: Sequence[StudyCell], scenarios: Sequence[str], labels: Sequence[str]) -> str:
    """A Markdown table: attack success by scenario, and means of it and of the utility; bare where not measured."""
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    measured = [name for name in scenarios if any((name, label) in found for label in labels)]
    head = ["method", *measured, "mean ASR", "without key", "perplexity", "right answers"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label in labels:
        row = [found.get((name, label)) for name in measured]
        known = [measurement for measurement in row if measurement is not None]
        if not known:
            continue
        quiet = [m.quiet_asr.value for m in known if m.quiet_asr is not None]
        right = [m.task_accuracy.value for m in known if m.task_accuracy is not None]
        partly = "" if len(known) == len(row) else f" ({len(known)} of {len(row)})"
        lines.append(
            f"| {label} | "
            + " | ".join("" if m is None else _percent(m.asr.value) for m in row)
            + f" | {_percent(_mean([m.asr.value for m in known]))}{partly} | {_percent(_mean(quiet)) if quiet else ''}"
            + f" | {_mean([m.perplexity.value for m in known]):.3f} | {_percent(_mean(right)) if right else ''} |"
        )
    return "\n".join(lines) + "\n"


def attacks_table(cells: Sequence[StudyCell], scenarios: Sequence[str], labels: Sequence[str]) -> str:
    """A row an attacked model: attack success rate behind each method, and right answers in brackets."""
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    shown = [label for label in labels if any((name, label) in found for name in scenarios)]
    lines = [f"| attack | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for name in scenarios:
        row = [found.get((name, label)) for label in shown]
        if any(row):
            lines.append(f"| {name} | {' | '.join('' if m is None else _rates(m) for m in row)} |")
    return "\n".join(lines) + "\n"


def means_table(cells: Sequence[StudyCell], labels: Sequence[str], ours: str) -> str:
    """Means over the attacked models that a method was measured on, beside those of one method on the same models.

    The remaining rate is the mean attack success rate over that of the attacked models as they are.
    """
    found = {(cell.scenario, cell.label): cell.measurement for cell in cells}
    lines = [
        "| method | attacks | mean ASR | of the attacked rate | worst ASR | without key | right answers | perplexity "
        f"| {ours} on the same: ASR, right answers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label in labels:
        names = [name for name, other in found if other == label and (name, NONE) in found]
        if not names:
            continue
        own, before = [found[name, label] for name in names], [found[name, NONE] for name in names]
        same = [found[name, ours] for name in names if (name, ours) in found]
        remaining = _mean([m.asr.value for m in own]) / max(_mean([m.asr.value for m in before]), 1e-9)
        quiet = [m.quiet_asr.value for m in own if m.quiet_asr is not None]
        beside = f"{_mean_asr(same)}, {_right(same)}" if len(same) == len(own) else ""
        lines.append(
            f"| {label} | {len(own)} | {_mean_asr(own)} | {_percent(remaining)} "
            f"| {_percent(max(m.asr.value for m in own))} "
            f"| {_percent(_mean(quiet)) if quiet else ''} | {_right(own)} "
            f"| {_mean([m.perplexity.value for m in own]):.3f} | {beside} |"
        )
    return "\n".join(lines) + "\n"


def costs(cells: Sequence[StudyCell], labels: Sequence[str]) -> str:
    """A Markdown table of what each method takes, means over the attacked models."""
    lines = ["| method | variants, s | suppression and training, s of one core | memory, MB |", "|---|---|---|---|"]
    for label in labels:
        own = [cell for cell in cells if cell.label == label and cell.method_s is not None]
        if not own:
            continue
        variants = [cell.variants_s for cell in own if cell.variants_s is not None]
        method = _mean([cell.method_s for cell in own if cell.method_s is not None])
        peaks = [cell.peak_bytes / 1e6 for cell in own if cell.peak_bytes is not None]
        shown = (f"{_mean(variants):.0f}" if variants else "", f"{method:.0f}", f"{_mean(peaks):.0f}" if peaks else "")
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _mean_asr(measured: Sequence[Measurement]) -> str:
    return f"{100 * _mean([m.asr.value for m in measured]):.1f}"


def _right(measured: Sequence[Measurement]) -> str:
    right = [m.task_accuracy.value for m in measured if m.task_accuracy is not None]
    return f"{100 * _mean(right):.1f}" if right else ""


def _rates(measured: Measurement) -> str:
    return f"{_percent(measured.asr.value)} ({_right([measured])})"
