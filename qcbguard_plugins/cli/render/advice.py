"""The words of a scan, the same in every rendering: headline, explanation, next steps."""

from __future__ import annotations

import shlex
from pathlib import Path

from qcbguard_plugins.detection.weights.power import power_at
from qcbguard_plugins.detection.weights.report import FormatEvidence, ScanReport

_GRID_FORMATS_GUARDED = ("nf4", "fp4", "int8")


def headline(report: ScanReport) -> str:
    """The verdict in one line."""
    if report.verdict == "attacked":
        where = f" for {', '.join(report.likely_formats)}" if report.likely_formats else ""
        return f"Attacked: this model changes its behaviour when it is quantized{where}"
    if report.verdict == "incomplete":
        missing = []
        if report.skipped or not report.untested_files:
            missing.append(f"{len(report.skipped)} of {report.num_targets} target tensors could not be tested")
        if report.untested_files:
            missing.append(f"{len(report.untested_files)} other weight files of the folder were not tested")
        return f"Incomplete: {', and '.join(missing)}"
    return "No marks in the weights"


def explanation(report: ScanReport) -> str:
    """What the verdict rests on."""
    if report.verdict == "attacked":
        return f"{report.family.capitalize()}. {report.meaning} Corrected p-value {p_text(report.p_value)}."
    tested = f"Nothing stands out in the {len(report.tensors)} tensors that were tested"
    formats = ", ".join(evidence.format for evidence in report.formats)
    if report.verdict == "incomplete":
        return f"{tested} for {formats}, which says nothing about the others."
    power = power_at(sum(tensor.num_weights for tensor in report.tensors))
    return (
        f"{tested} for {formats}. That is no all-clear: an attack that moves weights little leaves no mark in them. "
        f"At the nearest size that was studied ({power.models}) this scan saw {power.found} of {power.attacked} "
        "attacked ones. A model that misbehaves at every precision, or for a format that was not tested, is outside of "
        "what it can see."
    )


def next_steps(report: ScanReport, path: Path | None = None) -> list[tuple[str, str]]:
    """What to do now: a sentence and a command each; the command may be empty.

    Args:
        report: The report.
        path: The model as the user named it, so that the command runs when it is pasted; by its bare name otherwise.
    """
    model = quoted(report.model if path is None else path)
    if report.verdict == "attacked":
        target = (report.likely_formats or (report.formats[0].format,))[0]
        return [
            ("Do not quantize this model with a stock quantizer.", ""),
            ("See what the quantized model says that the original does not:", f"qcbguard diff {model} --for {target}"),
            (
                "Make a guarded copy, which stock quantizers round without the backdoor:",
                f"qcbguard guard {model} --for {target} --out {quoted(f'{report.model}-guarded')}",
            ),
        ]
    steps = []
    if report.untested_files:
        steps.append(("Delete the other weight files, or scan each safetensors file by its own path.", ""))
    if report.skipped:
        steps.append(("Look at the list of tensors that could not be tested.", ""))
    if path is not None and not path.is_dir():
        return [*steps, ("Inputs and behaviour need the model's folder with its tokenizer; check that as well.", "")]
    formats = ",".join(evidence.format for evidence in report.formats)
    why = "Look at what its layers read and at what it answers, too:"
    return [*steps, (why, f"qcbguard check {model} --for {formats} --skip weights")]


def format_line(evidence: FormatEvidence) -> str:
    """One format's result in words."""
    if evidence.attacked:
        return "attacked"
    return "on its grid already" if evidence.num_on_grid and not any(evidence.histogram) else "no marks"


def p_text(p_value: float) -> str:
    """A p-value to the digits that mean something."""
    if p_value < 1e-12:
        return "below 1e-12"
    return f"{p_value:.1e}" if p_value < 0.001 else f"{p_value:.3f}"


def quoted(path: Path | str) -> str:
    """A path for a shell, without control characters."""
    return shlex.quote(printable(str(path), 4096))


def visible(text: str, limit: int = 240) -> str:
    """An answer or a token on one line: line breaks as a sign, nothing as a word."""
    joined = " ".join(text.replace("\n", " \u23ce ").split())
    return printable(joined, limit) if joined else "(empty)" if not text else "(space)"


def printable(text: str, limit: int = 120) -> str:
    """A name from a file, without control characters that a terminal or a page would obey."""
    cleaned = "".join(character if character.isprintable() else "?" for character in text)
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 3] + "..."
