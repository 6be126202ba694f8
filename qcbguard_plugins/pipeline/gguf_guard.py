"""Guard a GGUF file before ``llama-quantize`` reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.checkpoint.gguf_staging import resumable_gguf
from qcbguard_plugins.checkpoint.manifest import GuardReport
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.budget import plan_gguf_memory
from qcbguard_plugins.pipeline.gguf_plan import GgufPlan, make_gguf_plan
from qcbguard_plugins.pipeline.guard import RunnableModel, guard_targets
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.settings import Guard, as_guard

# Room for the report in the header, which is written before the report is known.
_REPORT_BYTES, _RECORD_BYTES = 8192, 704


def guard_gguf(
    src: Path | str,
    dst: Path | str,
    formats: str,
    guard: Guard | Defense | str = "stochastic",
    *,
    options: GgufOptions | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
    budget_bytes: int | None = None,
) -> GuardReport:
    """Guard a GGUF file into a new file that takes its place: plan it, and carry the plan out.

    Args:
        src: A GGUF file with F32, F16 or BF16 weights.
        dst: File to make; it must not exist.
        formats: The recipe that ``llama-quantize`` will be given, such as ``Q4_K_M`` or ``gguf:Q4_K_M``. A file serves
            one.
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        options: Your flags for ``llama-quantize``, importance matrix, ggml library.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        progress: Called with the number of weights of each tensor when it is done.
        budget_bytes: What the process may hold in memory; by default what the machine has left.

    Raises:
        UsageError, CheckpointError, UnguardableError: The file cannot be planned for.
        TargetExistsError, MissingDependencyError, MemoryBudgetError: As their names say; ``dst`` is not made.
    """
    requested = as_guard(guard)
    require_data_free(requested)
    plan = make_gguf_plan(src, formats.removeprefix("gguf:"), options, ignore=ignore)
    return guard_planned_gguf(plan, dst, requested, progress=progress, budget_bytes=budget_bytes)


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
    plan_gguf_memory(plan, budget_bytes)
    started = time.monotonic()
    request = {
        "formats": plan.formats,
        "types": {target.name: target.formats for target in plan.targets},
        "ignored": plan.ignored,
        "toolchain": plan.all_facts(),
        "min_as_planned": plan.options.min_as_planned,
        "versions": versions(),
        **guard.describe(),
    }
    names = [target.key for target in plan.targets]
    text_bytes = report_bytes(plan.file.tensors)
    with resumable_gguf(Path(dst), plan.file, request, names, GGUF_PROVENANCE_KEY, text_bytes) as staging:
        guard = replace(guard, seed=staging.remember("seed", lambda: guard.with_seed().seed))
        # What the library stored is the plan: only the file that llama-quantize writes can be compared with it.
        records = [done.record for done in guard_targets(plan, guard, staging, _no_model, progress)]
        report = report_of(plan, guard, records, started)
        staging.write_text(report.model_dump_json())
    return report


def report_bytes(names: Iterable[str]) -> int:
    """Bytes to reserve in the header for the report about tensors of these names, as JSON in one line."""
    return _REPORT_BYTES + sum(_RECORD_BYTES + 3 * len(name) for name in names)


def require_data_free(guard: Guard) -> None:
    """Refuse a method that needs a forward pass."""
    if guard.method.needs_calibration:
        raise UsageError(
            f"{guard.method.name} needs a forward pass, and a GGUF file cannot be run here",
            remedy="Guard the Hugging Face folder with 'qcbguard guard MODEL --for gguf:TYPE' before it is converted, "
            "or use --method stochastic.",
        )


def _no_model() -> RunnableModel:
    raise AssertionError("a method that needs a model was refused")
