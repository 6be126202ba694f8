"""bitsandbytes NF4 and FP4: a 16-value codebook times the largest magnitude of each block.

References:
    QLoRA, arXiv 2305.14314, section 3 (NF4); bitsandbytes ``quantize_4bit``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import CoordinateTable, Grid, Lattice, ramp_coordinate

# The values of bitsandbytes' tables, as float32. FP4 has two codes for zero; a level is a value, so it appears once.
_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_MAGNITUDES = (
    0.0052083334885537624,
    0.1666666716337204,
    0.25,
    0.3333333432674408,
    0.5,
    0.6666666865348816,
    1.0,
)
_FP4_LEVELS = (*(-m for m in reversed(_FP4_MAGNITUDES)), 0.0, *_FP4_MAGNITUDES)
_CODEBOOKS = {"nf4": _NF4_LEVELS, "fp4": _FP4_LEVELS}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# bitsandbytes divides by at least this, so blocks below it are not scaled to [-1, 1].
_SMALLEST_DIVISOR = 1e-38


class CodebookGrid(Grid):
    """NF4 or FP4 with one of the block sizes that bitsandbytes allows.

    Double quantization of the block scales changes the dequantized values and not the codes, so it needs no grid of
    its own.

    Attributes:
        midpoints: float32 ``[num_levels - 1]``, halfway between neighbouring levels.
        inverse_widths: float32 ``[num_levels - 1]``, one over their distances.
    """

    in_segments = True

    def __init__(self, quant_type: str, block_size: int = 64) -> None:
        if block_size not in BLOCK_SIZES:
            raise UsageError(
                f"block size {block_size} is not one that bitsandbytes can quantize {quant_type} with",
                remedy=f"Use one of {', '.join(map(str, BLOCK_SIZES))}.",
            )
        self.quant_type = quant_type
        self.block_size = block_size
        self.name = quant_type if block_size == 64 else f"{quant_type}-b{block_size}"
        self.levels = torch.tensor(_CODEBOOKS[quant_type], dtype=torch.float32)
        self.midpoints = (self.levels[:-1] + self.levels[1:]) / 2
        widths = self.levels.diff()
        self.inverse_widths = 1.0 / widths
        self._segments = list(zip(self.levels.tolist(), self.inverse_widths.tolist(), strict=False))
        self._smallest_half_width = widths.min().item() / 2

    def block_size_of(self, shape: tuple[int, int]) -> int:
        return self.block_size

    def matrix_of(self, run: Tensor, num_columns: int) -> Tensor:
        # Blocks may cross rows.
        return run.view(1, -1)

    def read(self, weight: Tensor) -> Tensor:
        return weight.float()

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        magnitudes = blocks.abs()
        absmax = magnitudes.amax(dim=1, keepdim=True)
        scaled = blocks * absmax.clamp(min=_SMALLEST_DIVISOR).reciprocal()
        holders = (magnitudes == absmax).logical_or_(absmax < self.smallest_absmax(dtype))
        return Lattice(self, blocks, absmax, self.coordinate(scaled), holders, shape)

    def smallest_absmax(self, dtype: torch.dtype) -> float:
        """Below this block scale ``dtype`` runs out of subnormals before the levels are told apart."""
        info = torch.finfo(dtype)
        subnormal_step = info.smallest_normal * info.eps
        return max(torch.finfo(torch.float32).smallest_normal, subnormal_step / self._smallest_half_width)

    def coordinate(self, scaled: Tensor) -> Tensor:
        return ramp_coordinate(scaled, self._segments)

    @property
    def coordinate_table(self) -> CoordinateTable:
        return CoordinateTable(self.inverse_widths)

    def resolve_ties(self, blocks: Tensor, columns: Tensor) -> Tensor:
        scaled = blocks * blocks.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST_DIVISOR).reciprocal()
        single = scaled.gather(1, columns[:, None])[:, 0].clamp_(-1, 1)
        return torch.bucketize(single, self.midpoints.to(blocks.device), out_int32=True).to(torch.uint8)

    def quantize(self, weight: Tensor) -> Tensor:
        values = weight.reshape(-1).float()
        num_full = values.numel() - values.numel() % self.block_size
        blocks = values[:num_full].view(-1, self.block_size)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        scaled = (blocks * absmax.clamp(min=_SMALLEST_DIVISOR).reciprocal()).view(-1)
        if num_full < values.numel():
            # The stock kernel divides the short last block instead of multiplying it by a reciprocal.
            rest = values[num_full:]
            scaled = torch.cat([scaled, rest / rest.abs().max().clamp(min=_SMALLEST_DIVISOR)])
        codes = torch.bucketize(scaled.clamp_(-1, 1), self.midpoints.to(weight.device), out_int32=True)
        return codes.to(torch.uint8).view(weight.shape)
