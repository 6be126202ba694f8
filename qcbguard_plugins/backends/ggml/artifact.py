"""After the user has run ``llama-quantize``: are the stored codes those of the plan?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from qcbguard_plugins.backends.base import StoredCodes
from qcbguard_plugins.checkpoint.gguf_parts import require_whole
from qcbguard_plugins.checkpoint.gguf_reader import GgufFile, GgufTensor, open_gguf
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict, read_manifest, read_report
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.rounding.digests import blocks_digest, stacked_digest


class QuantizedGguf(StoredCodes):
    """A quantized GGUF file. No ggml library is needed to read it.

    A file that somebody quantized from the wrong source, to another type or with another importance matrix differs.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: It cannot be read, is not quantized, or is one part of several.
        """
        self.path, self._file = path, open_gguf(path)
        require_whole(self._file)
        if not any(tensor.is_quantized for tensor in self._file.tensors.values()):
            raise CheckpointError(
                f"{path.name} is not quantized", remedy="Give the file that llama-quantize wrote from it."
            )
        self._other_imatrix = ""

    def find_plan(self, plan: Path | None) -> GuardReport:
        """The report of the guard: from the file's own metadata, a guarded GGUF file, or a guarded folder."""
        if plan is not None and plan.is_dir():
            report = read_manifest(plan)
        else:
            report = _plan_inside(self._file if plan is None else open_gguf(plan))
        if not any(name.startswith("gguf:") for name in report.formats):
            raise UsageError(f"the plan is for {', '.join(report.formats)} and not for a GGUF type")
        self._other_imatrix = _imatrix_differs(self._file, report)
        return report

    def compare(self, record: TensorRecord) -> TensorVerdict:
        name = record.stored_name or record.name
        reason = _why_not_as_planned(self._file, name, record)
        if reason and self._other_imatrix:
            reason += f"; {self._other_imatrix}"
        return TensorVerdict(name=name, as_planned=not reason, reason=reason)

    def quantized(self) -> Iterable[str]:
        return [tensor.name for tensor in self._file.tensors.values() if tensor.is_quantized]


def stored_digest(file: GgufFile, tensor: GgufTensor) -> str:
    """The digest of what a tensor stores."""
    block_type = BLOCK_TYPES[tensor.type_name]
    rows = tensor.shape[-2]
    matrices = torch.from_numpy(file.read_bytes(tensor.name).copy()).view(
        -1, rows * block_type.row_bytes(tensor.shape[-1])
    )
    return stacked_digest([blocks_digest(block_type.read(matrix), block_type, rows) for matrix in matrices])


def _plan_inside(source: GgufFile) -> GuardReport:
    text = source.metadata.get(GGUF_PROVENANCE_KEY)
    if not isinstance(text, str):
        raise CheckpointError(
            f"{source.path.name} carries no {GGUF_PROVENANCE_KEY}, so there is no plan to compare with",
            remedy="It was not made from a file that 'qcbguard gguf' wrote. If the Hugging Face folder was guarded "
            "instead, name it with --plan.",
        )
    return read_report(text, f"{GGUF_PROVENANCE_KEY} of {source.path.name}")


def _why_not_as_planned(file: GgufFile, name: str, record: TensorRecord) -> str:
    """Empty where the file stores the planned codes."""
    tensor = file.tensors.get(name)
    planned_type = ",".join(record.formats).removeprefix("gguf:")
    if tensor is None:
        return "missing"
    if tensor.type_name != planned_type:
        return f"stored as {tensor.type_name}, planned as {planned_type}"
    if (tensor.num_weights // tensor.shape[-1], tensor.shape[-1]) != record.shape:
        return f"stored with shape {tensor.shape}"
    if stored_digest(file, tensor) != record.codes_sha256:
        return "other codes than planned"
    return ""


def _imatrix_differs(file: GgufFile, report: GuardReport) -> str:
    """What to say about the importance matrix where some tensor differs."""
    used = file.metadata.get("quantize.imatrix.file")
    planned = report.toolchain.get("imatrix_sha256")
    if used and not planned:
        return f"it was quantized with the importance matrix {used}, and planned without one"
    if planned and not used:
        return "it was quantized without an importance matrix, and planned with one"
    return "" if not used else f"it was quantized with the importance matrix {used}: is that the one of the plan?"
