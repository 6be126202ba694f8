"""The report of a run, which is also the manifest that a guarded folder carries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.records import Record
from qcbguard_plugins.errors import CheckpointError

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
        num_landed: Number whose code is stored as the method chose it; fewer than all only where the quantizer searches
            for its scales, and ``None`` where that was not measured.
        codes_sha256: Hash of the planned codes; of codes and scales for GGUF.
        format: The format of this tensor, where it is not that of the report: a GGUF mix has several.
        stored_name: Its name in the file that the quantizer writes, where it is another.
        settled: Parameters that the method chose for this tensor by itself.
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
    num_landed: int | None = None
    format: str = ""
    stored_name: str = ""
    settled: dict[str, float | str] = Field(default_factory=dict)


class FileRecord(Record):
    """One weight file: its SHA-256 before and after."""

    name: str
    sha256_in: str
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


class GuardReport(Record):
    """What a guard did, tensor by tensor."""

    schema_version: Literal[1] = 1
    kind: Literal["guard"] = "guard"
    created: str
    versions: dict[str, str]
    source: str
    format: str
    method: str
    parameters: dict[str, Any]
    seed: int
    calibration: dict[str, Any] | None
    tensors: tuple[TensorRecord, ...]
    unguarded: tuple[str, ...] = ()
    files: tuple[FileRecord, ...] = ()
    left_out: tuple[str, ...] = ()
    toolchain: dict[str, str] = Field(default_factory=dict)
    purification: PurificationNote | None = None
    elapsed_s: float = Field(ge=0)

    @property
    def num_targets(self) -> int:
        return len(self.tensors) + len(self.unguarded)

    @property
    def coverage(self) -> str:
        return f"{len(self.tensors)} of {self.num_targets} target tensors guarded"

    @property
    def share_moved(self) -> float:
        """Share of the guarded weights whose code differs from plain rounding."""
        total = sum(tensor.num_weights for tensor in self.tensors)
        return sum(tensor.num_moved for tensor in self.tensors) / total if total else 0.0

    @property
    def settled(self) -> dict[str, list[float | str]]:
        """Values of the parameters that the method chose by itself, each once, over all tensors."""
        values: dict[str, set[float | str]] = {}
        for tensor in self.tensors:
            for name, value in tensor.settled.items():
                values.setdefault(name, set()).add(value)
        return {name: sorted(found, key=str) for name, found in sorted(values.items())}

    @property
    def share_landed(self) -> float | None:
        """Share of the guarded weights stored as the method chose; ``None`` where no tensor has it measured."""
        measured = [tensor for tensor in self.tensors if tensor.num_landed is not None]
        total = sum(tensor.num_weights for tensor in measured)
        return sum(tensor.num_landed or 0 for tensor in measured) / total if total else None

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
        num_landed: Number of codes that are those planned, for a quantizer that moves some; ``None`` for one that must
            store them all.
        num_weights: Number of codes, beside ``num_landed``.
    """

    name: str
    as_planned: bool
    reason: str = ""
    num_landed: int | None = None
    num_weights: int | None = None


class VerifyReport(Record):
    """What a verification found, tensor by tensor and file by file."""

    schema_version: Literal[1] = 1
    kind: Literal["verify"] = "verify"
    created: str
    versions: dict[str, str]
    folder: str
    format: str
    tensors: tuple[TensorVerdict, ...]
    changed_files: tuple[str, ...]
    unguarded: tuple[str, ...]

    @property
    def num_as_planned(self) -> int:
        return sum(tensor.as_planned for tensor in self.tensors)

    @property
    def share_landed(self) -> float | None:
        """Share of the codes that are those planned; ``None`` where all of a tensor or nothing counts."""
        total = sum(tensor.num_weights or 0 for tensor in self.tensors)
        return sum(tensor.num_landed or 0 for tensor in self.tensors) / total if total else None

    @property
    def clean(self) -> bool:
        return self.num_as_planned == len(self.tensors) and not self.changed_files


def combined_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the digests of named tensors, whatever their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


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
        return GuardReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        details = (
            [f"{'.'.join(map(str, e['loc']))}  {e['msg']}" for e in error.errors()]
            if isinstance(error, ValidationError)
            else []
        )
        raise CheckpointError(f"{MANIFEST_FILE} of {folder.name} is not a valid manifest", details=details) from error


def other_codes(dtype: torch.dtype) -> str:
    """The reason of a verdict: the weight, read in this dtype, does not get the planned codes."""
    return f"the stock quantizer stores other codes from {dtype_name(dtype)}"
