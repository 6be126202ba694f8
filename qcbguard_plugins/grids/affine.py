"""Integer groups as GPTQModel and Optimum lay them out: equal steps between the ends of a group of columns.

GPTQ finds the scales of a group when it comes to it, and then rounds column by column while it feeds errors forward. A
weight that lies on the grid has no error to feed, so a guarded weight comes through as it is, but for what scale
holders cost:

* Without symmetry the ends of a group can be moved onto the grid (``settle``). The scale and zero point found again are
  the planned ones, and nothing is fed forward.
* A symmetric grid has no level at its own ends: they lie half a step outside, at 7.5 of -8 to 7. Each group feeds half
  a step of error forward, whatever its weights are, which moves less than one code in a hundred.

References:
    GPTQ, arXiv 2210.17323; GPTQModel ``Quantizer.find_params`` and ``quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.integer import IntegerGrid, Span, group_ends

GROUP_SIZES = (32, 64, 128)


class AffineGrid(IntegerGrid):
    """GPTQ's ``num_bits`` integers.

    Args:
        num_bits: 2 to 8.
        group_size: Columns that share a scale; ``None`` for whole rows.
        symmetric: True where the zero point is the middle of the range, as GPTQModel has it unless told otherwise.
    """

    def __init__(self, num_bits: int, group_size: int | None = 128, symmetric: bool = True) -> None:
        if not 2 <= num_bits <= 8:
            raise UsageError(f"gptq formats have 2 to 8 bits, not {num_bits}")
        if group_size is not None and group_size not in GROUP_SIZES:
            raise UsageError(f"group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        group = "" if group_size is None else f"g{group_size}"
        name = f"gptq-w{num_bits}{group}{'' if symmetric else '-asym'}"
        super().__init__(name, 2**num_bits, group_size, Span.SYMMETRIC if symmetric else Span.ASYMMETRIC)

    def _parameters(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero_point, frozen = super()._parameters(blocks, dtype)
        if self.symmetric:
            # Without a negative weight the quantizer would halve the step: one near zero must stay.
            low, _ = group_ends(blocks)
            frozen |= (blocks == low) & (low < 0) & (low > -2 * scale)
        return scale, zero_point, frozen

    def _scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low.float(), high.float()
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scale = (high - low) / (self.num_levels - 1)
        middle = torch.full_like(scale, self.num_levels / 2)
        return scale, middle if self.symmetric else (-low / scale).round_()
