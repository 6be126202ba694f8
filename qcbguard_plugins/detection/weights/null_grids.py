"""The null of the weight tests: the same tensor, read on grids beside the stock quantizer's.

Whatever a clean tensor's rounding error looks like, it looks the same on a grid whose scales are some tenths larger:
the quantizer's exact scales mean nothing to a model that was not made for them. Heavy tails, outlier columns, a coarse
storage dtype, zeros, values that lie on another quantizer's grid: all of it shows on the neighbours too. An attacked
tensor was fitted to the exact cells, so its error stands out on the exact grid alone.

Sign-randomised surrogates (same magnitudes, random signs) know only the magnitudes; neighbours keep the natural
structure between errors and weights as well, so they are the sharper null. One case is left to the surrogates: a tensor
whose weights lie close to the exact grid points without being them has almost discrete values, of which the neighbours
say little, and nothing natural is left between a grid point and a weight so near to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins._util.random import philox_key
from qcbguard_plugins.grids.base import Grid, Lattice

NUM_NEIGHBOURS = 8

# Below the first value the innermost cells hardly move and an attack still shows; above the second, cells get so coarse
# that the small weights all share the zero cell.
_INFLATIONS = (0.10, 0.45)


#: Below this share of the neighbours' error energy a tensor lies close to the grid. Clean ones: 0.57 to 1.1.
NEAR_GRID = 0.5


@dataclass(frozen=True)
class Rounding:
    """How one grid rounds one tensor.

    Attributes:
        error: float32 ``[rows, in_features]``, grid point minus weight; zero at scale holders.
        position: float32 ``[num_free]`` in [0, 1], places in their cells of the weights that hold no scale.
    """

    error: Tensor
    position: Tensor


def generator_for(seed: int, name: str) -> torch.Generator:
    """Torch's generator of one tensor; its seeds have 63 bits, so it takes those of the tensor's key but the last."""
    return torch.Generator().manual_seed(philox_key(seed, name) >> 1)


def draw_inflations(generator: torch.Generator, num_draws: int = NUM_NEIGHBOURS) -> list[float]:
    """Relative scales of the neighbouring grids: one in each of equal intervals, so that no attacker knows them.

    Returns:
        ``num_draws`` numbers in [0.10, 0.45], rising.
    """
    low, high = _INFLATIONS
    places = (torch.arange(num_draws) + torch.rand(num_draws, generator=generator)) / num_draws
    return (low + places * (high - low)).tolist()


def roundings(weight: Tensor, grid: Grid, inflations: Sequence[float]) -> Iterator[Rounding]:
    """Round a tensor on the stock quantizer's grid, then on each neighbour.

    Scale holders are enlarged and nothing else changes, which enlarges the scale of any grid, whatever its formula.

    Args:
        weight: ``[rows, in_features]``, in the dtype in which the quantizer will read it; rows must start at a block.
        grid: The grid.
        inflations: Relative enlargements, from :func:`draw_inflations`.

    Yields:
        ``1 + len(inflations)`` roundings, one at a time, the exact one first.
    """
    exact = grid.lattice_of(weight)
    yield _rounding(exact, exact.frozen)
    for inflation in inflations:
        blocks = torch.where(exact.frozen, exact.blocks * (1 + inflation), exact.blocks)
        yield _rounding(grid.lattice(blocks, exact.shape, torch.float32), exact.frozen)


def sign_surrogate(error: Tensor, generator: torch.Generator) -> Tensor:
    """An error matrix of the same magnitudes with random signs: float32 in its shape."""
    signs = torch.randint(0, 2, error.shape, generator=generator, dtype=error.dtype).mul_(2).sub_(1)
    return signs.mul_(error)


def reproduces(weight: Tensor, grid: Grid) -> float:
    """Share of the weights that the quantizer gives back unchanged, up to the rounding of their storage dtype.

    At a share of one the tensor is a dequantized tensor of this very grid: the quantized model is the stored model, and
    nothing can be hidden between them.

    Returns:
        A number in [0, 1]; scale holders do not count, nor do exact zeros.
    """
    lattice = grid.lattice_of(weight)
    error = (lattice.dequantize(lattice.nearest) - lattice.blocks).abs_()
    # No finer than float16: int8 reads weights in it, and grids differ by a rounding of their scale.
    coarsest = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float16).eps)
    half_ulp = lattice.blocks.abs() * (coarsest / 2 * 1.02)
    counted = ~lattice.frozen & (lattice.blocks != 0)
    num_counted = int(counted.sum())
    return float((counted & (error <= half_ulp)).sum()) / num_counted if num_counted else 1.0


def sample_rows(weight: Tensor, grid: Grid, max_weights: int, generator: torch.Generator) -> Tensor:
    """A random part of a tensor, cut so that every scale stays what it is in the whole.

    Args:
        weight: ``[out_features, in_features]``.
        grid: The grid that will read it; blocks that cross rows are kept whole.
        max_weights: Largest number of weights to return, unless a single bundle of rows has more.
        generator: Source of randomness. An attacker who knew the rows could spare them.

    Returns:
        ``[rows, in_features]``, the tensor itself where it is small enough.
    """
    rows, columns = weight.shape
    if weight.numel() <= max_weights:
        return weight
    block_size = grid.block_size_of((rows, columns))
    bundle = 1 if block_size >= columns and block_size % columns == 0 else block_size // math.gcd(block_size, columns)
    if block_size % columns == 0:
        bundle = block_size // columns
    num_bundles = rows // bundle
    wanted = max(1, max_weights // (bundle * columns))
    if wanted >= num_bundles:
        return weight
    chosen = torch.randperm(num_bundles, generator=generator)[:wanted].sort().values
    whole = weight[: num_bundles * bundle].view(num_bundles, bundle * columns)
    return whole[chosen].view(-1, columns)


def _rounding(lattice: Lattice, frozen: Tensor) -> Rounding:
    error = lattice.dequantize(lattice.nearest).sub_(lattice.blocks).masked_fill_(frozen, 0.0)
    rows, columns = lattice.shape
    num_weights = rows * columns
    free = ~frozen.view(-1)[:num_weights]
    return Rounding(lattice.matrix(error), lattice.position.reshape(-1)[:num_weights][free])
