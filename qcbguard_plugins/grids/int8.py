"""bitsandbytes LLM.int8: 255 equal steps between plus and minus the largest magnitude of a row.

References:
    LLM.int8(), arXiv 2208.07339, section 3.1; bitsandbytes ``int8_vectorwise_quant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.grids.base import CoordinateTable, Grid, Lattice

_MAX_CODE = 127
# bitsandbytes dequantizes with this float32 constant and not with a division.
_INVERSE_MAX_CODE = 7.874015718698502e-3

# The quantizer reads weights as float16. A bfloat16 grid point lies at least 0.04 steps inside its cell near the top
# of a row; below this row maximum half a float16 subnormal step would eat that.
SMALLEST_ABSMAX = 2.0**-13


class Int8Grid(Grid):
    """LLM.int8 weights. The outlier threshold concerns activations and never the stored codes."""

    name = "int8"
    in_segments = True

    midpoints = inverse_widths = torch.empty(0)

    def __init__(self) -> None:
        self.levels = torch.arange(-_MAX_CODE, _MAX_CODE + 1, dtype=torch.float32)

    def block_size_of(self, shape: tuple[int, int]) -> int:
        return shape[1]

    def smallest_absmax(self, dtype: torch.dtype) -> float:
        """Below this row maximum a grid point may leave its cell when it is read."""
        return SMALLEST_ABSMAX

    def read(self, weight: Tensor) -> Tensor:
        return weight.half().float()

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        magnitudes = blocks.abs()
        absmax = magnitudes.amax(dim=1, keepdim=True)
        steps_per_unit = torch.where(absmax > 0, _MAX_CODE / absmax, torch.zeros_like(absmax))
        holders = (magnitudes == absmax).logical_or_(absmax < SMALLEST_ABSMAX)
        coordinate = self.coordinate(blocks * steps_per_unit)
        return Lattice(self, blocks, absmax * _INVERSE_MAX_CODE, coordinate, holders, shape)

    def coordinate(self, scaled: Tensor) -> Tensor:
        return (scaled + _MAX_CODE).clamp_(0, 2 * _MAX_CODE)

    @property
    def coordinate_table(self) -> CoordinateTable:
        return CoordinateTable(shift=-_MAX_CODE)

    def resolve_ties(self, blocks: Tensor, columns: Tensor) -> Tensor:
        scaled = blocks * (_MAX_CODE / blocks.abs().amax(dim=1, keepdim=True))
        return (scaled.gather(1, columns[:, None])[:, 0].round() + _MAX_CODE).to(torch.uint8)

    def quantize(self, weight: Tensor) -> Tensor:
        half = weight.half()
        absmax = half.abs().amax(dim=1, keepdim=True).float()
        steps = torch.round(half * (_MAX_CODE / absmax)).nan_to_num_(0.0)
        return (steps + _MAX_CODE).to(torch.uint8)
