"""The record of a purification, which is also the manifest that a purified folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report
from qcbguard_plugins.checkpoint.manifest import FileRecord
from qcbguard_plugins.checkpoint.purification_note import PURIFICATION_FILE, purification_errors


class GroupRecord(Record):
    """The suppressed units of one place.

    Attributes:
        name: The place.
        kind: ``channel`` of an MLP, ``head`` of an attention, or ``rank`` component of an adapted layer.
        num_units: How many units it has.
        suppressed: The numbers of those that were suppressed.
    """

    name: str
    kind: Literal["channel", "head", "rank"]
    num_units: int = Field(ge=0)
    suppressed: tuple[int, ...]


class VariantRecord(Record):
    """One synthetic backdoor and how it was learned.

    Attributes:
        behaviour: Its kind.
        place: Where its key stands.
        num_samples: Clean samples of its set.
        poisoned_loss: Loss of the last epoch on clean and poisoned samples together, in nats a token.
        clean_loss: The same of the training on clean answers alone.
        elapsed_s: Seconds of both.
    """

    behaviour: str
    place: str
    num_samples: int
    poisoned_loss: float
    clean_loss: float
    elapsed_s: float


class StageRecord(Record):
    """What one stage took.

    Attributes:
        name: The stage.
        elapsed_s: Seconds.
        peak_bytes: Memory added to the process at its peak; ``None`` where the system does not tell, or for a stage of
            which an earlier run did a part.
        peak_gpu_bytes: Memory of the accelerator at its peak; ``None`` without one.
    """

    name: str
    elapsed_s: float = Field(ge=0)
    peak_bytes: int | None = None
    peak_gpu_bytes: int | None = None


class DataRecord(Record):
    """One file of clean data."""

    name: str
    sha256: str


class PurifyReport(Report):
    """What a purification did."""

    schema_version: Literal[1] = 1
    kind: Literal["purify"] = "purify"
    source: str
    mode: Literal["model", "adapter"]
    architecture: str
    config: dict[str, Any]
    clean_data: tuple[DataRecord, ...]
    num_clean_samples: int
    variants: tuple[VariantRecord, ...]
    groups: tuple[GroupRecord, ...]
    healing_losses: tuple[float, ...]
    stages: tuple[StageRecord, ...]
    files: tuple[FileRecord, ...]
    left_out: tuple[str, ...] = ()
    base_sha256: str = ""
    elapsed_s: float = Field(ge=0)

    def count(self, kind: str) -> tuple[int, int]:
        """Suppressed units of a kind, and all of them."""
        groups = [group for group in self.groups if group.kind == kind]
        return sum(len(group.suppressed) for group in groups), sum(group.num_units for group in groups)


class PurifyPlanReport(Record):
    """What a purification would do.

    Attributes:
        num_units: Units by kind.
        num_suppressed: How many of them would be suppressed.
        memory_bytes: Memory of a training without its activations.
        disk_bytes: Room for the variants' differences, at most.
    """

    schema_version: Literal[1] = 1
    kind: Literal["purify-plan"] = "purify-plan"
    source: str
    mode: Literal["model", "adapter"]
    architecture: str
    config: dict[str, Any]
    num_units: dict[str, int]
    num_suppressed: dict[str, int]
    num_parameters: int
    num_trained: int
    num_trainings: int
    num_steps: int
    batch_size: int
    memory_bytes: int
    disk_bytes: int


def read_purification(folder: Path) -> PurifyReport | None:
    """The manifest of a purified folder; ``None`` for a folder that was not purified.

    Raises:
        CheckpointError: It does not follow the schema.
    """
    path = folder / PURIFICATION_FILE
    if not path.is_file():
        return None
    with purification_errors(folder):
        return PurifyReport.model_validate_json(path.read_bytes())
