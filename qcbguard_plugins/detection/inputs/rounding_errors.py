"""Rounding errors of a weight on the stock quantizer's grid and on grids beside it.

The neighbouring grids are those of the weight tests, see :mod:`qcbguard_plugins.detection.weights.null_grids`: whatever
makes the errors of a clean layer add up along its inputs does so on a grid with other scales as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qcbguard_plugins.grids.base import Grid, Lattice


def rounding_errors(weight: Tensor, grid: Grid, inflations: Sequence[float]) -> Iterator[Tensor]:
    """Errors on the exact grid, then on each neighbour.

    Args:
        weight: ``[rows, in_features]``, in the dtype in which the quantizer will read it; rows must start at a block.
        grid: The grid.
        inflations: Relative enlargements of the scales.

    Yields:
        float32 ``[rows, in_features]`` grid point minus weight, zero at scale holders.
    """
    exact = grid.lattice_of(weight)
    yield _error(exact, exact.frozen)
    for inflation in inflations:
        blocks = torch.where(exact.frozen, exact.blocks * (1 + inflation), exact.blocks)
        yield _error(grid.lattice(blocks, exact.shape, torch.float32), exact.frozen)


def _error(lattice: Lattice, frozen: Tensor) -> Tensor:
    return lattice.matrix(lattice.dequantize(lattice.nearest).sub_(lattice.blocks).masked_fill_(frozen, 0.0))
