"""Does a model look attacked? A quick question, asked before a guard decides how much noise it needs.

The scanner reports findings, and a false one costs trust. Here a false alarm costs a clean model a little more noise,
and a miss leaves a narrower dither in place, so the thresholds are lower, the samples smaller, and only the formats
that are about to be used are tested. No p-value is computed, which spares SciPy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qcbguard_plugins.detection.weights import residual, spectral
from qcbguard_plugins.detection.weights.combination import Excess, excess
from qcbguard_plugins.detection.weights.measurement import FormatMeasurements
from qcbguard_plugins.detection.weights.null_grids import draw_inflations, generator_for, sample_rows
from qcbguard_plugins.detection.weights.thresholds import RESIDUAL_DISTANCE, RESIDUAL_FLOOR
from qcbguard_plugins.grids.base import Grid

_MAX_WEIGHTS = 1 << 18

# Excess of the spectral test in log units, mean over tensors and single tensor: about three quarters of the scanner's.
_SPECTRAL_FLOOR, _SPECTRAL_TENSOR_FLOOR = 0.02, 0.12

# How far the mean over tensors must stand out from the neighbouring grids, in standard deviations. With eight of them
# a clean model does so once in two hundred times.
_MIN_DEVIATIONS = 3.5


def looks_attacked(weights: Iterable[tuple[str, Tensor, Grid]], seed: int) -> bool:
    """Ask the spectral and the histogram test about a whole model.

    Args:
        weights: Name, weight ``[out_features, in_features]`` as the quantizer reads it, and grid of each tensor.
        seed: Seed of the random rows and grids.

    Returns:
        True where either test sees more on the stock quantizer's grid than on its neighbours. A tensor that holds NaN
        or infinity is left to the guard, which refuses it.
    """
    inflations = draw_inflations(generator_for(seed, "neighbouring grids"))
    measured = FormatMeasurements()
    for name, weight, grid in weights:
        generator = generator_for(seed, name)
        part = sample_rows(weight.contiguous(), grid, _MAX_WEIGHTS, generator).cpu()
        if part.numel() and torch.isfinite(grid.read(part)).all():
            start = spectral.starting_vectors(part.shape[1], generator)
            measured.add(name, part, grid, inflations, start, generator)
    if not measured.names:
        return False
    directions = excess(torch.tensor(measured.edge_ratios, dtype=torch.float64))
    if _stands_out(directions, _SPECTRAL_FLOOR) or max(directions.of_tensors) >= _SPECTRAL_TENSOR_FLOOR:
        return True
    pooled, _ = residual.divergences(torch.stack(measured.histograms).mean(0))
    distances = [residual.divergences(histogram) for histogram in measured.histograms]
    shapes = excess(torch.tensor([[own, *others] for own, others in distances], dtype=torch.float64))
    return pooled >= RESIDUAL_DISTANCE and _stands_out(shapes, RESIDUAL_FLOOR)


def _stands_out(found: Excess, floor: float) -> bool:
    return found.mean >= floor and found.deviations >= _MIN_DEVIATIONS
