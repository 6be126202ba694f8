"""Compare what the stock quantizers store for guarded tensors with the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.checkpoint import Checkpoint, hash_file, open_checkpoint
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict, VerifyReport, read_manifest
from qcbguard_plugins.grids import Grid

if TYPE_CHECKING:
    pass

import hashlib
import math
from collections.abc import Mapping

import torch
from safetensors import safe_open

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint import TensorEntry
from qcbguard_plugins.checkpoint.manifest import other_codes
from qcbguard_plugins.errors import VerificationError
from qcbguard_plugins.grids import CodebookGrid, Int8Grid
from qcbguard_plugins.pipeline.stored import stock_digest


def verify_checkpoint(folder: Path | str, *, progress: Progress | None = None) -> VerifyReport:
    """Quantize a guarded folder with the stock quantizer and compare its codes with the plan.

    Args:
        folder: A folder that :func:`guard_checkpoint` made.
        progress: Called with the number of weights of each tensor when it is compared.

    Returns:
        A verdict for each tensor, and the weight files that changed since.

    Raises:
        CheckpointError: The folder or its manifest cannot be read.
    """
    folder = Path(folder)
    report = read_manifest(folder)
    checkpoint = open_checkpoint(folder)
    recorded = {file.name: file.sha256_out for file in report.files}
    changed = [name for name in checkpoint.shards if recorded.get(name) != hash_file(folder / name)]
    changed += sorted(set(recorded) - set(checkpoint.shards))
    return VerifyReport(
        created=now(),
        versions=installed_versions(),
        folder=folder.resolve().name,
        format=report.format,
        tensors=tuple(_verdicts(checkpoint, report, progress)),
        changed_files=tuple(changed),
        unguarded=report.unguarded,
    )


def _verdicts(checkpoint: Checkpoint, report: GuardReport, progress: Progress | None) -> Iterator[TensorVerdict]:
    for record in report.tensors:
        yield verify_tensor(checkpoint, record, report.format, report.toolchain)
        if progress is not None:
            progress(record.num_weights)


# Weights of a tensor that are read and compared at a time.
_WEIGHTS_PER_PART = 1 << 20


def verify_tensor(
    checkpoint: Checkpoint, record: TensorRecord, format: str, toolchain: Mapping[str, str], *, sampled: bool = False
) -> TensorVerdict:
    """Compare one tensor with its plan, from the stored dtype and from the one in which it is read.

    Args:
        checkpoint: The folder that holds it.
        record: Its plan.
        format: The formats of the run, for a record without one of its own.
        toolchain: The manifest's facts about llama.cpp.
        sampled: Of bitsandbytes only some blocks are asked about, and a twin about the others; see
            :mod:`qcbguard_plugins.backends.bitsandbytes.checked`.
    """
    reason = _why_not_as_planned(checkpoint, record, record.format or format, toolchain, sampled)
    return TensorVerdict(name=record.name, as_planned=not reason, reason=reason)


def require_as_planned(verdicts: Sequence[TensorVerdict]) -> None:
    """Raise where a verdict is no good one.

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


def twin_facts(formats: Sequence[str]) -> dict[str, str]:
    """Who answered for bitsandbytes in a run, for the record; nothing where it was bitsandbytes or was not asked."""
    if len(formats) > 1 or formats[0].startswith("gguf:"):
        return {}
    if not isinstance(get_grid(formats[0]), (CodebookGrid, Int8Grid)):
        return {}
    from qcbguard_plugins.backends.bitsandbytes.checked import checked_codes

    return {"bitsandbytes_twin": checked_codes().describe()}


def _why_not_as_planned(
    checkpoint: Checkpoint, record: TensorRecord, format: str, toolchain: Mapping[str, str], sampled: bool
) -> str:
    """Empty where the stock quantizer stores the planned codes."""
    entry = checkpoint.tensors.get(record.key)
    stored_shape = record.shape[::-1] if record.transposed else record.shape
    if entry is None:
        return "missing"
    if entry.shape != stored_shape or dtype_name(entry.dtype) != record.dtype:
        return f"stored as {entry.dtype} {entry.shape}"
    dtypes = [getattr(torch, name) for name in sorted({record.dtype, record.read_dtype})]
    if sampled and not record.transposed and "," not in format and not format.startswith("gguf:"):
        grid = get_grid(format)
        if isinstance(grid, (CodebookGrid, Int8Grid)):
            digests = _digests_in_parts(checkpoint, entry, grid, dtypes)
            return _first_other(dict(zip(dtypes, digests, strict=True)), record)
    weight = checkpoint.read(record.key)
    weight = weight.T if record.transposed else weight
    compared: Tensor | None = None
    for dtype in dtypes:
        read = weight.to(dtype)
        if compared is not None and torch.equal(read.float(), compared.float()):
            continue
        compared = read
        reason = _first_other({dtype: stock_digest(read, format, toolchain)}, record)
        if reason:
            return reason
    return ""


def _first_other(digests: Mapping[torch.dtype, str], record: TensorRecord) -> str:
    for dtype, digest in digests.items():
        if digest != record.codes_sha256:
            return other_codes(dtype)
    return ""


def _digests_in_parts(
    checkpoint: Checkpoint, entry: TensorEntry, grid: Grid, dtypes: Sequence[torch.dtype]
) -> list[str]:
    """The digests of the codes from each dtype; the tensor is never in memory as a whole."""
    from qcbguard_plugins.backends.bitsandbytes.checked import checked_codes

    quantize = checked_codes()
    hashes = [hashlib.sha256() for _ in dtypes]
    for part in _parts(checkpoint, entry, grid):
        for sha256, dtype in zip(hashes, dtypes, strict=True):
            sha256.update(quantize(part.to(dtype), grid).numpy().data)
    return [sha256.hexdigest() for sha256 in hashes]


def _parts(checkpoint: Checkpoint, entry: TensorEntry, grid: Grid) -> Iterator[Tensor]:
    """Some rows after the other, cut where no block is."""
    rows, columns = entry.shape
    size = grid.block_size_of((rows, columns))
    unit = size // math.gcd(size, columns)
    step = max(unit, _WEIGHTS_PER_PART // columns // unit * unit)
    with safe_open(checkpoint.path / entry.shard, framework="pt") as file:
        tensor = file.get_slice(entry.key)
        for start in range(0, rows, step):
            yield tensor[start : start + step]
