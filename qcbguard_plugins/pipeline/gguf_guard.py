"""Guard a GGUF file before ``llama-quantize`` reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.backends.ggml.checked import library_facts
from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.checkpoint.gguf_reader import GgufTensor
from qcbguard_plugins.checkpoint.gguf_staging import resumable_gguf
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.budget import require_room_for_gguf
from qcbguard_plugins.pipeline.gguf_plan import GgufPlan, make_gguf_plan
from qcbguard_plugins.pipeline.model import record_of
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight, stacked_digest

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
    """Guard a GGUF file into a new file that takes its place: plan it, and carry the plan out.

    Args:
        src: A GGUF file with F32, F16 or BF16 weights.
        dst: File to make; it must not exist.
        recipe: What ``llama-quantize`` will be given, such as ``Q4_K_M``.
        method: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        options: The user's flags for ``llama-quantize``, importance matrix, ggml library.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        progress: Called with the number of weights of each tensor when it is done.

    Raises:
        UsageError, CheckpointError, UnguardableError: The file cannot be planned for.
    """
    guard = as_guard(method)
    require_data_free(guard)
    return guard_planned_gguf(make_gguf_plan(src, recipe, options, ignore=ignore), dst, guard, progress=progress)


def guard_planned_gguf(
    plan: GgufPlan,
    dst: Path | str,
    guard: Guard,
    *,
    progress: Progress | None = None,
    budget_bytes: int | None = None,
) -> GuardReport:
    """Guard a GGUF file as planned.

    The new file has the same tensors, types, shapes and metadata, and one entry more, ``qcbguard.provenance``. Only the
    weights that ``llama-quantize`` will quantize differ. It appears whole or not at all; a run that was interrupted is
    gone on with by the same call. One tensor is in memory at a time.

    Args:
        plan: The plan.
        dst: File to make; it must not exist.
        guard: The method; one that needs no calibration, since a GGUF file is no model that could be run here.
        progress: Called with the number of weights of each tensor when it is done.
        budget_bytes: What the process may hold in memory; by default what the machine has left.

    Returns:
        The report, which the new file carries too.

    Raises:
        UsageError, CheckpointError, TargetExistsError, MissingDependencyError, UnguardableError, MemoryBudgetError: As
            their names say; ``dst`` is not made.
    """
    require_data_free(guard)
    require_room_for_gguf(plan.targets, budget_bytes)
    request = {
        "format": f"gguf:{plan.recipe}",
        "types": plan.types,
        "ignored": plan.ignored,
        "toolchain": plan.toolchain | library_facts(plan.types.values(), plan.options),
        "min_landed": plan.options.min_landed,
        "versions": installed_versions(),
        **guard.describe(),
    }
    text_bytes = report_bytes(plan.file.tensors)
    with resumable_gguf(Path(dst), plan.file, request, plan.types, GGUF_PROVENANCE_KEY, text_bytes) as workspace:
        run = GgufRun(plan, replace(guard, seed=workspace.remember("seed", lambda: guard.with_seed().seed)))
        for tensor in plan.targets:
            stored, digest = workspace.read(tensor)
            record = workspace.resumed(tensor, digest)
            if record is None:
                weight, record = run.guard_tensor(tensor, stored)
                workspace.write(tensor, digest, weight, record)
            run.records[tensor.name] = record
            if progress is not None:
                progress(tensor.num_weights)
        report = run.report()
        workspace.write_text(report.model_dump_json())
    return report


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


class GgufRun:
    """Guards tensors of a GGUF file, in any order, and keeps a record of each.

    Attributes:
        plan: The plan.
        guard: The method, its seed drawn.
        records: What the report will say of each target.
    """

    def __init__(self, plan: GgufPlan, guard: Guard) -> None:
        require_data_free(guard)
        self.plan, self.guard = plan, guard.with_seed()
        self.records: dict[str, TensorRecord] = {}
        self._started = time.monotonic()

    def guard_tensor(self, tensor: GgufTensor, weight: Tensor) -> tuple[Tensor, TensorRecord]:
        """Guard one tensor, whose memory may take the outcome; stacked experts are guarded matrix by matrix."""
        matrices = weight.view(-1, *tensor.shape[-2:])
        importance = self.plan.imatrix.of(tensor.name, len(matrices), tensor.shape[-1])
        results = [
            self._guard_matrix(tensor, matrix, i, None if importance is None else importance[i])
            for i, matrix in enumerate(matrices)
        ]
        first = results[0].weight
        guarded = first if len(results) == 1 else torch.cat([result.weight for result in results])
        return guarded.view(weight.shape), self._record(tensor, results)

    def _guard_matrix(self, tensor: GgufTensor, matrix: Tensor, index: int, importance: Tensor | None) -> GuardedWeight:
        assert self.guard.seed is not None, "the seed is drawn once a run"
        options = self.plan.options
        grid = gguf_grid(
            self.plan.types[tensor.name],
            outtype=matrix.dtype,
            importance=importance,
            library_path=options.library_path,
        )
        grid.min_landed = options.min_landed
        name = f"{tensor.name}[{index}]" if len(tensor.shape) > 2 else tensor.name
        return guard_weight(matrix, grid, self.guard.method, seed=self.guard.seed, name=name, overwrite=True)

    def _record(self, tensor: GgufTensor, results: Sequence[GuardedWeight]) -> TensorRecord:
        columns = tensor.shape[-1]
        record = record_of(results[0], name=tensor.name, transposed=False)
        energy = sum(result.energy for result in results)
        change = sum(result.relative_change**2 * result.energy for result in results)
        return record.model_copy(
            update={
                "shape": (tensor.num_weights // columns, columns),
                "num_weights": tensor.num_weights,
                "num_moved": sum(result.num_moved for result in results),
                "num_frozen": sum(result.num_frozen for result in results),
                "num_landed": sum(result.num_landed for result in results),
                "relative_change": (change / energy) ** 0.5 if energy else 0.0,
                "codes_sha256": stacked_digest([result.digest for result in results]),
                "format": f"gguf:{self.plan.types[tensor.name]}",
            }
        )

    def report(self) -> GuardReport:
        """The report, once every target is guarded."""
        plan = self.plan
        return GuardReport(
            created=now(),
            versions=installed_versions(),
            source=plan.file.path.name,
            format=f"gguf:{plan.recipe}",
            **self.guard.describe(),
            tensors=tuple(self.records[tensor.name] for tensor in plan.targets),
            unguarded=plan.ignored,
            toolchain=plan.toolchain | library_facts(plan.types.values(), plan.options),
            elapsed_s=time.monotonic() - self._started,
        )
