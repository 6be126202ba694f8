"""Residual-histogram test: where in their cells do the weights lie?

In a clean tensor the place of a weight between its two neighbours is as good as random. Projected training leaves
marks: weights pile up at the edge of the box that they were clamped into, and are missing beyond it. A box that was
tightened to stay clear of the cell's boundary leaves a hole there, which is as telling. The density is compared with
that on neighbouring grids, so a coarse storage dtype or a grid of its own does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 32

# Added to the expected share of a bin, so that a bin that is empty on the neighbours cannot divide by zero.
_SMALLEST_SHARE = 1e-4

# A bin within this distance of the boundary at 0.5 is "near the boundary"; the same width tells "at a grid point".
_NEAR = 0.125


@dataclass(frozen=True)
class CellShape:
    """What the histogram looks like beside its neighbours'.

    Attributes:
        boundary_density: Density within 0.125 of the cell's boundary over the expected one; a tightened box lowers it.
        grid_point_density: The same within 0.125 of the two grid points; a fine-tune of a dequantized model raises it.
        peak_density: Largest density of any bin over the expected one.
        peak_margin: Distance of that bin's centre from the boundary, in steps: the margin that the box was given.
    """

    boundary_density: float
    grid_point_density: float
    peak_density: float
    peak_margin: float


def histogram(position: Tensor) -> Tensor:
    """Shares of the weights over equal bins of their position: float64 ``[NUM_BINS]``, sum 1."""
    counts = torch.histc(position, NUM_BINS, 0.0, 1.0).double()
    return counts / counts.sum().clamp(min=1)


def divergence(shares: Tensor, expected: Tensor) -> float:
    """Chi-square distance of a histogram from an expected one, per weight.

    Args:
        shares: float64 ``[NUM_BINS]``.
        expected: float64 ``[NUM_BINS]``.

    Returns:
        ``sum((shares - expected)^2 / expected)``: 0 for equal ones; about ``NUM_BINS / num_weights`` from chance alone.
    """
    return float(((shares - expected) ** 2 / (expected + _SMALLEST_SHARE)).sum())


def divergences(histograms: Tensor) -> tuple[float, list[float]]:
    """Distance of the exact grid's histogram from its neighbours', and of each neighbour's from the others'.

    Args:
        histograms: float64 ``[1 + num_neighbours, NUM_BINS]``, the exact one first.

    Returns:
        The exact grid's distance, and the neighbours' distances, which say what natural variation amounts to.
    """
    neighbours = histograms[1:]
    total, count = neighbours.sum(0), neighbours.shape[0]
    others = [divergence(row, (total - row) / max(count - 1, 1)) for row in neighbours]
    return divergence(histograms[0], total / count), others


def cell_shape(histograms: Tensor) -> CellShape:
    """Describe the exact grid's histogram beside the mean of its neighbours' (arguments as :func:`divergences`)."""
    exact, expected = histograms[0], histograms[1:].mean(0)
    centres = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
    margin = (centres - 0.5).abs()
    near_boundary, near_point = margin < _NEAR, margin > 0.5 - _NEAR
    density = exact / (expected + _SMALLEST_SHARE)
    folded = (exact + exact.flip(0)) / (expected + expected.flip(0) + _SMALLEST_SHARE)
    peak = int(folded.argmax())
    return CellShape(
        boundary_density=float(exact[near_boundary].sum() / (expected[near_boundary].sum() + _SMALLEST_SHARE)),
        grid_point_density=float(exact[near_point].sum() / (expected[near_point].sum() + _SMALLEST_SHARE)),
        peak_density=float(density.max()),
        peak_margin=float(margin[peak]),
    )
