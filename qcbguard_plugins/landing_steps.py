"""The parts of landing that touch every weight, in torch: what is handed over, what is stored, what that comes to.

A grid may bring compiled forms of them (``grid.kernels``), which give the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.grids.base import Lattice
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.grids.ggml_blocks import StoredBlocks


def choose_points(grid: GgmlGrid, lattice: Lattice, chosen: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Turn a defense's codes into weights to hand over.

    Args:
        grid: The grid.
        lattice: The lattice.
        chosen: uint8 ``[num_sub_blocks, sub_block_size]``; what it holds for frozen weights is ignored.

    Returns:
        The weights to hand over, float32, and their codes, uint8, both ``[num_sub_blocks, sub_block_size]``; how many
        codes differ from plain rounding, and how many weights are frozen.
    """
    if grid.kernels is not None:
        return grid.kernels.choose_points(lattice, chosen)
    codes = torch.where(lattice.frozen, lattice.nearest, chosen)
    points = torch.where(lattice.frozen, lattice.kept, lattice.place(codes))
    return points, codes, int((codes != lattice.nearest).sum()), int(lattice.frozen.sum())


def find_moved(
    grid: GgmlGrid, handed_over: Tensor, stored: StoredBlocks, scale: Tensor, tolerance: float, unit: int
) -> Tensor:
    """Find what the quantizer stores elsewhere than it was handed over.

    Args:
        grid: The grid.
        handed_over: float32, weights as the quantizer reads them.
        stored: What it stores for them.
        scale: float32 ``[num_sub_blocks, 1]``, the scales that the choice was made with.
        tolerance: Distance in these scales that does not count.
        unit: Weights a unit.

    Returns:
        Bool ``[num_units]``. Sub-blocks whose scale is zero never count.
    """
    if grid.kernels is not None:
        return grid.kernels.find_moved(grid, handed_over, stored, scale, tolerance, unit)
    limit = scale.abs() * tolerance
    values = grid.values(stored)
    far = ((handed_over.reshape(values.shape) - values).abs_() > limit) & (limit > 0)
    return far.view(-1, unit).any(dim=1)


def count_landed(grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks) -> int:
    """The number of weights stored within half a step of the chosen value, or in a sub-block that holds one value."""
    if grid.kernels is not None:
        return grid.kernels.count_landed(grid, stored, chosen)
    reach = chosen.scale.abs() * float(grid.levels.diff().min() / 2)
    near = (grid.values(stored) - grid.values(chosen)).abs_() <= reach
    return int((near | (reach == 0)).sum())


def measure(grid: GgmlGrid, weight: Tensor, handed_over: Tensor, scale: Tensor) -> tuple[float, float, float]:
    """The energy of the weights, of those in sub-blocks that hold one value only, and of the change."""
    if grid.kernels is not None:
        return grid.kernels.measure(grid, weight, handed_over, scale)
    squares = weight.square().view(len(scale), -1)
    lost = float(squares[(scale == 0).squeeze(1)].sum())
    return float(squares.sum()), lost, float((handed_over - weight).square_().sum())
