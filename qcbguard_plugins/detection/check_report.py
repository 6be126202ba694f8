"""The report of ``qcbguard check``: three steps and one verdict."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.detection.inputs.report import InputReport
from qcbguard_plugins.detection.weights.report import ScanReport

CHECK_SCHEMA_VERSION: Final = 1

#: The steps, cheapest first.
STEPS = ("weights", "inputs", "behaviour")

Verdict = Literal["attacked", "incomplete", "nothing found"]
StepStatus = Literal["finding", "nothing", "incomplete", "failed", "skipped"]


class StepReport(Record):
    """One step.

    Attributes:
        name: ``weights``, ``inputs`` or ``behaviour``.
        status: ``finding``; ``nothing``: nothing stands out; ``incomplete``: the same, but not all could be tested;
            ``failed``: it could not be done; ``skipped``: it was not asked for, or an earlier finding left no question.
        saw: What it saw, or why there is nothing to see, in a sentence.
        p_value: Its smallest corrected p-value; 1 where it was not done.
        elapsed_s: Its duration.
    """

    name: str
    status: StepStatus
    saw: str
    p_value: float = Field(ge=0, le=1)
    elapsed_s: float = Field(ge=0)


class CheckReport(Report):
    """What all steps together say.

    Attributes:
        verdict: ``attacked``: some step has a finding; ``incomplete``: none has, and one could not be done as a whole;
            ``nothing found``: every step that was asked for was done and saw nothing.
        formats: Formats that the model was checked for.
        unseen: What no step can see, in sentences.
        weights: Report of the weight tests.
        inputs: Report of the input test.
        behaviour: Reports of the comparisons, one a format.
    """

    schema_version: Literal[1] = CHECK_SCHEMA_VERSION
    kind: Literal["check"] = "check"
    model: str
    formats: tuple[str, ...]
    verdict: Verdict
    steps: tuple[StepReport, ...]
    unseen: tuple[str, ...]
    weights: ScanReport | None
    inputs: InputReport | None
    behaviour: tuple[DiffReport, ...]
    elapsed_s: float = Field(ge=0)

    @property
    def exit_code(self) -> int:
        return {"attacked": 1, "incomplete": 3, "nothing found": 0}[self.verdict]
