"""Guard a GGUF file before ``llama-quantize`` reads it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.backends.gguf.grids import gguf_grid
from qcbguard_plugins.backends.gguf.judge import checked_quantizer
from qcbguard_plugins.backends.gguf.options import GgufOptions
from qcbguard_plugins.backends.gguf.plan import GgufPlan, make_gguf_plan
from qcbguard_plugins.checkpoint import publish_file
from qcbguard_plugins.checkpoint.gguf_reader import GgufTensor
from qcbguard_plugins.checkpoint.gguf_writer import rewrite_gguf
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.guard import Guard, as_guard
from qcbguard_plugins.model import Progress
from qcbguard_plugins.report.model import GuardReport, TensorRecord, installed_versions, now
from qcbguard_plugins.rounding import guard_weight

# The metadata entry that carries the report; llama-quantize copies it along.
PROVENANCE_KEY = "qcbguard.provenance"
# Room for the report in the header, which is written before the report is known.
_REPORT_BYTES, _RECORD_BYTES = 8192, 640


def guard_gguf(
    src: Path | str,
    dst: Path | str,
    recipe: str,
    method: Guard | Defense | str = "stochastic",
    *,
    options: GgufOptions | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> GuardReport:
    """Guard a GGUF file into a new file that takes its place.

    The new file has the same tensors, types, shapes and metadata, and one entry more, ``qcbguard.provenance``. Only the
    weights that ``llama-quantize`` will quantize differ. It appears whole or not at all, and one tensor is in memory at
    a time.

    Args:
        src: A GGUF file with F32, F16 or BF16 weights.
        dst: File to make; it must not exist.
        recipe: What ``llama-quantize`` will be given, such as ``Q4_K_M``.
        method: A method's name, a defense, or a :class:`~qcbguard_plugins.guard.Guard`; one that needs no calibration,
            since a GGUF file is no model that could be run here.
        options: The user's flags for ``llama-quantize``, importance matrix, ggml library.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        progress: Called with the number of weights of each tensor when it is done.

    Returns:
        The report, which the new file carries too.

    Raises:
        UsageError, CheckpointError, TargetExistsError, MissingDependencyError, UnguardableError: As their names say;
            ``dst`` is not made.
    """
    start = time.monotonic()
    options = options or GgufOptions()
    guard = as_guard(method).with_seed()
    require_data_free(guard)
    plan = make_gguf_plan(src, recipe, options, ignore=ignore)
    records: dict[str, TensorRecord] = {}

    def new_weight(tensor: GgufTensor) -> Tensor:
        weight, records[tensor.name] = guard_tensor(tensor, plan.file.read(tensor.name), plan, guard, options)
        if progress is not None:
            progress(tensor.num_weights)
        return weight

    finished: list[GuardReport] = []

    def text() -> str:
        finished.append(report_of(plan, guard, records, options, time.monotonic() - start))
        return finished[0].model_dump_json()

    with publish_file(Path(dst), plan.file.path) as path:
        rewrite_gguf(plan.file, path, plan.types, new_weight, PROVENANCE_KEY, text, report_bytes(plan.file.tensors))
    return finished[0]


def report_of(
    plan: GgufPlan, guard: Guard, records: Mapping[str, TensorRecord], options: GgufOptions, elapsed_s: float
) -> GuardReport:
    """The report of a run over a GGUF file."""
    return GuardReport(
        created=now(),
        versions=installed_versions(),
        source=plan.file.path.name,
        format=f"gguf:{plan.recipe}",
        **guard.describe(),
        tensors=tuple(records[tensor.name] for tensor in plan.targets),
        unguarded=plan.ignored,
        toolchain=plan.toolchain | library_facts(plan.types.values(), options),
        elapsed_s=elapsed_s,
    )


def report_bytes(names: Iterable[str]) -> int:
    """Room that the report about tensors of these names may take, as JSON in one line."""
    return _REPORT_BYTES + sum(_RECORD_BYTES + 3 * len(name) for name in names)


def require_data_free(guard: Guard) -> None:
    """Refuse a method that needs a forward pass."""
    if guard.method.needs_calibration:
        raise UsageError(
            f"{guard.method.name} needs a forward pass, and a GGUF file cannot be run here",
            remedy="Guard the Hugging Face folder with 'qcbguard guard MODEL --for gguf:TYPE' before it is converted, "
            "or use --method stochastic.",
        )


def guard_tensor(
    tensor: GgufTensor, weight: Tensor, plan: GgufPlan, guard: Guard, options: GgufOptions
) -> tuple[Tensor, TensorRecord]:
    """Guard one tensor of a GGUF file; stacked experts are guarded matrix by matrix."""
    assert guard.seed is not None, "the seed is drawn once a run"
    type_name = plan.types[tensor.name]
    columns = tensor.shape[-1]
    matrices = weight.view(-1, *tensor.shape[-2:])
    importance = plan.imatrix.of(tensor.name, len(matrices), columns)
    guarded, digests, moved, frozen, landed, change, energy = [], [], 0, 0, 0, 0.0, 0.0
    for i, matrix in enumerate(matrices):
        grid = gguf_grid(
            type_name,
            outtype=weight.dtype,
            importance=None if importance is None else importance[i],
            library_path=options.library_path,
        )
        grid.min_landed = options.min_landed
        name = tensor.name if len(matrices) == 1 else f"{tensor.name}[{i}]"
        result = guard_weight(matrix, grid, guard.method, seed=guard.seed, name=name)
        guarded.append(result.weight)
        digests.append(result.digest)
        moved, frozen, landed = moved + result.num_moved, frozen + result.num_frozen, landed + result.num_landed
        square = float(matrix.float().square().sum())
        energy, change = energy + square, change + result.relative_change**2 * square
    record = TensorRecord(
        name=tensor.name,
        key=tensor.name,
        shape=(tensor.num_weights // columns, columns),
        transposed=False,
        dtype=str(weight.dtype).removeprefix("torch."),
        read_dtype=str(weight.dtype).removeprefix("torch."),
        num_weights=tensor.num_weights,
        num_moved=moved,
        num_frozen=frozen,
        num_landed=landed,
        relative_change=(change / energy) ** 0.5 if energy else 0.0,
        codes_sha256=stacked_digest(digests),
        format=f"gguf:{type_name}",
    )
    return torch.cat(guarded).view(weight.shape), record


def stacked_digest(digests: Sequence[str]) -> str:
    """The digest of a stack of matrices; of a single one it is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def library_facts(type_names: Iterable[str], options: GgufOptions) -> dict[str, str]:
    """The ggml library that was asked, for the record; none where formulas were enough."""
    if not any(BLOCK_TYPES[name].searched for name in type_names) and options.imatrix_path is None:
        return {}
    quantizer = checked_quantizer(options.library_path)
    return {"ggml": quantizer.library.version, "ggml_twin": quantizer.describe()}
