"""The report of a run, which is also the manifest that a guarded folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.records import Record, Report
from qcbguard_plugins.checkpoint.folder_record import FolderRecord
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.rounding.digests import combined_digest

MANIFEST_FILE = "qcbguard.json"


# The dtypes of weights that can be guarded; the names are looked up in torch.
_DTYPE = "^(float32|float16|bfloat16)$"


class TensorRecord(Record):
    """One guarded tensor.

    Attributes:
        name: Its parameter name in the model.
        key: Its name in the checkpoint; the same as ``name`` unless the model class adds or drops a prefix.
        shape: ``[out_features, in_features]`` as the quantizer reads it.
        transposed: True where the checkpoint stores ``[in_features, out_features]``.
        dtype: Dtype of the stored weight.
        read_dtype: Dtype in which transformers loads it by default, and on whose grid it was planned.
        num_weights: Number of weights.
        num_moved: Number whose code differs from plain rounding.
        num_frozen: Number that kept their value, scale holders for the most part.
        relative_change: ``|W' - W| / |W|``.
        num_as_planned: Number whose code is stored as the method chose it; fewer than all only where the quantizer
            searches for its scales, and ``None`` where that was not measured.
        codes_sha256: Hash of the planned codes; of codes and scales for GGUF.
        formats: The formats that read it; a GGUF one by its type, of which a mix has several.
        stored_name: Its name in the file that the quantizer writes, where it is another.
        chosen: Parameters that the method chose for this tensor by itself.
        why_data_free: Why it got stochastic rounding in place of a method that needs calibration; empty where it did
            not.
    """

    name: str
    key: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str = Field(pattern=_DTYPE)
    read_dtype: str = Field(pattern=_DTYPE)
    num_weights: int = Field(ge=0)
    num_moved: int = Field(ge=0)
    num_frozen: int = Field(ge=0)
    relative_change: float = Field(ge=0)
    codes_sha256: str
    num_as_planned: int | None = None
    formats: tuple[str, ...] = ()
    stored_name: str = ""
    chosen: dict[str, float | str] = Field(default_factory=dict)
    why_data_free: str = ""


class FileRecord(Record):
    """One weight file: its SHA-256 before, where it was a file, and after."""

    name: str
    sha256_in: str = ""
    sha256_out: str


class PurificationNote(Record):
    """What the manifest of a guard says of a purification before it.

    Attributes:
        created: When it was made.
        manifest_sha256: Hash of its manifest.
        weights_as_purified: Whether the weights that were guarded are those that it wrote.
    """

    created: str
    manifest_sha256: str
    weights_as_purified: bool


class GuardReport(Report):
    """What a guard did, tensor by tensor.

    Attributes:
        source: Name of the folder, file or model that was guarded.
        formats: The formats that it was guarded for, as the user spelled them.
        method: The defense.
        parameters: Its parameters.
        seed: Seed of the run.
        calibration: Where calibration text came from; ``None`` for a method that needs none.
        tensors: What was guarded.
        unguarded: Names of targets that were left as they are.
        uncovered: Tensors that this quantizer leaves alone and another of the format would take, unguarded.
        files: The weight files before and after.
        folder: What else the guarded folder held when it was made; ``None`` for what is no folder, and in older
            manifests.
        left_out: Files of the source with weights in other forms, which were not carried along.
        toolchain: What the plan depends on besides: facts of the backends.
        purification: What is known of a purification before it.
        elapsed_s: Seconds that the run took.
    """

    schema_version: Literal[2] = 2
    kind: Literal["guard"] = "guard"
    source: str
    formats: tuple[str, ...]
    method: str
    parameters: dict[str, Any]
    seed: int
    calibration: dict[str, Any] | None
    tensors: tuple[TensorRecord, ...]
    unguarded: tuple[str, ...] = ()
    uncovered: tuple[UncoveredTensor, ...] = ()
    files: tuple[FileRecord, ...] = ()
    folder: FolderRecord | None = None
    left_out: tuple[str, ...] = ()
    toolchain: dict[str, str] = Field(default_factory=dict)
    purification: PurificationNote | None = None
    elapsed_s: float = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        return _from_schema_1(data) if isinstance(data, dict) and data.get("schema_version") == 1 else data

    @property
    def needs_artifact(self) -> bool:
        """True where only what the stock quantizer wrote can be verified: with an importance matrix."""
        return "imatrix_sha256" in self.toolchain

    @property
    def num_targets(self) -> int:
        return len(self.tensors) + len(self.unguarded)

    @property
    def coverage(self) -> str:
        others = f", {len(self.uncovered)} other tensors not covered" if self.uncovered else ""
        return f"{len(self.tensors)} of {self.num_targets} target tensors guarded{others}"

    @property
    def is_complete(self) -> bool:
        """True where nothing that a quantizer of the format would take was left as it is."""
        return not self.unguarded and not self.uncovered

    @property
    def share_moved(self) -> float:
        """Share of the guarded weights whose code differs from plain rounding."""
        total = sum(tensor.num_weights for tensor in self.tensors)
        return sum(tensor.num_moved for tensor in self.tensors) / total if total else 0.0

    @property
    def chosen(self) -> dict[str, list[float | str]]:
        """Values of the parameters that the method chose by itself, each once, over all tensors."""
        values: dict[str, set[float | str]] = {}
        for tensor in self.tensors:
            for name, value in tensor.chosen.items():
                values.setdefault(name, set()).add(value)
        return {name: sorted(found, key=str) for name, found in sorted(values.items())}

    @property
    def data_free(self) -> dict[str, list[str]]:
        """By reason the tensors that got stochastic rounding in place of a method that needs calibration."""
        by_reason: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.why_data_free:
                by_reason.setdefault(tensor.why_data_free, []).append(tensor.name)
        return by_reason

    @property
    def share_as_planned(self) -> float | None:
        """Share of the guarded weights stored as the method chose; ``None`` where no tensor has it measured."""
        measured = [tensor for tensor in self.tensors if tensor.num_as_planned is not None]
        total = sum(tensor.num_weights for tensor in measured)
        return sum(tensor.num_as_planned or 0 for tensor in measured) / total if total else None

    @property
    def codes_sha256(self) -> str:
        """A hash over the planned codes of all tensors, in the order of their names."""
        return combined_digest({tensor.name: tensor.codes_sha256 for tensor in self.tensors})


class TensorVerdict(Record):
    """Whether the stock quantizer stores one tensor as planned.

    Attributes:
        name: Its name.
        as_planned: The verdict.
        reason: What differs; empty where nothing does.
        num_as_planned: Number of codes that are those planned, for a quantizer that moves some; ``None`` for one that
            must store them all.
        num_weights: Number of codes, beside ``num_as_planned``.
    """

    name: str
    as_planned: bool
    reason: str = ""
    num_as_planned: int | None = None
    num_weights: int | None = None

    @classmethod
    def other_codes(cls, name: str, dtype: torch.dtype) -> TensorVerdict:
        """The verdict on a weight that does not get the planned codes where it is read in this dtype."""
        reason = f"the stock quantizer stores other codes from {dtype_name(dtype)}"
        return cls(name=name, as_planned=False, reason=reason)


class VerifyReport(Report):
    """What a verification found, tensor by tensor and file by file.

    Attributes:
        folder: Name of the folder or file.
        formats: The formats that were compared.
        tensors: A verdict for each tensor.
        changed_files: Files that are not as the guard wrote them, that are missing, or that were added.
        unguarded: Names of targets that the guard left as they are.
        uncovered: Tensors that the guard left alone and another quantizer of the format would take.
        folder_problems: What has changed in the folder that decides what is loaded, a line each.
    """

    schema_version: Literal[2] = 2
    kind: Literal["verify"] = "verify"
    folder: str
    formats: tuple[str, ...]
    tensors: tuple[TensorVerdict, ...]
    changed_files: tuple[str, ...]
    unguarded: tuple[str, ...]
    uncovered: tuple[UncoveredTensor, ...] = ()
    folder_problems: tuple[str, ...] = ()

    @property
    def num_tensors_as_planned(self) -> int:
        return sum(tensor.as_planned for tensor in self.tensors)

    @property
    def share_as_planned(self) -> float | None:
        """Share of the codes that are those planned; ``None`` where all of a tensor or nothing counts."""
        total = sum(tensor.num_weights or 0 for tensor in self.tensors)
        return sum(tensor.num_as_planned or 0 for tensor in self.tensors) / total if total else None

    @property
    def clean(self) -> bool:
        return self.num_tensors_as_planned == len(self.tensors) and not self.changed_files and not self.folder_problems

    @property
    def is_complete(self) -> bool:
        """True where the guard left nothing as it is that a quantizer of the format would take."""
        return not self.unguarded and not self.uncovered


def read_manifest(folder: Path) -> GuardReport:
    """Read the manifest of a guarded folder.

    Raises:
        CheckpointError: There is none, or it does not follow the schema.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST_FILE}, so there is no plan to compare with",
            remedy="Give a folder that 'qcbguard guard' made.",
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return read_report(text, f"{MANIFEST_FILE} of {folder.name}")


def read_report(text: str | bytes, what: str) -> GuardReport:
    """Read the report of a guard, of this schema or of an older one.

    Args:
        text: JSON.
        what: What it is, for the error.

    Raises:
        CheckpointError: It does not follow the schema.
    """
    try:
        return GuardReport.model_validate_json(text)
    except ValidationError as error:
        details = [f"{'.'.join(map(str, problem['loc']))}  {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{what} is not a valid manifest", details=details) from error


def write_manifest(report: GuardReport, folder: Path) -> None:
    """Put the manifest into a folder in the making."""
    (folder / MANIFEST_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """The first schema kept formats in one string with commas, and left out those of a tensor that were the run's."""
    upgraded = {key: value for key, value in data.items() if key not in ("format", "schema_version")}
    formats = _split(data.get("format"))
    tensors = data.get("tensors")
    if isinstance(tensors, (list, tuple)):
        upgraded["tensors"] = [_tensor_from_schema_1(tensor, formats) for tensor in tensors]
    return {**upgraded, "formats": formats}


def _tensor_from_schema_1(tensor: Any, formats: Any) -> Any:
    if not isinstance(tensor, dict):
        return tensor
    renamed = {"num_landed": "num_as_planned", "settled": "chosen"}
    upgraded = {renamed.get(key, key): value for key, value in tensor.items() if key != "format"}
    return {**upgraded, "formats": _split(tensor["format"]) if tensor.get("format") else formats}


def _split(formats: Any) -> Any:
    return formats.split(",") if isinstance(formats, str) else formats
