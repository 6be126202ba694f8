"""After an export was quantized: are the stored codes those of the plan?"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.backends.onnx.reader import onnx_codes
from qcbguard_plugins.backends.openvino.reader import MODEL_FILE, openvino_codes
from qcbguard_plugins.checkpoint.manifest import TensorRecord, TensorVerdict, VerifyReport, read_manifest
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.rounding.digests import codes_digest


def is_export(path: Path) -> bool:
    """True for an ONNX file, and for a folder that OpenVINO wrote."""
    return path.suffix == ".onnx" or (path / MODEL_FILE).is_file()


def verify_export(path: Path | str, *, plan: Path | str | None = None) -> VerifyReport:
    """Compare the integer weights of an exported model with the plan, tensor by tensor.

    ONNX Runtime and NNCF round to nearest, so every code of every tensor must be the planned one.

    Args:
        path: The ONNX file that ``optimum-cli onnxruntime quantize`` wrote, or the folder that ``optimum-cli export
            openvino`` wrote.
        plan: The folder with the manifest; that of the export, if ``None``.

    Raises:
        CheckpointError: The export cannot be read, or there is no plan.
        UsageError: The plan is for another toolchain.
        MissingDependencyError: The library that reads the export is missing.
    """
    path = Path(path)
    toolchain = "onnx" if path.suffix == ".onnx" else "openvino"
    report = read_manifest(Path(plan) if plan is not None else path.parent if path.is_file() else path)
    if not any(name.startswith(f"{toolchain}:") for name in report.format.split(",")):
        raise UsageError(f"the plan is for {report.format} and not for {toolchain}")
    codes = onnx_codes(path) if toolchain == "onnx" else openvino_codes(path)
    verdicts = []
    for record in report.tensors:
        reason = _why_not_as_planned(codes.get(record.name.removesuffix(".weight")), record)
        verdicts.append(TensorVerdict(name=record.name, as_planned=not reason, reason=reason))
    known = {record.name for record in report.tensors} | set(report.unguarded)
    verdicts += [
        TensorVerdict(name=f"{layer}.weight", as_planned=False, reason="quantized, and not in the plan")
        for layer in codes
        if f"{layer}.weight" not in known
    ]
    return VerifyReport(
        created=now(),
        versions=installed_versions(),
        folder=path.name,
        format=report.format,
        tensors=tuple(verdicts),
        changed_files=(),
        unguarded=report.unguarded,
    )


def _why_not_as_planned(codes: Tensor | None, record: TensorRecord) -> str:
    if codes is None:
        return "not quantized"
    if tuple(codes.shape) != record.shape:
        return f"stored with shape {tuple(codes.shape)}"
    return "" if codes_digest(codes) == record.codes_sha256 else "other codes than planned"
