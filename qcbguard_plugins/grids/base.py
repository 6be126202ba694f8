"""What a stock quantizer will do to a weight.

A grid cuts a weight into blocks that share a scale, and offers each block the same sorted list of *levels*: the
quantizer stores ``levels[code] * scale``, some types with an ``offset`` added. Everything a defense needs follows from
the *coordinate* of a weight, its place on the list of levels: ``7.25`` lies a quarter of the way from level 7 to
level 8.

Grids are maths: they import torch, touch no disk and hold no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Coordinates are float32 numbers up to 254, so they are off by at most half of this.
_TIE_MARGIN = 1e-4


@dataclass(frozen=True)
class Lattice:
    """The two neighbours of every weight on a grid, for a run of blocks.

    Attributes:
        grid: The grid that made it.
        blocks: float32 ``[num_blocks, block_size]``, the weights as the quantizer reads them.
        scale: float32 ``[num_blocks, 1]``, the value of one unit of ``grid.levels``; negative where the type allows it.
        coordinate: float32 ``[num_blocks, block_size]`` in ``[0, num_levels - 1]``.
        frozen: Bool ``[num_blocks, block_size]``, weights that must keep their value: the scale holders, and all of a
            block too small for its dtype to tell the levels apart.
        shape: ``(out_features, in_features)`` of the weight that the blocks were cut from.
        offset: float32 ``[num_blocks, 1]``, the value of level 0; ``None`` for 0.
        stock_codes: uint8 ``[num_blocks, block_size]``, what the stock quantizer stores, where the grid found it out on
            the way; ``None`` where :attr:`nearest` follows from the coordinate.
        divisor: float32 ``[num_blocks, 1]``, the scale that the quantizer divides by where it rounds the one that it
            stores; ``None`` where they are the same.
        base: float32 ``[num_blocks, 1]``, the offset that goes with ``divisor``.
    """

    grid: Grid
    blocks: Tensor
    scale: Tensor
    coordinate: Tensor
    frozen: Tensor
    shape: tuple[int, int]
    offset: Tensor | None = None
    stock_codes: Tensor | None = None
    divisor: Tensor | None = None
    base: Tensor | None = None

    @property
    def lower(self) -> Tensor:
        """uint8 ``[num_blocks, block_size]``, the code of the neighbour below (the last but one at the top level)."""
        return self.coordinate.floor().clamp_(max=self.grid.num_levels - 2).to(torch.uint8)

    @property
    def position(self) -> Tensor:
        """float32 ``[num_blocks, block_size]`` in [0, 1]: 0 at the lower neighbour, 1 at the upper one."""
        return self.coordinate - self.lower

    @cached_property
    def nearest(self) -> Tensor:
        """uint8 ``[num_blocks, block_size]``, the code that the stock quantizer takes, ties included."""
        if self.stock_codes is not None:
            return self.stock_codes
        codes = (self.coordinate - 0.5).ceil_().to(torch.uint8)
        # The coordinate is rounded itself: beside a midpoint only the quantizer's own arithmetic tells.
        doubtful = (self.coordinate - codes).abs_() > 0.5 - _TIE_MARGIN
        rows, columns = doubtful.nonzero(as_tuple=True)
        if rows.numel():
            codes[rows, columns] = self.grid.resolve_ties(self.blocks[rows], columns)
        return codes

    @property
    def upper_is_nearest(self) -> Tensor:
        """Bool ``[num_blocks, block_size]``, true where plain rounding goes up."""
        return self.nearest > self.lower

    @property
    def kept(self) -> Tensor:
        """float32 ``[num_blocks, block_size]``, the value that a frozen weight has after rounding.

        A holder of a formula's scale keeps its own value; one of a searched scale moves to its grid point, because only
        a block of nothing but grid points is found again.
        """
        return self.dequantize(self.nearest) if self.grid.searched else self.blocks

    def dequantize(self, codes: Tensor) -> Tensor:
        """The grid points of ``codes``: float32 ``[num_blocks, block_size]``."""
        values = self.grid.level_values(codes).mul_(self.scale)
        return values if self.offset is None else values.add_(self.offset)

    def weights_for(self, codes: Tensor) -> Tensor:
        """Weights that the quantizer rounds to ``codes``: float32 ``[num_blocks, block_size]``.

        They are the grid points, unless the quantizer divides by another scale than it stores; then they are the
        middles of its cells, within the range that the holders span.
        """
        if self.divisor is None:
            return self.dequantize(codes)
        values = self.grid.level_values(codes).mul_(self.divisor)
        if self.base is None:
            bound = self.blocks.abs().amax(1, keepdim=True)
            # Zero is added to make -0.0 of a negative scale 0.0.
            return values.add_(0.0).clamp_(-bound, bound)
        return values.add_(self.base).clamp_(self.blocks.amin(1, keepdim=True), self.blocks.amax(1, keepdim=True))

    def matrix(self, per_weight: Tensor) -> Tensor:
        """Lay a per-weight (or, like ``scale``, a per-block) tensor out as ``[out_features, in_features]``."""
        rows, columns = self.shape
        return per_weight.expand_as(self.blocks).reshape(-1)[: rows * columns].view(rows, columns)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix` for a per-weight tensor."""
        return cut_blocks(matrix, self.blocks.shape[1])


@dataclass(frozen=True)
class CoordinateTable:
    """How a grid turns values in units of the scale into coordinates, in numbers.

    Attributes:
        inverse_widths: float32 ``[num_levels - 1]``, one over the width of each cell; ``None`` where all are 1.
        shift: What is taken off a value on even levels.
        lowest: The lowest coordinate there.
    """

    inverse_widths: Tensor | None = None
    shift: float = 0.0
    lowest: float = 0.0


class Grid(ABC):
    """One format of one stock quantizer.

    Attributes:
        name: The format as users spell it.
        levels: float32 ``[num_levels]``, sorted, at most 256.
        searched: True where the quantizer searches for its scales, so that nothing but the quantizer itself can say
            whether it stores a choice.
        stores_scales: True where what the quantizer stores for scales and offsets belongs to the plan, beside the
            codes: for GGUF types.
        in_segments: True where blocks stand alone, so that a weight can be guarded, and its stock quantizer asked,
            piece by piece.
        bytes_per_weight: Memory that guarding takes for each weight, besides the weight itself; measured.
        fallback: The format that the stock tool takes where this one does not fit; empty for none.
    """

    name: str
    levels: Tensor
    searched: bool = False
    stores_scales: bool = False
    in_segments: bool = False
    bytes_per_weight: float = 2.0
    fallback: str = ""

    @property
    def num_levels(self) -> int:
        return self.levels.numel()

    @abstractmethod
    def block_size_of(self, shape: tuple[int, int]) -> int:
        """Number of weights that share a scale in a weight of this shape."""

    def fits(self, shape: tuple[int, int]) -> str:
        """Why blocks cannot be cut from a weight of this shape; empty where they can."""
        return ""

    def of_matrix(self, index: int) -> Grid:
        """The grid of one matrix of a stack: another one only where an importance matrix has a row for each."""
        return self

    def probe(self) -> Grid:
        """The same grid for random weights that time it, whatever is stored for them."""
        return self

    def matrix_of(self, run: Tensor, num_columns: int) -> Tensor:
        """Lay whole blocks out as a matrix that the stock quantizer stores as it does the whole weight.

        Args:
            run: Flat, whole blocks of a weight.
            num_columns: Its ``in_features``.
        """
        return run.view(-1, num_columns)

    @abstractmethod
    def read(self, weight: Tensor) -> Tensor:
        """The weight as the quantizer reads it, as float32 in the same shape."""

    def move_scale_holders(self, blocks: Tensor) -> Tensor:
        """Weights whose scale holders sit where the quantizer can store them without an error, if it can at all.

        Args:
            blocks: ``[num_blocks, block_size]`` in the stored dtype.

        Returns:
            The same shape and dtype; ``blocks`` itself where a scale holder keeps its value.
        """
        return blocks

    def scale_holders(self, blocks: Tensor) -> Tensor:
        """Bool ``[num_blocks, block_size]``, the weights that fix the scales of float32 blocks."""
        magnitudes = blocks.abs()
        return magnitudes == magnitudes.amax(dim=1, keepdim=True)

    @abstractmethod
    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        """Find the neighbours of every weight.

        Args:
            blocks: float32 ``[num_blocks, block_size]``, from :meth:`read` and :func:`cut_blocks`.
            shape: Shape of the whole weight.
            dtype: Dtype in which the guarded weight will be stored.
        """

    @abstractmethod
    def coordinate(self, scaled: Tensor) -> Tensor:
        """Map values in units of the scale to the list of levels; values outside it map to its ends."""

    @property
    @abstractmethod
    def coordinate_table(self) -> CoordinateTable:
        """:meth:`coordinate` for a compiled kernel."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Tensor:
        """The codes that the stock quantizer stores: uint8, indices into ``levels``, in the weight's shape.

        Bit-faithful to the quantizer, ties included.
        """

    def stored_values(self, weight: Tensor) -> Tensor:
        """What the stock quantizer stores, dequantized: float32 in the weight's shape."""
        lattice = self.lattice_of(weight)
        return lattice.matrix(lattice.dequantize(lattice.nearest))

    def resolve_ties(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """The stock quantizer's codes of single weights, for a grid whose lattices come without ``stock_codes``.

        Args:
            blocks: float32 ``[n, block_size]``, the block of each weight.
            columns: int64 ``[n]``, the place of the weight in its block.

        Returns:
            uint8 ``[n]``.
        """
        raise NotImplementedError(f"lattices of {self.name} carry stock_codes")

    def level_values(self, codes: Tensor) -> Tensor:
        """``levels[codes]`` as a new float32 tensor in the shape of ``codes``."""
        levels = self.levels.to(codes.device)
        return torch.index_select(levels, 0, codes.reshape(-1).int()).view(codes.shape)

    def lattice_of(self, weight: Tensor) -> Lattice:
        """The lattice of a whole ``[out_features, in_features]`` weight, to be stored in the weight's own dtype."""
        shape = (weight.shape[0], weight.shape[1])
        return self.lattice(cut_blocks(self.read(weight), self.block_size_of(shape)), shape, weight.dtype)

    def planned_lattice_of(self, weight: Tensor) -> Lattice:
        """The lattice that a guard chooses on: that of the weight with its scale holders moved."""
        shape = (weight.shape[0], weight.shape[1])
        moved = self.move_scale_holders(cut_blocks(weight, self.block_size_of(shape)))
        return self.lattice(self.read(moved), shape, weight.dtype)


def ramp_coordinate(scaled: Tensor, segments: list[tuple[float, float]]) -> Tensor:
    """Coordinates on unevenly spaced levels: a sum of clamped ramps, one a cell.

    Several times faster than a binary search (``torch.bucketize``).

    Args:
        scaled: Values in units of the scale.
        segments: Of each cell the level below it and one over its width.
    """
    total = torch.zeros_like(scaled)
    ramp = torch.empty_like(scaled)
    for level, inverse_width in segments:
        total.add_(torch.sub(scaled, level, out=ramp).mul_(inverse_width).clamp_(0, 1))
    return total


def cut_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Cut the flattened weight into ``[num_blocks, block_size]``; a short last block is filled up with zeros.

    A view where no filling is needed. Zeros never change a block's largest magnitude.
    """
    flat = weight.reshape(-1)
    missing = -flat.numel() % block_size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, block_size)
