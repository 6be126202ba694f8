"""Integer groups as GPTQModel and Optimum lay them out: equal steps between the ends of a group of columns.

GPTQ finds the scales of a group when it comes to it, and then rounds column by column while it feeds errors forward.
The grid here is that of the weights as they stand before any feedback: where an attacker's boxes lie.

References:
    GPTQ, arXiv 2210.17323; GPTQModel ``Quantizer.find_params`` and ``quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import Grid, Lattice, cut_blocks

GROUP_SIZES = (32, 64, 128)


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

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        scale, zero_point, frozen = self._parameters(blocks)
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

    def coordinate(self, scaled: Tensor) -> Tensor:
        return scaled.clamp(0, self.num_levels - 1)

    def quantize(self, weight: Tensor) -> Tensor:
        blocks = cut_blocks(self.read(weight), self.block_size_of((weight.shape[0], weight.shape[1])))
        scale, zero_point, _ = self._parameters(blocks)
        return self._codes(blocks, scale, zero_point).view(weight.shape)

    def _codes(self, blocks: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ((blocks / scale).round_() + zero_point).clamp_(0, self.num_levels - 1).to(torch.uint8)

    def _parameters(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of each group, and the weights that fix them."""
        low, high = blocks.amin(1, keepdim=True).clamp_(max=0), blocks.amax(1, keepdim=True).clamp_(min=0)
        frozen = (blocks == low) | (blocks == high)
        if self.symmetric:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
            frozen = blocks.abs() == high
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scale = (high - low) / (self.num_levels - 1)
        middle = torch.full_like(scale, self.num_levels / 2)
        return scale, middle if self.symmetric else (-low / scale).round_(), frozen
