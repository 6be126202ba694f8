"""A fast form of bitsandbytes' quantizers whose answers the real ones check.

What bitsandbytes stores follows from formulas, which :mod:`qcbguard_plugins._kernels.coordinates` restates; that its
kernels keep to them on this machine is for them to show. So of every part of a weight some blocks, chosen at random, go
through the real quantizer as well, and a short last block always does. Both must agree on every code. At the first
difference the real quantizer answers for that format, for the rest of the process.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor

from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.rounding.guard_weight import load_kernels

# One block (of LLM.int8 one row) in this many is checked, and at least one of every call.
_BLOCKS_PER_CHECK = 32


class CheckedCodes:
    """bitsandbytes' codes by a fast reimplementation, checked by bitsandbytes.

    Attributes:
        differing: Formats whose reimplementation was found to differ.
    """

    def __init__(self) -> None:
        self.differing: set[str] = set()

    def __call__(self, weight: Tensor, grid: Grid) -> Tensor:
        """The codes that bitsandbytes stores, see :func:`qcbguard_plugins.backends.bitsandbytes.stock.stock_codes`."""
        kernels = load_kernels()
        if kernels is None or grid.name in self.differing or weight.device.type != "cpu":
            return stock_codes(weight, grid)
        codes: Tensor = kernels.quantize(weight, grid)
        size = grid.block_size_of((weight.shape[0], weight.shape[1]))
        if torch.equal(_sample(codes, size, first := _first(weight, size)), self._ask(weight, grid, size, first)):
            return codes
        self.differing.add(grid.name)
        return stock_codes(weight, grid)

    def describe(self) -> str:
        """Who was asked, for the record."""
        if load_kernels() is None:
            return "none: numba is not installed"
        import numba

        text = f"numba {numba.__version__}, 1 block in {_BLOCKS_PER_CHECK} compared with bitsandbytes"
        return text + f"; not used, because it differs: {', '.join(sorted(self.differing))}" * bool(self.differing)

    def _ask(self, weight: Tensor, grid: Grid, size: int, first: int) -> Tensor:
        sample = _sample(weight, size, first)
        return stock_codes(grid.matrix_of(sample, size), grid).view(-1)


def _first(weight: Tensor, size: int) -> int:
    return random.randrange(max(1, min(_BLOCKS_PER_CHECK, weight.numel() // size)))  # noqa: S311


def _sample(per_weight: Tensor, size: int, first: int) -> Tensor:
    """One block in so many, and what is behind the last whole one."""
    flat = per_weight.reshape(-1)
    num_whole = flat.numel() // size
    blocks = flat[: num_whole * size].view(num_whole, size)[first::_BLOCKS_PER_CHECK]
    return torch.cat([blocks.reshape(-1), flat[num_whole * size :]])


@lru_cache(maxsize=1)
def checked_codes() -> CheckedCodes:
    """The checked codes, one object for the whole process."""
    return CheckedCodes()
