"""The parts of the search that touch every weight, in torch: what is handed over, what is stored, what that comes to.

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
        return grid.kernels.choose_points(grid, lattice, chosen)
    codes = torch.where(lattice.frozen, lattice.nearest, chosen)
    points = torch.where(lattice.frozen, lattice.kept, lattice.weights_for(codes))
    return points, codes, int((codes != lattice.nearest).sum()), int(lattice.frozen.sum())


def correct(grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, share: float, handed_over: Tensor) -> None:
    """Move what is handed over, float32, by a share of what it is missed by, in place."""
    if grid.kernels is not None:
        grid.kernels.correct(grid, stored, chosen, share, handed_over)
        return
    miss = grid.values(chosen).sub_(grid.values(stored)).view(handed_over.shape)
    handed_over.add_(miss.mul_(share))


def compare(grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, unit: int) -> tuple[Tensor, Tensor]:
    """Compare what is stored with what was chosen, unit by unit.

    Args:
        grid: The grid.
        stored: What the quantizer stores.
        chosen: What was chosen, in the same shape.
        unit: Weights a unit.

    Returns:
        int32 ``[num_units]``, the number of weights stored within half a step of the chosen value, or in a sub-block
        that holds one value only; float32 ``[num_units]``, the sum of the squared distances in such half steps.
    """
    if grid.kernels is not None:
        return grid.kernels.compare(grid, stored, chosen, unit)
    reach = chosen.scale.abs() * float(grid.levels.diff().min() / 2)
    miss = grid.values(stored) - grid.values(chosen)
    as_planned = (miss.abs() <= reach) | (reach == 0)
    squares = torch.where(reach > 0, miss / reach, torch.zeros_like(miss)).square_()
    return as_planned.view(-1, unit).sum(1, dtype=torch.int32), squares.view(-1, unit).sum(1)


def measure(grid: GgmlGrid, weight: Tensor, handed_over: Tensor, scale: Tensor) -> tuple[float, float, float]:
    """The energy of the weights, of those in sub-blocks that hold one value only, and of the change."""
    if grid.kernels is not None:
        return grid.kernels.measure(grid, weight, handed_over, scale)
    squares = weight.square().view(len(scale), -1)
    lost = float(squares[(scale == 0).squeeze(1)].sum())
    return float(squares.sum()), lost, float((handed_over - weight).square_().sum())
