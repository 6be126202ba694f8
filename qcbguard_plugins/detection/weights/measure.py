"""Measure the weights of a model, before any judgement."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins.backends.formats import fitting_grid
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource
from qcbguard_plugins.detection.weights import outlier, spectral
from qcbguard_plugins.detection.weights.measurement import FormatMeasurements
from qcbguard_plugins.detection.weights.null_grids import draw_inflations, generator_for, sample_rows
from qcbguard_plugins.detection.weights.report import ScannedTensor, SkippedTensor
from qcbguard_plugins.grids import Grid

#: Weights of one tensor that are tested; a larger tensor is represented by random rows.
MAX_WEIGHTS = 1 << 21

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|blk)\.(\d+)\.")
_VALUES_PER_CHECK = 1 << 22


@dataclass
class Measurements:
    """Everything that was measured on a model, before any judgement."""

    tensors: list[SourceTensor] = field(default_factory=list)
    num_tested: list[int] = field(default_factory=list)
    outliers: list[outlier.OutlierEvidence] = field(default_factory=list)
    chunk_ratios: list[Tensor] = field(default_factory=list)
    formats: dict[str, FormatMeasurements] = field(default_factory=dict)
    skipped: list[SkippedTensor] = field(default_factory=list)

    def extend(self, later: Measurements) -> None:
        """Add what was measured on later tensors."""
        self.tensors += later.tensors
        self.num_tested += later.num_tested
        self.outliers += later.outliers
        self.chunk_ratios += later.chunk_ratios
        self.skipped += later.skipped
        for name, measurements in later.formats.items():
            self.formats[name].extend(measurements)


def measure(
    source: WeightSource,
    grids: dict[str, Grid],
    seed: int,
    max_weights: int = MAX_WEIGHTS,
    progress: Callable[[int], object] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Measurements:
    """Measure every target of a model on every grid, one tensor in memory at a time."""
    inflations = draw_inflations(generator_for(seed, "neighbouring grids"))
    parts = []
    for index in group.partition(range(len(source.targets)), lambda index: source.targets[index].num_weights):
        target = source.targets[index]
        measured = _nothing(grids)
        reason = target.unusable
        weight = None if reason else source.read(target)
        if weight is not None:
            reason = why_unreadable(weight, grids)
        if reason or weight is None:
            measured.skipped.append(SkippedTensor(name=target.name, reason=reason))
        else:
            _measure_tensor(target, weight, grids, inflations, seed, max_weights, measured)
        parts.append((index, measured))
        if progress is not None:
            progress(target.num_weights)
    total = _nothing(grids)
    for _, part in sorted(group.gather(parts), key=lambda part: part[0]):
        total.extend(part)
    return total


def _nothing(grids: Iterable[str]) -> Measurements:
    return Measurements(formats={name: FormatMeasurements() for name in grids})


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, from its name."""
    match = _LAYER.search(name)
    return int(match[1]) if match and len(match[1]) < 6 else None


def projection_of(name: str) -> str:
    """What a tensor is within its layer, from its name."""
    match = _LAYER.search(name)
    return (name[match.end() :] if match else name).removesuffix(".weight")


def scanned_tensor(measured: Measurements, index: int) -> ScannedTensor:
    """The record of one tensor that was tested."""
    target, evidence = measured.tensors[index], measured.outliers[index]
    others = [
        ratios
        for place, ratios in enumerate(measured.chunk_ratios)
        if place != index and projection_of(measured.tensors[place].name) == projection_of(target.name)
    ]
    pooled = torch.cat(others).sort().values if others else torch.empty(0)
    return ScannedTensor(
        name=target.name,
        layer=layer_of(target.name),
        projection=projection_of(target.name),
        shape=target.matrix_shape,
        dtype=dtype_name(target.dtype),
        num_weights=target.num_weights,
        num_tested=measured.num_tested[index],
        outlier_share=evidence.share,
        outlier_p=evidence.p_value,
        layer_distance=outlier.layer_distance(measured.chunk_ratios[index], pooled),
    )


def _measure_tensor(
    target: SourceTensor,
    weight: Tensor,
    grids: dict[str, Grid],
    inflations: Sequence[float],
    seed: int,
    max_weights: int,
    measured: Measurements,
) -> None:
    generator = generator_for(seed, target.name)
    if weight.dtype == torch.float64:
        weight = weight.float()
    start = spectral.starting_vectors(weight.shape[1], generator)
    num_tested = weight.numel()
    part = weight
    for name, grid in grids.items():
        fitting = fitting_grid(grid, (weight.shape[0], weight.shape[1]))
        assert fitting is not None, "tensors that no grid fits were skipped"
        part = sample_rows(weight, fitting, max_weights, generator)
        num_tested = min(num_tested, part.numel())
        measured.formats[name].add(target.name, part, fitting, inflations, start, generator)
    measured.tensors.append(target)
    measured.num_tested.append(num_tested)
    measured.outliers.append(outlier.outlier_test(part, generator))
    measured.chunk_ratios.append(_thin(outlier.ratios(part)))


def _thin(values: Tensor, keep: int = 4096) -> Tensor:
    """A sorted tensor's quantiles, enough for a comparison of distributions."""
    if values.numel() <= keep:
        return values
    return values[torch.linspace(0, values.numel() - 1, keep).long()]


def why_unreadable(weight: Tensor, grids: dict[str, Grid]) -> str:
    """Why the values of a tensor cannot be tested, or an empty string; looks at them in pieces."""
    largest = 0.0
    for chunk in torch.split(weight.reshape(-1), _VALUES_PER_CHECK):
        low, high = torch.aminmax(chunk)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return "holds NaN or infinite values"
        largest = max(largest, float(high), -float(low))
    for name, grid in grids.items():
        if fitting_grid(grid, (weight.shape[0], weight.shape[1])) is None:
            return f"its rows of {weight.shape[1]} weights fit no type of {name}"
    if "int8" in grids and largest > torch.finfo(torch.float16).max:
        return "values overflow in float16, which int8 reads"
    return ""
