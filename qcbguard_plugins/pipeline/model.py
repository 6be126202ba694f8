"""Guard a model that is in memory."""

from __future__ import annotations

import time
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.checkpoint import hash_file, open_checkpoint
from qcbguard_plugins.checkpoint.manifest import FileRecord, GuardReport, write_manifest
from qcbguard_plugins.checkpoint.provenance import provenance
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.models.skeleton import build_skeleton, parameter_keys
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.calibrated import guard_layers, tokens_for
from qcbguard_plugins.pipeline.guard_target import verify_target
from qcbguard_plugins.pipeline.ignore import matching
from qcbguard_plugins.pipeline.plan import Plan, as_formats, select_targets
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.verify import require_as_planned

_REPORT = "_qcbguard_report"


def guard_model(
    model: Any,
    formats: Sequence[str] | str = ("nf4",),
    guard: Guard | Defense | str = "feedback",
    *,
    tokenizer: Any = None,
    ignore: Sequence[str] = (),
    backends: Sequence[Backend] = (),
    progress: Progress | None = None,
) -> GuardReport:
    """Guard a full-precision model of transformers in place.

    Its weights, those that the stock quantizers would take, become such that they are rounded as planned. Save the
    model and quantize it with the stock tool: ``save_pretrained`` writes the manifest beside the weights, so that
    ``qcbguard verify`` can compare them.

    Args:
        model: A ``PreTrainedModel`` with float32, float16 or bfloat16 weights, on any one device.
        formats: Such as ``nf4``, ``int8`` or ``gptq-w4g128``, one or several.
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        tokenizer: The model's tokenizer, for calibration from text.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        backends: Backends with settings of yours.
        progress: Called with the number of weights of each tensor when it is done.

    Returns:
        The report. Everything that the stock quantizers leave alone is unchanged.

    Raises:
        UnguardableError: A weight cannot be guarded; layers before it have been changed.
        CalibrationError: The method needs calibration and there is no way to get it.
        VerificationError: The stock quantizer would store other codes than planned.
    """
    started = time.monotonic()
    requested = as_guard(guard).with_seed()
    plan = plan_model(model, formats, ignore=ignore, backends=backends)
    tokens = tokens_for(requested, model.config, tokenizer)
    return guard_planned_model(model, plan, requested, tokens, started, progress)


def plan_model(
    model: Any, formats: Sequence[str] | str, *, ignore: Sequence[str] = (), backends: Sequence[Backend] = ()
) -> Plan:
    """List every weight of a model that the stock quantizers will read.

    Raises:
        UsageError, UnguardableError: As :func:`~qcbguard_plugins.pipeline.plan.make_plan`.
    """
    names = as_formats(formats)
    selection = select_targets(build_skeleton(model.config), names, backends)
    ignored = matching(list(selection.targets), ignore)
    targets = [target for target in selection.targets.values() if target.name not in ignored]
    return Plan(
        source=str(model.config.name_or_path) or type(model).__name__,
        formats=names,
        targets=tuple(_in_memory(model, target) for target in targets),
        ignored=tuple(sorted(ignored)),
        backends=tuple(backends),
        facts=selection.facts,
    )


def guard_planned_model(
    model: Any,
    plan: Plan,
    guard: Guard,
    tokens: torch.Tensor | None,
    started: float,
    progress: Progress | None = None,
) -> GuardReport:
    """Guard a model as planned, ask the stock quantizers, and leave the manifest for ``save_pretrained``.

    Args:
        model: The model.
        plan: What to guard of it.
        guard: The method, its seed drawn.
        tokens: Calibration sequences; see :func:`~qcbguard_plugins.pipeline.calibrated.guard_layers`.
        started: When the run began, by :func:`time.monotonic`.
        progress: Called with the number of weights of each tensor when it is done.

    Raises:
        UnguardableError, CalibrationError, VerificationError: See :func:`guard_model`.
    """
    records, verdicts = [], []
    for target, stored, record in guard_layers(model, plan.targets, guard, tokens, progress):
        records.append(record)
        if "imatrix_sha256" not in plan.facts:
            verdicts.append(verify_target(target, stored, record))
    require_as_planned(verdicts)
    report = report_of(plan, guard, records, started)
    model.config.qcbguard = provenance(report)
    setattr(model, _REPORT, report)
    model.save_pretrained = types.MethodType(_save_with_manifest, model)
    return report


def _in_memory(model: Any, target: Target) -> Target:
    return replace(target, dtype=model.get_parameter(target.name).dtype, read_dtype=None)


def _save_with_manifest(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """The model's own ``save_pretrained``, and the manifest beside what it wrote, unless a quantizer came between."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if getattr(model.config, "quantization_config", None) is not None:
        return
    report: GuardReport = getattr(model, _REPORT)
    checkpoint = open_checkpoint(Path(save_directory))
    keys = parameter_keys(build_skeleton(model.config), checkpoint.tensors)
    tensors = tuple(r.model_copy(update={"key": keys.get(r.name, r.key)}) for r in report.tensors)
    files = tuple(FileRecord(name=shard, sha256_out=hash_file(checkpoint.path / shard)) for shard in checkpoint.shards)
    write_manifest(report.model_copy(update={"tensors": tensors, "files": files}), checkpoint.path)
