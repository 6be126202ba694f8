"""From what was measured on a model to a report with a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.detection.weights import residual
from qcbguard_plugins.detection.weights.combination import Combined, combine
from qcbguard_plugins.detection.weights.report import (
    FormatEvidence,
    ScanReport,
    TensorEvidence,
    TestEvidence,
    UntestedFile,
    Verdict,
)
from qcbguard_plugins.detection.weights.thresholds import (
    ALPHA,
    OUTLIER_INJECTION,
    Family,
    family_of,
    outlier_p,
    residual_p,
    spectral_p,
)

if TYPE_CHECKING:
    from qcbguard_plugins.checkpoint.weight_source import WeightSource
    from qcbguard_plugins.detection.weights.measure import Measurements
    from qcbguard_plugins.detection.weights.measurement import FormatMeasurements

# The outlier test knows no format, so it counts once.
_TESTS_PER_FORMAT = 2


def conclude(source: WeightSource, measured: Measurements, *, seed: int, elapsed_s: float) -> ScanReport:
    """Combine the tensors' evidence, correct it for everything that was tried, and name what it looks like."""
    from qcbguard_plugins.detection.weights.measure import scanned_tensor

    num_tests = _TESTS_PER_FORMAT * len(measured.formats) + 1
    formats, evidence, families = [], [], {}
    for name, of_format in measured.formats.items():
        found, tensors, family = _judge_format(name, of_format, num_tests)
        formats.append(found)
        evidence += tensors
        families[name] = family
    outliers = min(1.0, num_tests * outlier_p(measured.outliers))
    attacked = sorted((f for f in formats if f.attacked), key=lambda f: (f.p_value, -f.spectral.effect))
    likely_family = families[attacked[0].format] if attacked else OUTLIER_INJECTION if outliers <= ALPHA else None
    if outliers <= ALPHA:
        likely_family = OUTLIER_INJECTION
    complete = not measured.skipped and not source.passed_over
    verdict: Verdict = "attacked" if likely_family else "clean" if complete else "incomplete"
    return ScanReport(
        versions=versions(),
        model=source.name,
        file_kind=source.kind,
        verdict=verdict,
        p_value=min([outliers, *(f.p_value for f in formats)]),
        alpha=ALPHA,
        likely_formats=tuple(f.format for f in attacked),
        family=likely_family.name if likely_family else "",
        meaning=likely_family.meaning if likely_family else "",
        outlier_p=outliers,
        seed=seed,
        formats=tuple(formats),
        tensors=tuple(scanned_tensor(measured, index) for index in range(len(measured.tensors))),
        evidence=tuple(evidence),
        skipped=tuple(measured.skipped),
        num_others=source.num_others,
        untested_files=tuple(UntestedFile(name=file.name, taken_by=file.taken_by) for file in source.passed_over),
        elapsed_s=elapsed_s,
    )


def _judge_format(
    name: str, measured: FormatMeasurements, num_tests: int
) -> tuple[FormatEvidence, list[TensorEvidence], Family]:
    spectral = combine(_table(measured.edge_ratios))
    distances = [residual.divergences(h) for h in measured.histograms]
    histogram = combine(_table([[own, *others] for own, others in distances]))
    pooled = torch.stack(measured.histograms).mean(0) if measured.histograms else torch.zeros(2, residual.NUM_BINS)
    pooled_distance = residual.divergences(pooled)[0] if measured.histograms else 0.0
    p_spectral = spectral_p(spectral)
    p_residual = residual_p(histogram, [own for own, _ in distances], pooled_distance)
    p_value = min(1.0, num_tests * min(p_spectral, p_residual))
    shape = residual.cell_shape(pooled)
    found = FormatEvidence(
        format=name,
        attacked=p_value <= ALPHA,
        p_value=p_value,
        spectral=TestEvidence(effect=spectral.effect, raw_p_value=spectral.p_value, p_value=p_spectral),
        residual=TestEvidence(effect=histogram.effect, raw_p_value=histogram.p_value, p_value=p_residual),
        num_on_grid=len(measured.on_grid),
        histogram=tuple(pooled[0].tolist()),
        expected_histogram=tuple(pooled[1:].mean(0).tolist()),
        boundary_density=shape.boundary_density,
        peak_margin=shape.peak_margin,
    )
    return found, _tensor_evidence(name, measured, spectral, histogram), family_of(shape)


def _table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64) if rows else torch.empty(0, 0, dtype=torch.float64)


def _tensor_evidence(
    name: str, measured: FormatMeasurements, spectral: Combined, histogram: Combined
) -> list[TensorEvidence]:
    tested = [
        TensorEvidence(
            name=tensor,
            format=name,
            on_grid=False,
            spectral_effect=torch.tensor(spectral.effects[i]).exp().item() - 1,
            spectral_p=spectral.adjusted[i],
            residual_effect=histogram.effects[i],
            residual_p=histogram.adjusted[i],
        )
        for i, tensor in enumerate(measured.names)
    ]
    untested = [
        TensorEvidence(
            name=tensor, format=name, on_grid=True, spectral_effect=0, spectral_p=1, residual_effect=0, residual_p=1
        )
        for tensor in measured.on_grid
    ]
    return tested + untested
