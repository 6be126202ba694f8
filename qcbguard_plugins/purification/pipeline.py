"""Purify a model: signature, suppression, healing, and a folder that takes the place of another."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from qcbguard_plugins._util.memory_peak import with_peak_bytes
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.checkpoint import FolderStaging, hash_file, resumable_folder
from qcbguard_plugins.checkpoint.manifest import FileRecord
from qcbguard_plugins.checkpoint.purification_note import PURIFICATION_FILE
from qcbguard_plugins.errors import PurificationError, UsageError
from qcbguard_plugins.models.loading import require_tokenizer
from qcbguard_plugins.purification.architectures import Architecture
from qcbguard_plugins.purification.config import DEFAULT_PRESET, PurifyConfig, config_of
from qcbguard_plugins.purification.finetuning import StepDone, finetune, num_steps
from qcbguard_plugins.purification.immunization import encode, find_signature, healing_set, make_variant, variant_steps
from qcbguard_plugins.purification.report import (
    DataRecord,
    GroupRecord,
    PurifyPlanReport,
    PurifyReport,
    StageRecord,
    VariantRecord,
)
from qcbguard_plugins.purification.samples import Sample, read_samples
from qcbguard_plugins.purification.signature import count_of
from qcbguard_plugins.purification.subject import Adapter, Subject, WholeModel, require_peft
from qcbguard_plugins.purification.suppression import suppress
from qcbguard_plugins.purification.units import Group

T = TypeVar("T")

_BYTES_PER_FLOAT: Final = 4
_BYTES_PER_STORED: Final = 2


@dataclass(frozen=True)
class PurifyPlan:
    """Everything that a purification needs, checked.

    Attributes:
        subject: What is purified.
        config: Hyperparameters.
        samples: Clean samples.
        tokenizer: The model's tokenizer.
        data: The files of clean data.
        groups: The units that are scored.
        num_parameters: Parameters of the model.
        num_trained: Those of them that are trained.
    """

    subject: Subject
    config: PurifyConfig
    samples: Sequence[Sample]
    tokenizer: Any
    data: tuple[DataRecord, ...]
    groups: Sequence[Group]
    num_parameters: int
    num_trained: int

    @property
    def num_steps(self) -> int:
        """Steps of all trainings together."""
        healing = num_steps(self.config.num_healing, self.config.healing_epochs, self.config.batch_size)
        return 2 * self.config.needed_variants * variant_steps(self.config) + healing

    @property
    def memory_bytes(self) -> int:
        """Memory of a training without its activations: weights, and gradients and two moments of what is trained,
        beside the units of the variant's other model."""
        return _BYTES_PER_FLOAT * (self.num_parameters + 4 * self.num_trained)

    @property
    def disk_bytes(self) -> int:
        """Room that the variants' differences take beside the target until it is published, at most."""
        return _BYTES_PER_STORED * self.config.needed_variants * self.num_trained


def plan_purification(
    model: Path | str,
    clean_data: Sequence[Path | str],
    *,
    adapter: Path | str | None = None,
    architecture: Architecture | str | None = None,
    preset: str = DEFAULT_PRESET,
    **changes: Any,
) -> PurifyPlan:
    """Check what a purification needs, without training anything; see :func:`purify`."""
    choice = (Path(model), architecture)
    subject: Subject = WholeModel(*choice) if adapter is None else Adapter(*choice, adapter_dir=Path(adapter))
    if adapter is not None:
        require_peft()
    _ = subject.checkpoint
    if not clean_data:
        raise UsageError("purification needs clean data", remedy="Name a file of instructions with their answers.")
    paths = [Path(path) for path in clean_data]
    samples = read_samples(paths)
    tokenizer = require_tokenizer(Path(model))
    outline = subject.outline()
    counts = (outline.num_parameters(), sum(p.numel() for p in outline.parameters() if p.requires_grad))
    config = config_of(subject.architecture.name, counts[0], adapter=adapter is not None, preset=preset, **changes)
    needed = max(config.num_samples if config.needed_variants else 0, config.num_healing)
    if len(samples) < needed:
        raise UsageError(
            f"there are {len(samples)} clean samples, and {needed} are needed",
            remedy="Give more, or ask for fewer with --set num_samples=... and --set num_healing=...",
        )
    data = tuple(DataRecord(name=path.name, sha256=hash_file(path)) for path in paths)
    groups = subject.groups(outline, heads=config.num_heads > 0)
    return PurifyPlan(subject, config, samples, tokenizer, data, groups, *counts)


def describe(plan: PurifyPlan) -> PurifyPlanReport:
    """Put a plan into a report."""
    config = plan.config
    totals: dict[str, int] = {}
    for group in plan.groups:
        totals[group.kind] = totals.get(group.kind, 0) + group.num_units
    return PurifyPlanReport(
        source=plan.subject.checkpoint.path.resolve().name,
        mode=plan.subject.mode,
        architecture=plan.subject.architecture.name,
        config=config.model_dump(mode="json"),
        num_units=totals,
        num_suppressed={
            kind: min(total, config.num_heads) if kind == "head" else count_of(config.ratio, total)
            for kind, total in totals.items()
        },
        num_parameters=plan.num_parameters,
        num_trained=plan.num_trained,
        num_trainings=2 * config.needed_variants + 1,
        num_steps=plan.num_steps,
        batch_size=config.batch_size,
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes,
    )


def purify(
    model: Path | str,
    out: Path | str,
    clean_data: Sequence[Path | str],
    *,
    adapter: Path | str | None = None,
    architecture: Architecture | str | None = None,
    preset: str = DEFAULT_PRESET,
    progress: StepDone | None = None,
    **changes: Any,
) -> PurifyReport:
    """Purify a model, or the adapter on it, into a new folder that takes its place.

    Neither the trigger nor a clean reference is needed. A run that was stopped goes on with the variants that it has.

    Args:
        model: Folder of the suspicious model.
        out: Folder to make; it must not exist. With an adapter it is an adapter's folder.
        clean_data: Files of JSON lines, see :func:`~qcbguard_plugins.purification.samples.read_samples`.
        adapter: Folder of a LoRA adapter. Then the model is frozen: only the adapter is scored and changed.
        architecture: For a model whose module names are not known by its type.
        preset: Where the hyperparameters start from: ``searched-keys``, which was measured best, or ``paper``.
        progress: Called after every training step.
        changes: Hyperparameters of :class:`~qcbguard_plugins.purification.config.PurifyConfig` with another value than
            the preset's for such a model.

    Returns:
        The report, which is also written to ``out/qcbguard-purify.json``.

    Raises:
        UsageError, CheckpointError, TargetExistsError, MissingDependencyError: As their names say; ``out`` is not made.
        PurificationError: A training gave no finite number; ``out`` is not made.

    References:
        arXiv 2603.13461.
    """
    plan = plan_purification(model, clean_data, adapter=adapter, architecture=architecture, preset=preset, **changes)
    return purify_planned(plan, out, progress=progress)


def purify_planned(plan: PurifyPlan, out: Path | str, *, progress: StepDone | None = None) -> PurifyReport:
    """Carry out a plan; see :func:`purify`."""
    start = time.monotonic()
    config, subject = plan.config, plan.subject
    request = {
        "config": config.model_dump(mode="json"),
        "architecture": subject.architecture.name,
        "clean_data": [record.sha256 for record in plan.data],
        "model": str(subject.model_dir.resolve()),
        "versions": versions(),
    }
    stages: list[StageRecord] = []
    with resumable_folder(Path(out), subject.checkpoint, request) as staging:
        variants, resumed = _measured(stages, "variants", lambda: _make_variants(plan, staging, progress))
        if resumed:
            stages[-1] = stages[-1].model_copy(update={"peak_bytes": None})
        folder = staging.kept_folder("variants")
        signature = _measured(stages, "signature", lambda: find_signature(plan.groups, folder, config))
        model = subject.load()
        frozen = subject.frozen_digest(model)
        only = f"lora_{config.lora_matrix}" if subject.mode == "adapter" else ""
        how = "zero" if subject.mode == "adapter" else config.suppression
        suppress(model, _only(plan.groups, signature), signature, how, seed=config.seed, only=only)
        losses = _measured(stages, "healing", lambda: heal(model, plan, folder, progress))
        if subject.frozen_digest(model) != frozen:
            raise PurificationError("the frozen model changed under its adapter", remedy="Nothing was written.")
        shutil.rmtree(staging.folder)
        staging.folder.mkdir()
        left_out = subject.save(model, staging.folder)
        report = PurifyReport(
            versions=versions(),
            source=subject.checkpoint.path.resolve().name,
            mode=subject.mode,
            architecture=subject.architecture.name,
            config=config.model_dump(mode="json"),
            clean_data=plan.data,
            num_clean_samples=len(plan.samples),
            variants=tuple(variants),
            groups=tuple(_record(group, signature) for group in plan.groups),
            healing_losses=tuple(round(loss, 5) for loss in losses),
            stages=tuple(stages),
            files=tuple(_files(subject, staging)),
            left_out=tuple(left_out),
            base_sha256=_base_digest(subject),
            elapsed_s=time.monotonic() - start,
        )
        text = report.model_dump_json(indent=2) + "\n"
        (staging.folder / PURIFICATION_FILE).write_text(text, encoding="utf-8")
    return report


def heal(model: Any, plan: PurifyPlan, work_dir: Path, progress: StepDone | None = None) -> list[float]:
    """Fine-tune on a few clean samples at an ordinary learning rate, in place.

    Returns:
        The loss of every step.

    Raises:
        PurificationError: A loss is not finite.
    """
    config = plan.config
    return finetune(
        model,
        encode(plan.tokenizer, healing_set(plan.samples, config), config, plan.subject),
        what="healing",
        num_epochs=config.healing_epochs,
        learning_rate=config.healing_learning_rate,
        batch_size=config.batch_size,
        seed=config.seed,
        work_dir=work_dir / "trainer",
        bfloat16=config.bfloat16,
        consistency=config.healing_consistency,
        key_step=config.healing_search,
        step_done=progress,
    )


def _make_variants(
    plan: PurifyPlan, staging: FolderStaging, progress: StepDone | None
) -> tuple[list[VariantRecord], bool]:
    """All variants, and whether an earlier run had made some of them."""
    folder = staging.kept_folder("variants")
    resumed = any(folder.glob("variant-*.safetensors"))
    variants = [
        make_variant(number, plan.subject, plan.samples, plan.tokenizer, plan.config, folder, progress)
        for number in range(plan.config.needed_variants)
    ]
    return variants, resumed


def _measured(stages: list[StageRecord], name: str, work: Callable[[], T]) -> T:
    """Do the work of a stage and note what it took."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    result, peak_bytes = with_peak_bytes(work)
    peak_gpu_bytes = torch.cuda.max_memory_allocated() if has_gpu else None
    elapsed_s = time.monotonic() - start
    stages.append(StageRecord(name=name, elapsed_s=elapsed_s, peak_bytes=peak_bytes, peak_gpu_bytes=peak_gpu_bytes))
    return result


def _only(groups: Sequence[Group], signature: Mapping[str, Any]) -> list[Group]:
    return [group for group in groups if group.name in signature]


def _record(group: Group, signature: Mapping[str, torch.Tensor]) -> GroupRecord:
    suppressed = tuple(signature[group.name].tolist()) if group.name in signature else ()
    return GroupRecord(name=group.name, kind=group.kind, num_units=group.num_units, suppressed=suppressed)


def _files(subject: Subject, staging: FolderStaging) -> list[FileRecord]:
    """The written weight files; the hash before is empty for one that the source has not."""
    source = subject.checkpoint.path
    return [
        FileRecord(
            name=path.name,
            sha256_in=hash_file(source / path.name) if (source / path.name).is_file() else "",
            sha256_out=hash_file(path),
        )
        for path in sorted(staging.folder.glob("*.safetensors"))
    ]


def _base_digest(subject: Subject) -> str:
    """Hash over the files of the model under an adapter."""
    if subject.mode == "model":
        return ""
    from qcbguard_plugins.rounding.digests import combined_digest

    return combined_digest({path.name: hash_file(path) for path in subject.model_dir.glob("*.safetensors")})
