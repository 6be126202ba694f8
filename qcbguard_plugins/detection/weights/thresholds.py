"""When evidence becomes a finding, and what attack it looks like.

A finding needs a small p-value and an effect of a size that matters, for with many tensors a p-value alone turns
harmless details into findings. The thresholds were set on clean models, see ``docs/detection.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcbguard_plugins.detection.weights.combination import Combined
from qcbguard_plugins.detection.weights.outlier import OutlierEvidence
from qcbguard_plugins.detection.weights.residual import CellShape

#: Largest p-value of a finding, after correction for the number of tests and formats.
ALPHA = 0.01

#: Smallest excess of the spectral test in log units: of the mean over tensors, and of a single tensor.
SPECTRAL_FLOOR, SPECTRAL_TENSOR_FLOOR = 0.03, 0.15

#: Smallest excess of the histogram's distance in log units, and smallest distance itself. Storage dtypes leave marks
# below.
RESIDUAL_FLOOR, RESIDUAL_DISTANCE = 1.25, 0.02

#: Smallest share of a tensor's chunks that must each be ruled by one weight.
OUTLIER_SHARE = 0.05

#: Share of weights that the quantizer gives back unchanged, from which on there is nothing between them to test.
#: Tensors that do not come from this quantizer: up to 0.3.
ON_GRID = 0.75


@dataclass(frozen=True)
class Family:
    """A kind of attack.

    Attributes:
        name: Short name, the same in every report.
        meaning: What was seen and what makes it, in a sentence.
    """

    name: str
    meaning: str


OUTLIER_INJECTION = Family(
    "outlier injection",
    "One weight in every chunk is many times the rest, so that quantization wipes the rest out.",
)
GRID_FINE_TUNE = Family(
    "fine-tune of a dequantized model",
    "The weights lie close to this quantizer's own grid points and all differ from them in one direction: quantizing "
    "undoes the last fine-tune. An honest adapter merged into a dequantized model looks the same; compare behaviour.",
)
TIGHTENED_BOX = Family(
    "tightened box",
    "The rounding error has a direction, and weights near the boundary between two codes are missing: projected "
    "training with a margin against defenses.",
)
BOX = Family(
    "box (projected training)",
    "The rounding error has a direction, and weights pile up at the edge of their rounding cells: the model was "
    "trained under the constraint that its quantized codes stay what they are.",
)
NO_BOX = Family(
    "no box (straight-through or unconstrained training)",
    "The rounding error has a direction, but the places of the weights in their cells look natural: the full-precision "
    "and the quantized model were trained together, or little of the box was used.",
)


def spectral_p(combined: Combined) -> float:
    """p-value of the spectral test; 1 where the effect is too small to matter."""
    return _gated(combined, SPECTRAL_FLOOR, SPECTRAL_TENSOR_FLOOR, [True] * len(combined.effects))


def residual_p(combined: Combined, distances: Sequence[float], pooled_distance: float) -> float:
    """p-value of the histogram test; 1 where the effect is too small to matter.

    Args:
        combined: Of the tensors' distances.
        distances: Distance of each tensor.
        pooled_distance: Distance of the histogram of all tensors together.
    """
    floor = RESIDUAL_FLOOR if pooled_distance >= RESIDUAL_DISTANCE else float("inf")
    return _gated(combined, floor, 2 * RESIDUAL_FLOOR, [distance >= RESIDUAL_DISTANCE for distance in distances])


def outlier_p(evidence: Sequence[OutlierEvidence]) -> float:
    """p-value of the outlier test over all tensors, by Bonferroni."""
    counted = [e.p_value for e in evidence if e.share >= OUTLIER_SHARE]
    return min(1.0, min(counted, default=1.0) * max(1, len(evidence)))


def family_of(shape: CellShape) -> Family:
    """The attack family that a histogram speaks for, given that some test found an attack."""
    if shape.boundary_density < 0.3 and shape.grid_point_density > 1.5 and shape.peak_margin > 0.45:
        return GRID_FINE_TUNE
    if shape.boundary_density < 0.75:
        return TIGHTENED_BOX
    if shape.peak_density > 1.2 or shape.boundary_density > 1.04:
        return BOX
    return NO_BOX


def _gated(combined: Combined, floor: float, tensor_floor: float, counts: Sequence[bool]) -> float:
    candidates = [combined.p_mean] if combined.effect >= floor else []
    candidates += [
        p
        for p, effect, counted in zip(combined.adjusted, combined.effects, counts, strict=True)
        if counted and effect >= tensor_floor
    ]
    return min(1.0, 2 * min(candidates, default=1.0))
