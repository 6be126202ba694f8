"""Integers with equal steps between the ends of a group of columns: what most toolchains make of a weight.

They differ in where the ends of the range lie among the levels (:class:`Span`), and in their arithmetic.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import CoordinateTable, Grid, Lattice, cut_blocks

WHOLE_TENSOR = -1
"""As a group size: one scale for all weights."""

# Of rounding the ends to the stored dtype, and of what that does to the scale and thereby to the ends.
_MOVING_ROUNDS = 4
# A grid point must stay within its cell, half a step wide on each side, when it is rounded to the stored dtype.
_MAX_ROUNDING = 0.49


class Span(Enum):
    """How the levels lie about the range of a group.

    Attributes:
        SYMMETRIC: The largest magnitude is half the number of steps. With an even number of levels it lies half a step
            outside, at 7.5 of -8 to 7; with an odd one it is the last level, 127 of -127 to 127.
        SIGNED: The weight of largest magnitude is the lowest level, whatever its sign: the step is negative where it
            is positive.
        ASYMMETRIC: From the smallest to the largest weight, zero included, and zero is a level.
        SHIFTED: From the smallest to the largest weight, wherever zero lies: the zero point is no integer.
    """

    SYMMETRIC = "symmetric"
    SIGNED = "signed"
    ASYMMETRIC = "asymmetric"
    SHIFTED = "shifted"


class IntegerGrid(Grid):
    """``num_levels`` integers with one scale and zero point for each group of input columns of a row.

    Attributes:
        group_size: Columns that share a scale; ``None`` for whole rows, ``WHOLE_TENSOR`` for all weights.
        span: How the levels lie about the range.
    """

    def __init__(
        self,
        name: str,
        num_levels: int,
        group_size: int | None,
        span: Span,
        *,
        reciprocal: bool = False,
        native: bool = False,
        native_scale: bool = False,
        zero_first: bool = False,
        negative_on_tie: bool = False,
    ) -> None:
        """Describe a quantizer.

        Args:
            name: The format as users spell it.
            num_levels: Number of levels, at most 256.
            group_size: Columns that share a scale; ``None`` for whole rows.
            span: How the levels lie about the range.
            reciprocal: True where the quantizer multiplies by the inverse of the scale instead of dividing.
            native: True where it computes in the dtype of the weight, and not in float32.
            native_scale: True where it does so for the scale alone.
            zero_first: True where it adds the zero point before it rounds, which breaks ties otherwise.
            negative_on_tie: With signed levels, true where the step is negative if both ends are equally far away.
        """
        self.name, self.group_size, self.span = name, group_size, span
        self._reciprocal, self._native, self._zero_first = reciprocal, native, zero_first
        self._native_scale, self._negative_on_tie = native or native_scale, negative_on_tie
        self.levels = torch.arange(num_levels, dtype=torch.float32)

    @property
    def symmetric(self) -> bool:
        return self.span in (Span.SYMMETRIC, Span.SIGNED)

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return (self.num_levels - 1).bit_length()

    def block_size_of(self, shape: tuple[int, int]) -> int:
        if self.group_size is None:
            return shape[1]
        if self.group_size == WHOLE_TENSOR:
            return shape[0] * shape[1]
        if problem := self.fits(shape):
            raise UsageError(f"{self.name} does not fit a weight of {problem}")
        return self.group_size

    def fits(self, shape: tuple[int, int]) -> str:
        size = self.group_size
        if size in (None, WHOLE_TENSOR) or not shape[1] % size:
            return ""
        return f"in_features={shape[1]}, group_size={size}"

    def read(self, weight: Tensor) -> Tensor:
        return weight.float()

    def move_scale_holders(self, blocks: Tensor) -> Tensor:
        """Move the ends of each group onto the grid, where it has no levels there but could: without symmetry.

        Both move by the same fraction of a step, that by which the zero point was rounded, so the step stays. A stock
        quantizer stores the ends with these values too.
        """
        if self.span is not Span.ASYMMETRIC:
            return blocks
        values = blocks.float()
        low, high = group_ends(values)
        at_low, at_high = (values == low) & (low < 0), (values == high) & (high > 0)
        for _ in range(_MOVING_ROUNDS):
            scale, zero_point = self._scale(low.to(blocks.dtype), high.to(blocks.dtype))
            low = (-zero_point * scale).to(blocks.dtype).float()
            high = ((self.num_levels - 1 - zero_point) * scale).to(blocks.dtype).float()
        # One end moves inwards, and what it passes comes along.
        moved = torch.where(at_low, low, torch.where(at_high, high, values.clamp(low, high)))
        return moved.to(blocks.dtype)

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        scale, zero_point, frozen = self._parameters(blocks, dtype)
        # Between values that the dtype cannot tell apart there is nothing to choose.
        frozen |= self._most_rounding(blocks / scale, scale, dtype) > _MAX_ROUNDING
        return Lattice(
            grid=self,
            blocks=blocks,
            scale=scale,
            coordinate=self.coordinate(blocks / scale + zero_point),
            frozen=frozen,
            shape=shape,
            offset=-zero_point * scale,
            stock_codes=self._codes(blocks, scale, zero_point, dtype),
        )

    def scale_holders(self, blocks: Tensor) -> Tensor:
        return self._parameters(blocks, torch.float32)[2]

    def coordinate(self, scaled: Tensor) -> Tensor:
        # The lowest of an even number of symmetric levels lies beyond the holders: a weight there would become one.
        return scaled.clamp(self.coordinate_table.lowest, self.num_levels - 1)

    @property
    def coordinate_table(self) -> CoordinateTable:
        beyond = self.span is Span.SYMMETRIC and self.num_levels % 2 == 0
        return CoordinateTable(lowest=1.0 if beyond else 0.0)

    def quantize(self, weight: Tensor) -> Tensor:
        blocks = cut_blocks(self.read(weight), self.block_size_of((weight.shape[0], weight.shape[1])))
        scale, zero_point, _ = self._parameters(blocks, weight.dtype)
        return self._codes(blocks, scale, zero_point, weight.dtype).view(weight.shape)

    def _most_rounding(self, steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """By how many steps a neighbour of a weight may be off when the quantizer rounds it.

        Args:
            steps: float32, weights in units of the scale.
            scale: float32, their scales.
            dtype: Dtype in which they are stored.
        """
        reach = steps.abs() + 1
        most = rounding_error(reach * scale.abs(), dtype) / scale.abs()
        if self._native:
            # Of the quotient, and of the inverse that makes it a product.
            most += rounding_error(reach, dtype) * (2 if self._reciprocal else 1)
        return most

    def _codes(self, blocks: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        if self._native:
            blocks, scale = blocks.to(dtype), scale.to(dtype)
        scaled = blocks * (1.0 / scale) if self._reciprocal else blocks / scale
        codes = (scaled + zero_point).round_() if self._zero_first else scaled.round_().float() + zero_point
        return codes.clamp_(0, self.num_levels - 1).to(torch.uint8)

    def _parameters(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point of each group, and the weights that fix them; all float32 but the last."""
        low, high = group_ends(blocks, with_zero=self.span is not Span.SHIFTED)
        scale, zero_point = self._scale(low.to(dtype), high.to(dtype))
        if self.symmetric:
            return scale, zero_point, blocks.abs() == torch.maximum(-low, high)
        return scale, zero_point, (blocks == low) | (blocks == high)

    def _scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, in float32, of groups with these ends in the dtype of the weight."""
        if not self._native_scale:
            low, high = low.float(), high.float()
        steps = self.num_levels - 1
        if self.span is Span.SIGNED:
            half = self.num_levels // 2
            positive = -low > high if self._negative_on_tie else -low >= high
            scale = torch.where(positive, -low, -high) / half
        elif self.span is Span.SYMMETRIC:
            half = self.num_levels // 2
            scale = torch.maximum(-low, high) / (steps / 2)
        else:
            scale = (high - low) / steps
        tiny = torch.finfo(scale.dtype).smallest_normal
        scale = torch.where(scale.abs() < tiny, tiny, scale)
        if self.span is Span.SHIFTED:
            return scale.float(), -low.float() / scale.float()
        if self.span is Span.ASYMMETRIC:
            return scale.float(), (-(low / scale).round_()).clamp_(0, steps).float()
        return scale.float(), torch.full_like(scale, half, dtype=torch.float32)


def group_ends(blocks: Tensor, *, with_zero: bool = True) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, and of zero: ``[num_blocks, 1]`` each."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    return (low.clamp_(max=0), high.clamp_(min=0)) if with_zero else (low, high)


def rounding_error(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The most by which numbers of this size change when they are rounded to a dtype: half its spacing there."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    return torch.ldexp(torch.full_like(values, info.eps / 4), exponent).clamp_(min=info.tiny * info.eps / 2)
