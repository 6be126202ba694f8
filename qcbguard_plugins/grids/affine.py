"""Integer groups as GPTQModel and Optimum lay them out: equal steps between the ends of a group of columns.

GPTQ finds the scales of a group when it comes to it, and then rounds column by column while it feeds errors forward. A
weight that lies on the grid has no error to feed, so a guarded weight comes through as it is, but for what scale
holders cost:

* Without symmetry the ends of a group can be moved onto the grid (:meth:`AffineGrid.settle`). The scale and zero point
  found again are the planned ones, and nothing is fed forward.
* A symmetric grid has no level at its own ends: they lie half a step outside, at 7.5 of -8 to 7. Each group feeds half
  a step of error forward, whatever its weights are, which moves less than one code in a hundred.

References:
    GPTQ, arXiv 2210.17323; GPTQModel ``Quantizer.find_params`` and ``quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import Grid, Lattice, cut_blocks

GROUP_SIZES = (32, 64, 128)
# Of rounding the ends to the stored dtype, and of what that does to the scale and thereby to the ends.
_SETTLING_ROUNDS = 4
# A grid point must stay within its cell, half a step wide on each side, when it is rounded to the stored dtype.
_MAX_ROUNDING = 0.49


class AffineGrid(Grid):
    """``num_bits`` integers with one scale and zero point for each group of input columns of a row.

    Attributes:
        num_bits: 2 to 8.
        group_size: Columns that share a scale; ``None`` for whole rows.
        symmetric: True where the zero point is the middle of the range, as GPTQModel has it unless told otherwise.
    """

    def __init__(self, num_bits: int, group_size: int | None = 128, symmetric: bool = True) -> None:
        if not 2 <= num_bits <= 8:
            raise UsageError(f"gptq formats have 2 to 8 bits, not {num_bits}")
        if group_size is not None and group_size not in GROUP_SIZES:
            raise UsageError(f"group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        self.num_bits, self.group_size, self.symmetric = num_bits, group_size, symmetric
        group = "" if group_size is None else f"g{group_size}"
        self.name = f"gptq-w{num_bits}{group}{'' if symmetric else '-asym'}"
        self.levels = torch.arange(2**num_bits, dtype=torch.float32)

    def block_size_of(self, shape: tuple[int, int]) -> int:
        if self.group_size is None:
            return shape[1]
        if shape[1] % self.group_size:
            raise UsageError(f"{self.name} takes rows of a multiple of {self.group_size}, not {shape[1]}")
        return self.group_size

    def read(self, weight: Tensor) -> Tensor:
        return weight.float()

    def settle(self, blocks: Tensor) -> Tensor:
        """Move the ends of each group onto the grid, where it has levels there: without symmetry.

        Both move by the same fraction of a step, that by which the zero point was rounded, so the step stays. A stock
        quantizer stores the ends with these values too.
        """
        if self.symmetric:
            return blocks
        values = blocks.float()
        low, high = _ends(values)
        at_low, at_high = (values == low) & (low < 0), (values == high) & (high > 0)
        for _ in range(_SETTLING_ROUNDS):
            scale, zero_point = self._scale(low, high)
            low = (-zero_point * scale).to(blocks.dtype).float()
            high = ((self.num_levels - 1 - zero_point) * scale).to(blocks.dtype).float()
        # One end moves inwards, and what it passes comes along.
        settled = torch.where(at_low, low, torch.where(at_high, high, values.clamp(low, high)))
        return settled.to(blocks.dtype)

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        scale, zero_point, frozen = self._parameters(blocks)
        # Between values that the dtype cannot tell apart there is nothing to choose.
        frozen |= rounding_error(blocks.abs() + scale, dtype) > _MAX_ROUNDING * scale
        return Lattice(
            grid=self,
            blocks=blocks,
            scale=scale,
            coordinate=self.coordinate(blocks / scale + zero_point),
            frozen=frozen,
            shape=shape,
            offset=-zero_point * scale,
            stock_codes=self._codes(blocks, scale, zero_point),
        )

    def holders(self, blocks: Tensor) -> Tensor:
        return self._parameters(blocks)[2]

    def coordinate(self, scaled: Tensor) -> Tensor:
        # The lowest level of a symmetric grid lies beyond the holders: a weight there would become one.
        return scaled.clamp(1 if self.symmetric else 0, self.num_levels - 1)

    def quantize(self, weight: Tensor) -> Tensor:
        blocks = cut_blocks(self.read(weight), self.block_size_of((weight.shape[0], weight.shape[1])))
        scale, zero_point, _ = self._parameters(blocks)
        return self._codes(blocks, scale, zero_point).view(weight.shape)

    def _codes(self, blocks: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ((blocks / scale).round_() + zero_point).clamp_(0, self.num_levels - 1).to(torch.uint8)

    def _parameters(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of each group, and the weights that fix them."""
        low, high = _ends(blocks)
        scale, zero_point = self._scale(low, high)
        if self.symmetric:
            # Without a negative weight the quantizer would halve the step: one near zero must stay.
            last_negative = (blocks == low) & (low < 0) & (low > -2 * scale)
            return scale, zero_point, (blocks.abs() == torch.maximum(low.abs(), high)) | last_negative
        return scale, zero_point, (blocks == low) | (blocks == high)

    def _scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups with these ends, ``low <= 0 <= high``."""
        if self.symmetric:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scale = (high - low) / (self.num_levels - 1)
        middle = torch.full_like(scale, self.num_levels / 2)
        return scale, middle if self.symmetric else (-low / scale).round_()


def _ends(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.amin(1, keepdim=True).clamp_(max=0), blocks.amax(1, keepdim=True).clamp_(min=0)


def rounding_error(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The most by which numbers of this size change when they are rounded to a dtype: half its spacing there."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    return torch.ldexp(torch.full_like(values, info.eps / 4), exponent).clamp_(min=info.tiny * info.eps / 2)
