"""Guard a checkpoint folder or a GGUF file: plan, guard, verify, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.checkpoint import resumable_folder
from qcbguard_plugins.checkpoint.folder_record import record_folder
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, GuardReport, TensorRecord, TensorVerdict, write_manifest
from qcbguard_plugins.checkpoint.purification_note import note_purification
from qcbguard_plugins.checkpoint.staging import Staging
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.models.hessians import Weights, WeightsInMemory
from qcbguard_plugins.models.loading import load_full_precision, load_tokenizer
from qcbguard_plugins.models.streaming import StreamedWeights
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.budget import model_dtype, plan_memory
from qcbguard_plugins.pipeline.calibrated import guard_layers, tokens_for
from qcbguard_plugins.pipeline.guard_target import guard_target
from qcbguard_plugins.pipeline.plan import FolderPlan, Plan, make_plan
from qcbguard_plugins.pipeline.publish import copy_other_files, hash_files
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.segments import can_be_segmented, guard_in_segments
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.verify import require_as_planned, verify_tensor


def guard_checkpoint(
    src: Path | str,
    dst: Path | str,
    formats: Sequence[str] | str = ("nf4",),
    guard: Guard | Defense | str = "feedback",
    *,
    ignore: Sequence[str] = (),
    backends: Sequence[Backend] = (),
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    budget_bytes: int | None = None,
) -> GuardReport:
    """Guard a checkpoint folder into a new folder that takes its place.

    The new folder has the same files, tensors, dtypes, shapes and configuration; only the weights that the stock
    quantizer will read differ, and a manifest says how. It appears whole or not at all.

    Args:
        src: Folder with ``config.json`` and safetensors files of float32, float16 or bfloat16 weights, or the name of
            such a model on the hub.
        dst: Folder to make; it must not exist.
        formats: The formats to guard for: ``nf4``, ``fp4``, ``int8``, 4-bit with a block size as in ``nf4-b128``, or a
            GGUF recipe as ``gguf:Q4_K_M``. With several the folder serves each of them, or the error says which tensors
            cannot.
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard` with seed and
            calibration.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        backends: Backends with settings of yours: how llama.cpp will convert and quantize the folder, for a GGUF
            recipe, is ``Ggml(GgufOptions(...))``.
        progress: Called with the number of weights of each tensor when it is done.
        group: The processes that share the work; each of them calls this with the same arguments and gets the report.
        budget_bytes: What one process may hold in memory; by default what the machine has left. A model that does not
            fit is read block by block, with the same outcome.

    Returns:
        The report, which is also written to ``dst/qcbguard.json``.

    Raises:
        UsageError, CheckpointError, TargetExistsError, CalibrationError, UnguardableError, MemoryBudgetError: As their
            names say; ``dst`` is not made.
        VerificationError: The stock quantizer would store other codes than planned; ``dst`` is not made.
    """
    requested = as_guard(guard)
    plan = make_plan(src, formats, ignore=ignore, backends=backends)
    return guard_planned(plan, dst, requested, progress=progress, group=group, budget_bytes=budget_bytes)


def guard_planned(
    plan: FolderPlan,
    dst: Path | str,
    guard: Guard,
    *,
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    budget_bytes: int | None = None,
) -> GuardReport:
    """Carry out a plan; see :func:`guard_checkpoint`."""
    started = time.monotonic()
    if guard.method.needs_calibration:
        guard = guard.with_source(has_tokenizer=load_tokenizer(plan.checkpoint.path) is not None)
    streamed = group.broadcast(plan_memory(plan, guard, budget_bytes).streamed)
    request = {"formats": plan.formats, "ignored": plan.ignored, "versions": versions(), **guard.describe()}
    with resumable_folder(Path(dst), plan.checkpoint, request, group) as staging:
        left_out: list[str] = []
        if group.rank == 0:
            guard = replace(guard, seed=staging.remember("seed", lambda: guard.with_seed().seed))
            left_out = copy_other_files(plan.checkpoint, staging.folder)
        guard, left_out = group.broadcast((guard, left_out))
        shards = group.partition(plan.checkpoint.shards, plan.checkpoint.num_bytes_of)
        staging.copy_rest(shards, [target.key for target in plan.targets])
        group.barrier()
        made = replace(plan.checkpoint, path=staging.folder)
        by_name = {target.name: target for target in plan.targets}
        records, verdicts = [], []
        for done in guard_targets(plan, guard, staging, _Loader(plan, streamed=streamed), progress, group):
            records.append(done.record)
            # With an importance matrix only the quantized file can be verified; what the quantizer stores is the plan.
            if "imatrix_sha256" not in plan.facts:
                target = by_name[done.record.name]
                verdicts.append(done.verdict or verify_tensor(made, target, done.record, sampled=True))
        require_as_planned(group.gather(verdicts))
        files = hash_files(plan.checkpoint, staging.folder, group)
        recorded_elsewhere = frozenset({*plan.checkpoint.shards, MANIFEST_FILE})
        folder = group.broadcast(
            record_folder(staging.folder, except_for=recorded_elsewhere) if group.rank == 0 else None
        )
        report = report_of(
            plan, guard, group.gather(records), started, files=files, left_out=left_out, folder=folder,
            purification=note_purification(plan.checkpoint.path, files),
        )  # fmt: skip
        if group.rank == 0:
            write_manifest(report, staging.folder)
    return report


@dataclass(frozen=True)
class Done:
    """A target that is guarded.

    Attributes:
        record: The plan for it.
        verdict: What the stock quantizer said, where it has been asked.
    """

    record: TensorRecord
    verdict: TensorVerdict | None = None


@dataclass(frozen=True)
class RunnableModel:
    """A model in full precision that calibration can run.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, or ``None``.
        weights: Where its weights are.
    """

    model: Any
    tokenizer: Any
    weights: Weights


def guard_targets(
    plan: Plan,
    guard: Guard,
    staging: Staging,
    load_model: Callable[[], RunnableModel],
    progress: Progress | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Done]:
    """Guard this process's share of the targets of a plan, except those that an interrupted run has done.

    Args:
        plan: The plan.
        guard: The method, its seed drawn.
        staging: Where targets are read, and guarded ones go.
        load_model: Loads the model, for a method that needs calibration.
        progress: Called with the number of weights of each target when it is done.
        group: The processes that share the targets.

    Yields:
        Each target when it is done.
    """
    pending = []
    for target in group.partition(plan.targets, lambda target: target.num_weights):
        record = staging.resumed(target.key)
        if record is not None:
            done = Done(record)
        elif guard.method.needs_calibration:
            pending.append((target.name, staging.source_hash(target.key)))
            continue
        else:
            done = _guard_one(target, guard, staging)
        yield done
        if progress is not None:
            progress(target.num_weights)
    # Who has nothing left to guard takes part in the calibration of the others.
    if group.gather(pending):
        yield from _guard_calibrated(plan, dict(pending), guard, staging, load_model(), progress, group)


def _guard_one(target: Target, guard: Guard, staging: Staging) -> Done:
    if can_be_segmented(target, guard):
        return Done(*guard_in_segments(target, guard, staging))
    stored, digest = staging.read(target.key)
    # ``stored`` was read for this target alone.
    guarded, record = guard_target(target, stored, guard, overwrite=True)
    staging.write(target.key, digest, guarded, record)
    return Done(record)


def _guard_calibrated(
    plan: Plan,
    pending: dict[str, str],
    guard: Guard,
    staging: Staging,
    loaded: RunnableModel,
    progress: Progress | None,
    group: ProcessGroup,
) -> Iterator[Done]:
    """Guard the pending targets, by name with the hash of their source, on the model in full precision.

    The method is told of all targets, so that a run that goes on where another stopped chooses as one that never did.
    """
    tokens = tokens_for(guard, loaded.model.config, loaded.tokenizer)
    for target, guarded, record in guard_layers(
        loaded.model, plan.targets, guard, tokens, progress, pending=pending, weights=loaded.weights, group=group
    ):
        staging.write(target.key, pending[target.name], guarded, record)
        yield Done(record)


class _Loader:
    """Loads the model of a folder, whole or block by block."""

    def __init__(self, plan: FolderPlan, *, streamed: bool) -> None:
        self._plan, self._streamed = plan, streamed

    def __call__(self) -> RunnableModel:
        checkpoint, dtype = self._plan.checkpoint, model_dtype(self._plan.targets)
        tokenizer = load_tokenizer(checkpoint.path)
        if self._streamed:
            streamed = StreamedWeights(checkpoint, dtype, [target.layer for target in self._plan.targets])
            return RunnableModel(streamed.model, tokenizer, streamed)
        model = load_full_precision(checkpoint.path, dtype)
        return RunnableModel(model, tokenizer, WeightsInMemory(model))
