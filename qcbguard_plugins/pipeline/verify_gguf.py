"""After the user has run ``llama-quantize``: are the stored codes those of the plan?"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.checkpoint.gguf_reader import GgufFile, GgufTensor, open_gguf
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict, VerifyReport, read_manifest
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.rounding.digests import blocks_digest
from qcbguard_plugins.rounding.guarded_weight import stacked_digest


def verify_gguf(path: Path | str, *, plan: Path | str | None = None, progress: Progress | None = None) -> VerifyReport:
    """Compare what a quantized GGUF file stores with the plan, tensor by tensor.

    A file that somebody quantized from the wrong source, to another type or with another importance matrix differs. No
    ggml library is needed.

    Args:
        path: What ``llama-quantize`` wrote.
        plan: Where the plan is, if not in the file itself: a folder that ``qcbguard guard`` made, or a guarded GGUF
            file.
        progress: Called with the number of weights of each tensor when it is compared.

    Raises:
        CheckpointError: The file cannot be read, is not quantized, or there is no plan.
    """
    file = open_gguf(path)
    if not any(tensor.is_quantized for tensor in file.tensors.values()):
        raise CheckpointError(
            f"{file.path.name} is not quantized", remedy="Give the file that llama-quantize wrote from it."
        )
    report = find_plan(file, None if plan is None else Path(plan))
    wrong_imatrix = _imatrix_differs(file, report)
    verdicts = []
    planned = set()
    for record in report.tensors:
        name = record.stored_name or record.name
        planned.add(name)
        reason = _why_not_as_planned(file, name, record)
        if reason and wrong_imatrix:
            reason += f"; {wrong_imatrix}"
        verdicts.append(TensorVerdict(name=name, as_planned=not reason, reason=reason))
        if progress is not None:
            progress(record.num_weights)
    unguarded = set(report.unguarded)
    verdicts += [
        TensorVerdict(name=name, as_planned=False, reason="quantized, and not in the plan")
        for name, tensor in file.tensors.items()
        if tensor.is_quantized and name not in planned and name not in unguarded
    ]
    return VerifyReport(
        created=now(),
        versions=installed_versions(),
        folder=file.path.name,
        format=report.format,
        tensors=tuple(verdicts),
        changed_files=(),
        unguarded=report.unguarded,
    )


def find_plan(file: GgufFile, plan: Path | None) -> GuardReport:
    """The report of the guard: from the file's own metadata, a guarded GGUF file, or a guarded folder.

    Raises:
        CheckpointError: There is none, or it is malformed.
        UsageError: It is a plan for another toolchain.
    """
    if plan is not None and plan.is_dir():
        report = read_manifest(plan)
    else:
        source = file if plan is None else open_gguf(plan)
        text = source.metadata.get(GGUF_PROVENANCE_KEY)
        if not isinstance(text, str):
            raise CheckpointError(
                f"{source.path.name} carries no {GGUF_PROVENANCE_KEY}, so there is no plan to compare with",
                remedy="It was not made from a file that 'qcbguard gguf' wrote. If the Hugging Face folder was guarded "
                "instead, name it with --plan.",
            )
        try:
            report = GuardReport.model_validate_json(text)
        except ValidationError as error:
            raise CheckpointError(f"{GGUF_PROVENANCE_KEY} of {source.path.name} is malformed") from error
    if "gguf:" not in report.format:
        raise UsageError(f"the plan is for {report.format} and not for a GGUF type")
    return report


def stored_digest(file: GgufFile, tensor: GgufTensor) -> str:
    """The digest of what a tensor stores."""
    block_type = BLOCK_TYPES[tensor.type_name]
    rows = tensor.shape[-2]
    matrices = torch.from_numpy(file.read_bytes(tensor.name).copy()).view(
        -1, rows * block_type.row_bytes(tensor.shape[-1])
    )
    return stacked_digest([blocks_digest(block_type.read(matrix), block_type, rows) for matrix in matrices])


def _why_not_as_planned(file: GgufFile, name: str, record: TensorRecord) -> str:
    """Empty where the file stores the planned codes."""
    tensor = file.tensors.get(name)
    planned_type = record.format.removeprefix("gguf:")
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
