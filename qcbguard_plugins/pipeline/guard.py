"""Guard a checkpoint folder: plan, guard, verify, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qcbguard_plugins._util.distributed import ALONE, Team
from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.checkpoint import Checkpoint, Workspace, resumable_folder
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, GuardReport, TensorRecord, TensorVerdict
from qcbguard_plugins.checkpoint.purification_note import note_purification
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.calibration import calibration_tokens
from qcbguard_plugins.models.hessians import Weights, WeightsInMemory
from qcbguard_plugins.pipeline.budget import model_dtype, plan_memory
from qcbguard_plugins.pipeline.model import guard_layers, record_of
from qcbguard_plugins.pipeline.multi_format import coarsest_first, require_all_grids
from qcbguard_plugins.pipeline.plan import Plan, make_plan
from qcbguard_plugins.pipeline.segments import goes_in_one_pass, guard_in_one_pass
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.target import Layer, Target
from qcbguard_plugins.pipeline.verify import require_as_planned, twin_facts, verify_tensor
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight

if TYPE_CHECKING:
    from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.pipeline.publish import copy_other_files, hash_files


def guard_checkpoint(
    src: Path | str,
    dst: Path | str,
    formats: Sequence[str] = ("nf4",),
    method: Guard | Defense | str = "feedback",
    *,
    ignore: Sequence[str] = (),
    gguf: GgufOptions | None = None,
    progress: Progress | None = None,
) -> GuardReport:
    """Guard a checkpoint folder into a new folder that takes its place.

    The new folder has the same files, tensors, dtypes, shapes and configuration; only the weights that the stock
    quantizer will read differ, and a manifest says how. It appears whole or not at all.

    Args:
        src: Folder with ``config.json`` and safetensors files of float32, float16 or bfloat16 weights.
        dst: Folder to make; it must not exist.
        formats: The formats to guard for: ``nf4``, ``fp4``, ``int8``, 4-bit with a block size as in ``nf4-b128``, or a
            GGUF recipe as ``gguf:Q4_K_M``. With several the folder serves each of them, or the error says which tensors
            cannot.
        method: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard` with seed
            and calibration.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        gguf: How llama.cpp will convert and quantize the folder, for a GGUF recipe.
        progress: Called with the number of weights of each tensor when it is done.

    Returns:
        The report, which is also written to ``dst/qcbguard.json``.

    Raises:
        UsageError, CheckpointError, TargetExistsError, CalibrationError, UnguardableError: As their names say; ``dst``
            is not made.
        VerificationError: The stock quantizer would store other codes than planned; ``dst`` is not made.
    """
    guard = as_guard(method)
    return guard_planned(make_plan(src, ",".join(formats), ignore=ignore, gguf=gguf), dst, guard, progress=progress)


def guard_planned(
    plan: Plan,
    dst: Path | str,
    guard: Guard,
    *,
    progress: Progress | None = None,
    team: Team = ALONE,
    budget_bytes: int | None = None,
) -> GuardReport:
    """Carry out a plan; see :func:`guard_checkpoint`.

    Args:
        plan: What to guard.
        dst: Folder to make.
        guard: The method, its seed and calibration.
        progress: Called with the number of weights of each tensor when it is done.
        team: The processes that share the work; each of them calls this with the same arguments and gets the report.
        budget_bytes: What one process may hold in memory; by default what the machine has left. A model that does not
            fit is read block by block, with the same outcome.

    Raises:
        MemoryBudgetError: It cannot be done within the budget.
    """
    start = time.monotonic()
    streamed = team.first(plan_memory(plan, guard, budget_bytes).streamed)
    request = {"format": plan.format, "ignored": plan.ignored, "versions": installed_versions(), **guard.describe()}
    entries = [plan.checkpoint.tensors[target.key] for target in plan.targets]
    with resumable_folder(Path(dst), plan.checkpoint, request, team) as workspace:
        left_out: list[str] = []
        if team.rank == 0:
            guard = replace(guard, seed=workspace.remember("seed", lambda: guard.with_seed().seed))
            left_out = copy_other_files(plan.checkpoint, workspace.folder)
        guard, left_out = team.first((guard, left_out))
        workspace.copy_rest(team.share(plan.checkpoint.shards, plan.checkpoint.num_bytes_of), entries)
        team.wait()
        toolchain = plan.gguf.toolchain if plan.gguf else {}
        made = replace(plan.checkpoint, path=workspace.folder)
        guarded, verdicts = [], []
        for record, verdict in _guard_targets(plan, guard, workspace, progress, team, streamed=streamed):
            guarded.append(record)
            # With an importance matrix only the quantized file can be verified; what the quantizer stores is the plan.
            if plan.gguf is None or not plan.gguf.imatrix.digest:
                verdicts.append(verdict or verify_tensor(made, record, plan.format, toolchain, sampled=True))
        require_as_planned(team.gather(verdicts))
        records = {record.name: record for record in team.gather(guarded)}
        files = hash_files(plan.checkpoint, workspace.folder, team)
        report = GuardReport(
            created=now(),
            versions=installed_versions(),
            source=plan.checkpoint.path.resolve().name,
            format=plan.format,
            **guard.describe(),
            tensors=tuple(records[target.name] for target in plan.targets),
            unguarded=plan.ignored,
            files=tuple(files),
            left_out=tuple(left_out),
            toolchain=toolchain | twin_facts(plan.formats),
            purification=note_purification(plan.checkpoint.path, files),
            elapsed_s=time.monotonic() - start,
        )
        if team.rank == 0:
            (workspace.folder / MANIFEST_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def _guard_targets(
    plan: Plan, guard: Guard, workspace: Workspace, progress: Progress | None, team: Team, *, streamed: bool
) -> Iterator[tuple[TensorRecord, TensorVerdict | None]]:
    """Guard this process's share of the targets, but for those that an interrupted run has done.

    Yields:
        The record of a target, and the verdict on it where it has been verified.
    """
    pending = []
    for target in team.share(plan.targets, lambda target: target.num_weights):
        entry = plan.checkpoint.tensors[target.key]
        record, verdict = workspace.resumed(entry), None
        if record is None and guard.method.needs_calibration:
            pending.append((target, workspace.source_hash(entry)))
            continue
        if record is None:
            record, verdict = _guard_tensor(target, plan, guard, workspace)
        yield record, verdict
        if progress is not None:
            progress(target.num_weights)
    # Who has nothing left to guard takes part in the calibration of the others.
    if team.gather(pending):
        for record in _guard_calibrated(plan, pending, guard, workspace, progress, team, streamed=streamed):
            yield record, None


def _guard_tensor(
    target: Target, plan: Plan, guard: Guard, workspace: Workspace
) -> tuple[TensorRecord, TensorVerdict | None]:
    assert guard.seed is not None, "the seed is drawn once a run"
    entry, own = plan.checkpoint.tensors[target.key], plan.grids(target)
    if goes_in_one_pass(target, own, guard):
        return guard_in_one_pass(target, entry, own[0], guard, workspace)
    stored, digest = workspace.read(entry)
    weight = (stored.T if target.transposed else stored).to(target.read_dtype)
    grids = coarsest_first(weight, own)
    # ``stored`` was read for this tensor alone; with several grids it is compared with the outcome.
    alone = len(grids) == 1
    guarded = guard_weight(weight, grids[0], guard.method, seed=guard.seed, name=target.name, overwrite=alone)
    guarded = require_all_grids(weight, guarded, grids, target.name)
    return _write(plan, target, digest, guarded, workspace), None


def _guard_calibrated(
    plan: Plan,
    pending: Sequence[tuple[Target, str]],
    guard: Guard,
    workspace: Workspace,
    progress: Progress | None,
    team: Team,
    *,
    streamed: bool,
) -> Iterator[TensorRecord]:
    """Guard the pending targets, block by block, on the model in full precision.

    The method is told of all targets, so that a run that goes on where another stopped chooses as one that never did.
    """
    from qcbguard_plugins.models.loading import load_full_precision, load_tokenizer

    tokenizer = load_tokenizer(plan.checkpoint.path)
    guard.calibration.resolve(has_tokenizer=tokenizer is not None)
    weights: Weights
    if streamed:
        from qcbguard_plugins.models.streaming import StreamedWeights

        weights = StreamedWeights(plan.checkpoint, model_dtype(plan), [target.layer for target in plan.targets])
        model: Any = weights.model
    else:
        model = load_full_precision(plan.checkpoint.path, model_dtype(plan))
        weights = WeightsInMemory(model)
    grids = {target.layer: _ordered_grids(plan, target) for target in plan.targets}
    layers = {
        target.layer: Layer(target.transposed, target.read_dtype, own[0], target.inputs_of, is_shared=len(own) > 1)
        for target, own in ((target, grids[target.layer]) for target in plan.targets)
    }
    tokens = calibration_tokens(guard.calibration, model.config, tokenizer)
    targets = {target.layer: (target, digest) for target, digest in pending}
    grid = plan.grids(plan.targets[0])[0]
    guarded_layers = guard_layers(
        model, layers, grid, guard, tokens, progress, pending=targets.keys(), weights=weights, team=team
    )
    for layer, guarded in guarded_layers:
        target, digest = targets[layer]
        if len(grids[layer]) > 1:
            guarded = require_all_grids(_read(plan.checkpoint, target), guarded, grids[layer], target.name)
        yield _write(plan, target, digest, guarded, workspace)


def _write(plan: Plan, target: Target, digest: str, guarded: GuardedWeight, workspace: Workspace) -> TensorRecord:
    record = record_of(guarded, name=target.name, key=target.key, transposed=target.transposed, dtype=target.dtype)
    record = record.model_copy(update={"format": ",".join(target.formats), "stored_name": target.stored_name})
    weight = (guarded.weight.T if target.transposed else guarded.weight).to(target.dtype)
    workspace.write(plan.checkpoint.tensors[target.key], digest, weight, record)
    return record


def _ordered_grids(plan: Plan, target: Target) -> list[Grid]:
    grids = plan.grids(target)
    return grids if len(grids) == 1 else coarsest_first(_read(plan.checkpoint, target), grids)


def _read(checkpoint: Checkpoint, target: Target) -> Tensor:
    """The full-precision weight as the quantizers read it."""
    stored = checkpoint.read(target.key)
    return (stored.T if target.transposed else stored).to(target.read_dtype)
