"""What a benchmark found: cells, and the report that holds them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report
from qcbguard_plugins.lab.evaluation import Measurement

#: What the table calls a model in full precision, and plain rounding.
FULL, STOCK = "full precision", "none"
Variant = Literal["attacked", "clean"]


class Place(Record):
    """Where a cell stands.

    Attributes:
        row: Name of the attack or folder.
        variant: The attacked model, or the clean one that it was made from.
        format: ``fp`` or the format.
        defense: Name of the defense, :data:`FULL` or :data:`STOCK`.
        seed: Seed of attack and guard.
    """

    row: str
    variant: Variant
    format: str
    defense: str
    seed: int

    @property
    def title(self) -> str:
        """The place in one line."""
        return f"{self.row}, {self.variant}, {self.format}, {self.defense}, seed {self.seed}"


class Cell(Record):
    """One cell.

    Attributes:
        place: Where it stands.
        key: SHA-256 of everything that the measurement depends on; empty where the model could not be made.
        measurement: What was found; ``None`` where that failed.
        error: Why it failed; empty where it did not.
        commit: What it was measured with.
        cached: True where an earlier run had measured it.
    """

    place: Place
    key: str = ""
    measurement: Measurement | None = None
    error: str = ""
    commit: str = ""
    cached: bool = False


class Check(Record):
    """One expectation in one row and format.

    Attributes:
        row: Name of the attack or folder.
        format: Format.
        defense: Name of the defense; :data:`STOCK` where the attack itself is asked about.
        what: What was expected.
        found: What was found.
        held: Whether it did come out.
    """

    row: str
    format: str
    defense: str
    what: str
    found: str
    held: bool


class Machine(Record):
    """Where the numbers come from."""

    processor: str
    num_cores: int = Field(ge=1)
    gpu: str
    commit: str


class BenchReport(Report):
    """All that a benchmark found."""

    schema_version: Literal[1] = 1
    kind: Literal["lab-bench"] = "lab-bench"
    machine: Machine
    profile: dict[str, Any]
    notices: list[str] = Field(default_factory=list)
    cells: list[Cell]
    checks: list[Check]
    elapsed_s: float = Field(ge=0)

    @property
    def num_failed(self) -> int:
        """Cells that could not be measured."""
        return sum(cell.measurement is None for cell in self.cells)

    @property
    def num_missed(self) -> int:
        """Expectations that did not come out."""
        return sum(not check.held for check in self.checks)


def this_machine() -> Machine:
    """Processor, cores, GPU, and the commit of the checkout that this package runs from."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(processor=_processor(), num_cores=cores, gpu=gpu, commit=commit_of_checkout())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit_of_checkout() -> str:
    """Short hash of the checkout's commit; empty where the package is not run from one."""
    try:
        done = subprocess.run(  # noqa: S603  git, on the package's own folder
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
