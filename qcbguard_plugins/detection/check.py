"""Weights, inputs, behaviour: every test of a model, the cheapest first, until one leaves no question."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from qcbguard_plugins.backends.formats import backend_of, versions
from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.detection.check_report import STEPS, CheckReport, StepReport, Verdict
from qcbguard_plugins.detection.inputs.report import InputReport
from qcbguard_plugins.detection.weights.report import ScanReport
from qcbguard_plugins.errors import QcbguardError, UsageError

#: p-value from which on a finding leaves no question, so that the later steps are not made.
OVERWHELMING = 1e-6

_UNSEEN = (
    "A model that misbehaves at every precision: that is no quantization backdoor, and no step looks for it.",
    "Formats that were not named, and other settings of a format, such as another block size.",
    "A payload that only a certain prompt brings out, as far as its marks in weights and inputs are too small; "
    "prompts of your own domain help (--prompts).",
    "An attacker who trained against these very tests and their built-in prompts.",
)

#: Called with a step's name and its amount of work; gives what is to be called with each part of the work done.
StepProgress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass
class _Found:
    weights: ScanReport | None = None
    inputs: InputReport | None = None
    behaviour: tuple[DiffReport, ...] = ()


def check_model(
    path: Path | str,
    formats: Sequence[str],
    *,
    skip: Collection[str] = (),
    every_step: bool = False,
    prompts_path: Path | None = None,
    seed: int | None = None,
    budget_bytes: int | None = None,
    progress: StepProgress | None = None,
) -> CheckReport:
    """Test a model for quantization-conditioned backdoors with everything there is.

    Args:
        path: Folder of a full-precision model with its tokenizer. Of a single file only the weights are tested, and the
            verdict is incomplete at best.
        formats: Formats that the model may be quantized to.
        skip: Steps that are left out, of :data:`~qcbguard_plugins.detection.check_report.STEPS`.
        every_step: Make all steps, also after a finding that leaves no question.
        prompts_path: Prompts of the user's, besides the built-in ones.
        seed: Seed of everything drawn; fresh ones by default.
        budget_bytes: What the process may hold in memory; by default what the machine has left.
        progress: Makes the progress bar of a step.

    Returns:
        The report.

    Raises:
        UsageError: A format or a step is unknown, or all steps are skipped.
        CheckpointError: The weights cannot be read safely.
    """
    start = time.monotonic()
    unknown = sorted(set(skip).difference(STEPS))
    if unknown or set(skip) == set(STEPS):
        raise UsageError(
            f"there is no step {unknown[0]!r}" if unknown else "every step is skipped",
            remedy=f"Steps: {', '.join(STEPS)}.",
        )
    if not formats:
        raise UsageError("no format to check for", remedy="For example: --for nf4")
    for name in formats:
        backend_of(name).representative_grid(name)
    path = Path(path)
    source = open_weights(path)
    num_weights = sum(target.num_weights for target in source.targets)
    bar = progress or (lambda *_: nullcontext(lambda _: None))
    found = _Found()

    def weights(report: Callable[[int], object]) -> tuple[str, float, str]:
        from qcbguard_plugins.detection.weights.scan import scan_model

        found.weights = scan_model(path, formats, seed=seed, progress=report, budget_bytes=budget_bytes)
        return _of_weights(found.weights)

    def inputs(report: Callable[[int], object]) -> tuple[str, float, str]:
        from qcbguard_plugins.detection.inputs.check_inputs import check_inputs

        found.inputs = check_inputs(
            path, formats, prompts_path=prompts_path, seed=seed, progress=report, budget_bytes=budget_bytes
        )
        return _of_inputs(found.inputs)

    def behaviour(report: Callable[[int], object]) -> tuple[str, float, str]:
        from qcbguard_plugins.detection.behaviour.compare import diff_model

        for name in formats:
            compared = diff_model(path, name, prompts_path=prompts_path, seed=seed, progress=report)
            found.behaviour += (compared,)
        return _of_behaviour(found.behaviour)

    steps: list[StepReport] = []
    work = {"weights": num_weights, "inputs": num_weights, "behaviour": 8 * len(formats)}
    for name, run in {"weights": weights, "inputs": inputs, "behaviour": behaviour}.items():
        certain = next((step for step in steps if step.status == "finding" and step.p_value <= OVERWHELMING), None)
        if name in skip:
            steps.append(_not_done(name, "Left out, as asked for."))
        elif certain is not None and not every_step:
            steps.append(_not_done(name, f"Not needed: the finding in the {certain.name} leaves no question."))
        else:
            with bar(name, work[name]) as report:
                steps.append(_made(name, run, report))
    return CheckReport(
        versions=versions(),
        model=source.name,
        formats=tuple(formats),
        verdict=_verdict(steps),
        steps=tuple(steps),
        unseen=_UNSEEN,
        weights=found.weights,
        inputs=found.inputs,
        behaviour=found.behaviour,
        elapsed_s=time.monotonic() - start,
    )


def _made(
    name: str, run: Callable[[Callable[[int], object]], tuple[str, float, str]], report: Callable[[int], object]
) -> StepReport:
    start = time.monotonic()
    try:
        status, p_value, saw = run(report)
    except QcbguardError as error:
        # The other steps still say what they see; the verdict cannot be better than incomplete.
        status, p_value, saw = "failed", 1.0, " ".join(filter(None, [f"{error.summary}.", error.remedy]))
    return StepReport.model_validate(
        {"name": name, "status": status, "saw": saw, "p_value": p_value, "elapsed_s": time.monotonic() - start}
    )


def _not_done(name: str, why: str) -> StepReport:
    return StepReport(name=name, status="skipped", saw=why, p_value=1.0, elapsed_s=0.0)


def _verdict(steps: Sequence[StepReport]) -> Verdict:
    statuses = {step.status for step in steps}
    if "finding" in statuses:
        return "attacked"
    return "incomplete" if statuses & {"incomplete", "failed"} else "nothing found"


def _of_weights(report: ScanReport) -> tuple[str, float, str]:
    if report.verdict == "attacked":
        where = ", ".join(report.likely_formats) or "any format"
        return "finding", report.p_value, f"Marks of {report.family} in the weights, for {where}."
    status = "incomplete" if report.skipped else "nothing"
    return status, report.p_value, f"No marks in the weights; {report.coverage}."


def _of_inputs(report: InputReport) -> tuple[str, float, str]:
    attacked = [found for found in report.formats if found.attacked]
    if attacked:
        best = min(attacked, key=lambda found: found.p_value)
        return (
            "finding",
            report.p_value,
            f"Rounding to {best.format} adds up along what the layers read ({best.direction}): "
            f"{best.excess:+.1%} over chance.",
        )
    visible = max(found.smallest_visible for found in report.formats)
    status = "incomplete" if report.skipped else "nothing"
    return (
        status,
        report.p_value,
        f"Rounding acts on what the layers read as chance would; {visible:.1%} more would have been a finding. "
        f"{report.coverage}.",
    )


def _of_behaviour(reports: Sequence[DiffReport]) -> tuple[str, float, str]:
    differing = [report for report in reports if report.differs]
    worst = max(differing or reports, key=lambda report: report.ratio)
    answers = f"Quantizing to {worst.format} changes the answers {worst.ratio:.2f} times as much as chance"
    p_value = min(report.p_value for report in differing or reports)
    if not differing:
        return "nothing", p_value, f"{answers}."
    words = ", ".join(word.word for word in worst.words[:4])
    return "finding", p_value, f"{answers}{f'; it favours the words {words}' if words else ''}."
