"""Compare what the stock quantizers store with the plan: of a guarded folder, and of what they wrote."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.backends.base import StoredCodes
from qcbguard_plugins.backends.formats import BACKENDS, backend_of, versions
from qcbguard_plugins.checkpoint import Checkpoint, TensorEntry, hash_file, open_checkpoint
from qcbguard_plugins.checkpoint.folder_record import compare_folder
from qcbguard_plugins.checkpoint.manifest import (
    MANIFEST_FILE,
    GuardReport,
    TensorRecord,
    TensorVerdict,
    VerifyReport,
    read_manifest,
)
from qcbguard_plugins.checkpoint.reader import open_files
from qcbguard_plugins.errors import CheckpointError, UsageError, VerificationError
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.guard_target import verify_target

# Weights of a tensor that are read and compared at a time.
_WEIGHTS_PER_PART = 1 << 20


@dataclass(frozen=True)
class Verification:
    """A comparison that is ready to run: what is compared is open, and its plan is read.

    Attributes:
        report: The plan.
        run: Compares, calling its argument with the number of weights of each tensor, and returns the report.
    """

    report: GuardReport
    run: Callable[[Progress | None], VerifyReport]

    @property
    def num_weights(self) -> int:
        return sum(record.num_weights for record in self.report.tensors)


def verify(path: Path | str, *, plan: Path | str | None = None, progress: Progress | None = None) -> VerifyReport:
    """Compare codes with the plan: those of a guarded folder, or those in what a stock quantizer wrote.

    Args:
        path: A folder that :func:`~qcbguard_plugins.guard_checkpoint` made, which the stock quantizer is run on; or
            what a stock quantizer wrote: a GGUF file, a folder of GPTQ or OpenVINO, an ONNX file.
        plan: For what a quantizer wrote: the guarded folder or GGUF file that it was made from, where the plan does not
            lie in it or beside it.
        progress: Called with the number of weights of each tensor when it is compared.

    Returns:
        A verdict for each tensor, and the weight files of a folder that changed since.

    Raises:
        CheckpointError: Something cannot be read, is not quantized, or there is no plan.
        UsageError: The plan is for another quantizer, or goes with no such path.
        MissingDependencyError: The library that reads the file is missing.
    """
    return open_verification(Path(path), None if plan is None else Path(plan)).run(progress)


def verify_checkpoint(folder: Path | str, *, progress: Progress | None = None) -> VerifyReport:
    """Quantize a guarded folder with the stock quantizer and compare its codes with the plan; see :func:`verify`."""
    return _open_folder(Path(folder)).run(progress)


def open_verification(path: Path, plan: Path | None) -> Verification:
    """Open what is to be compared; see :func:`verify`."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist", remedy="Give a guarded folder, or what a stock quantizer wrote."
        )
    artifact = next((found for backend in BACKENDS.values() if (found := backend.open_artifact(path))), None)
    if artifact is not None:
        report = artifact.find_plan(plan)
        return Verification(report, partial(_verify_artifact, artifact, report))
    if plan is not None:
        raise UsageError("--plan goes with what a quantizer wrote; a guarded folder carries its own plan")
    return _open_folder(path)


def _open_folder(folder: Path) -> Verification:
    report = read_manifest(folder)
    if report.needs_artifact:
        raise CheckpointError(
            "the plan uses an importance matrix, so the folder alone cannot be verified",
            remedy=f"Convert and quantize it, then: qcbguard verify QUANTIZED.gguf --plan {folder}",
        )
    if report.folder is None:
        return Verification(report, partial(_verify_folder, open_checkpoint(folder), report))
    # What was added is a finding: the recorded files are compared whatever else there is.
    shards = tuple(file.name for file in report.files)
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} weight files of {MANIFEST_FILE} are missing", details=missing)
    return Verification(report, partial(_verify_folder, open_files(folder, {}, shards), report))


def _verify_folder(checkpoint: Checkpoint, report: GuardReport, progress: Progress | None) -> VerifyReport:
    recorded = {file.name: file.sha256_out for file in report.files}
    problems: list[str] = []
    if report.folder is None:  # an older manifest, which names weight files alone
        changed = [name for name in checkpoint.shards if recorded.get(name) != hash_file(checkpoint.path / name)]
        changed += sorted(set(recorded) - set(checkpoint.shards))
    else:
        problems = compare_folder(checkpoint.path, report.folder, recorded, own=frozenset({MANIFEST_FILE}))
        changed = list(dict.fromkeys(problem.split("  ")[0] for problem in problems))
    verdicts = []
    for record in report.tensors:
        verdicts.append(verify_tensor(checkpoint, target_of_record(record, report), record))
        if progress is not None:
            progress(record.num_weights)
    return VerifyReport(
        versions=versions(),
        folder=checkpoint.path.resolve().name,
        formats=report.formats,
        tensors=tuple(verdicts),
        changed_files=tuple(changed),
        unguarded=report.unguarded,
        uncovered=report.uncovered,
        folder_problems=tuple(problems),
    )


def target_of_record(record: TensorRecord, report: GuardReport) -> Target:
    """The target that a manifest describes, with the grids of the quantizers that will read it."""
    backends = (backend_of(name).recorded(report.toolchain) for name in record.formats)
    return Target(
        name=record.name,
        shape=record.shape,
        dtype=getattr(torch, record.dtype),
        grids=tuple(backend.grid(name) for backend, name in zip(backends, record.formats, strict=True)),
        transposed=record.transposed,
        read_dtype=getattr(torch, record.read_dtype),
        key=record.key,
        stored_name=record.stored_name,
    )


def verify_tensor(
    checkpoint: Checkpoint, target: Target, record: TensorRecord, *, sampled: bool = False
) -> TensorVerdict:
    """Compare one tensor of a folder with its plan, from the stored dtype and from the one in which it is read.

    Args:
        checkpoint: The folder that holds it.
        target: The tensor.
        record: Its plan.
        sampled: The stock quantizer may be asked about some blocks, and a reimplementation about the others; see
            :meth:`~qcbguard_plugins.backends.base.Backend.quick_codes`.
    """
    entry = checkpoint.tensors.get(record.key)
    reason = ""
    if entry is None:
        reason = "missing"
    elif entry.shape != target.stored_shape or dtype_name(entry.dtype) != record.dtype:
        reason = f"stored as {entry.dtype} {entry.shape}"
    if entry is None or reason:
        return TensorVerdict(name=record.name, as_planned=False, reason=reason)
    if sampled and not target.transposed and len(target.grids) == 1 and target.grids[0].in_segments:
        return _verify_in_parts(checkpoint, entry, target, record)
    return verify_target(target, checkpoint.read(record.key), record)


def require_as_planned(verdicts: Sequence[TensorVerdict]) -> None:
    """Raise where a tensor is not stored as planned.

    Raises:
        VerificationError: The stock quantizer would store other codes than planned.
    """
    failed = [f"{verdict.name}  {verdict.reason}" for verdict in verdicts if not verdict.as_planned]
    if failed:
        raise VerificationError(
            f"the stock quantizer would not store {len(failed)} of {len(verdicts)} tensors as planned",
            details=failed,
            remedy="Nothing was written. Run 'qcbguard doctor' and report its output with the names above.",
        )


def _verify_artifact(artifact: StoredCodes, report: GuardReport, progress: Progress | None) -> VerifyReport:
    verdicts = []
    for record in report.tensors:
        verdicts.append(artifact.compare(record))
        if progress is not None:
            progress(record.num_weights)
    known = {verdict.name for verdict in verdicts} | set(report.unguarded)
    verdicts += [
        TensorVerdict(name=name, as_planned=False, reason="quantized, and not in the plan")
        for name in artifact.quantized()
        if name not in known
    ]
    return VerifyReport(
        versions=versions(),
        folder=artifact.path.resolve().name,
        formats=report.formats,
        tensors=tuple(verdicts),
        changed_files=(),
        unguarded=report.unguarded,
    )


def _verify_in_parts(checkpoint: Checkpoint, entry: TensorEntry, target: Target, record: TensorRecord) -> TensorVerdict:
    """Compare a tensor part by part; it is never in memory as a whole."""
    (grid,) = target.grids
    backend = backend_of(grid.name)
    dtypes = sorted({target.dtype, target.read_dtype or target.dtype}, key=str)
    hashes = [hashlib.sha256() for _ in dtypes]
    for part in _parts(checkpoint, entry, grid.block_size_of(target.shape)):
        for sha256, dtype in zip(hashes, dtypes, strict=True):
            sha256.update(backend.quick_codes(part.to(dtype), grid).numpy().data)
    for sha256, dtype in zip(hashes, dtypes, strict=True):
        if sha256.hexdigest() != record.codes_sha256:
            return TensorVerdict.other_codes(record.name, dtype)
    return TensorVerdict(name=record.name, as_planned=True)


def _parts(checkpoint: Checkpoint, entry: TensorEntry, block_size: int) -> Iterator[Tensor]:
    """Some rows after the other, cut where no block is."""
    rows, columns = entry.shape
    unit = block_size // math.gcd(block_size, columns)
    step = max(unit, _WEIGHTS_PER_PART // columns // unit * unit)
    with safe_open(checkpoint.path / entry.shard, framework="pt") as file:
        tensor = file.get_slice(entry.key)
        for start in range(0, rows, step):
            yield tensor[start : start + step]
