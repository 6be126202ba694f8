"""The types of llama.cpp's GGUF files as grids.

Two kinds. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 take their scale from a formula, which is restated here bit for bit. All
others, and every type once an importance matrix weighs the columns, search for the scale: there the real quantizer is
asked, through a function that is handed in, and what it stores is unpacked.

References:
    ggml ``ggml-quants.c``: ``quantize_row_*_ref`` and ``quantize_*``.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcbguard_plugins.grids.base import CoordinateTable, Grid, Lattice, cut_blocks, ramp_coordinate
from qcbguard_plugins.grids.ggml_blocks import IQ4_LEVELS, BlockType, StoredBlocks


class Quantizer(Protocol):
    """The real quantizer, or what answers in its place: float32 ``[rows, columns]`` in, what is stored out."""

    def __call__(self, block_type: BlockType, weight: Tensor, importance: Tensor | None, /) -> StoredBlocks:
        """Quantize whole rows."""
        ...

    def is_restated(self, block_type: BlockType) -> bool:
        """True while something else answers in the real quantizer's place, which it stops to do once it was wrong."""
        ...

    def real(self) -> Quantizer:
        """The real quantizer, in whose place nothing else answers."""
        ...


@dataclass(frozen=True)
class GuardedRun:
    """What became of some rows that were guarded in one pass.

    Attributes:
        packed_rows: What the quantizer stores for them; see :func:`qcbguard_plugins.rounding.guarded_weight.pack_rows`.
        num_moved: Weights whose code is not the nearest.
        num_frozen: Weights that have no choice.
        num_as_planned: Weights that are stored as chosen.
        energy: Sum of the squared weights.
        lost_energy: That of blocks that hold a single value.
        change: Sum of the squared changes.
        is_finite: False where a weight is not; then nothing else counts.
    """

    packed_rows: NDArray[np.uint8]
    num_moved: int
    num_frozen: int
    num_as_planned: int
    energy: float
    lost_energy: float
    change: float
    is_finite: bool


class Kernels(Protocol):
    """What this module and :mod:`qcbguard_plugins.rounding.search_steps` do in torch, compiled."""

    def coordinates(self, grid: GgmlGrid, blocks: Tensor, stored: StoredBlocks, /) -> tuple[Tensor, Tensor]:
        """The coordinates of weights on scales that a search has found, and which of them are frozen."""
        ...

    def formula_lattice(self, grid: GgmlGrid, blocks: Tensor, shape: tuple[int, int], /) -> Lattice:
        """The lattice of a type with a formula."""
        ...

    def formula_stored(self, grid: GgmlGrid, blocks: Tensor, /) -> StoredBlocks:
        """What a type with a formula stores."""
        ...

    def guard_by_formula(
        self, grid: GgmlGrid, weight: Tensor, key: int, guarded: Tensor, codes: Tensor, /
    ) -> Callable[[slice], GuardedRun]:
        """What guards some rows stochastically for a type with a formula, and fills ``guarded`` and ``codes`` there."""
        ...

    def choose(self, lattice: Lattice, key: int, first: int, /) -> Tensor:
        """Stochastic rounding: uint8 like the lattice's blocks."""
        ...

    def correct(
        self, grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, share: float, handed_over: Tensor, /
    ) -> None:
        """See :func:`qcbguard_plugins.rounding.search_steps.correct`."""
        ...

    def choose_points(self, grid: GgmlGrid, lattice: Lattice, chosen: Tensor, /) -> tuple[Tensor, Tensor, int, int]:
        """See :func:`qcbguard_plugins.rounding.search_steps.choose_points`."""
        ...

    def compare(
        self, grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, unit: int, /
    ) -> tuple[Tensor, Tensor]:
        """See :func:`qcbguard_plugins.rounding.search_steps.compare`."""
        ...

    def measure(
        self, grid: GgmlGrid, weight: Tensor, handed_over: Tensor, scale: Tensor, /
    ) -> tuple[float, float, float]:
        """See :func:`qcbguard_plugins.rounding.search_steps.measure`."""
        ...


#: Share of a tensor's codes that must be stored as chosen, unless the user says otherwise.
MIN_AS_PLANNED = 0.98


class GgmlGrid(Grid):
    """A GGUF type.

    Attributes:
        block_type: The type.
        outtype: Dtype of the GGUF file that ``llama-quantize`` reads, which the weight is cast to first.
        kernels: Compiled forms of what is done in torch otherwise, where there are any.
        min_as_planned: Share of a tensor's codes that must be stored as chosen; below it the tensor counts as
            unguardable.
        importance: float32 ``[in_features]``, the importance matrix of the tensor, or ``[num_matrices, in_features]``
            for a stack of them; ``None`` without one.
    """

    stores_scales = True
    # A type is searched with several float32 copies.
    bytes_per_weight = 10.0
    importance: Tensor | None = None

    def __init__(
        self,
        block_type: BlockType,
        outtype: torch.dtype = torch.float32,
        kernels: Kernels | None = None,
        *,
        min_as_planned: float = MIN_AS_PLANNED,
    ) -> None:
        self.block_type = block_type
        self.outtype = outtype
        self.kernels = kernels
        self.min_as_planned = min_as_planned
        self.fallback = f"gguf:{block_type.fallback}" if block_type.fallback else ""
        self.name = f"gguf:{block_type.name}"
        self.levels = torch.tensor(block_type.levels, dtype=torch.float32)
        widths = self.levels.diff()
        self._segments = list(zip(self.levels.tolist(), (1.0 / widths).tolist(), strict=False))
        # ggml's Q8_0 never stores -128, though a file may hold it.
        self.lowest_code = 1 if block_type.name == "Q8_0" else 0

    def block_size_of(self, shape: tuple[int, int]) -> int:
        return self.block_type.sub_block_size

    def fits(self, shape: tuple[int, int]) -> str:
        size = self.block_type.block_size
        return f"in_features={shape[1]}, block_size={size}" if shape[1] % size else ""

    def read(self, weight: Tensor) -> Tensor:
        return weight.to(self.outtype).float()

    def coordinate(self, scaled: Tensor) -> Tensor:
        if self.block_type.levels == IQ4_LEVELS:
            return ramp_coordinate(scaled, self._segments)
        return (scaled - self.levels[0].item()).clamp_(self.lowest_code, self.num_levels - 1)

    @property
    def coordinate_table(self) -> CoordinateTable:
        if self.block_type.levels == IQ4_LEVELS:
            return CoordinateTable(1.0 / self.levels.diff())
        return CoordinateTable(shift=self.levels[0].item(), lowest=self.lowest_code)

    def probe(self) -> Grid:
        probe = copy.copy(self)
        probe.importance, probe.min_as_planned = None, 0.0
        return probe

    @abstractmethod
    def stored(self, weight: Tensor) -> StoredBlocks:
        """What the stock quantizer stores for a weight, or for a run of its blocks laid out as rows."""

    @property
    def is_restated(self) -> bool:
        """Whether something else answers in the real quantizer's place, which it stops to do once it was wrong."""
        return False

    def asked_directly(self) -> GgmlGrid:
        """The same grid with the real quantizer behind it."""
        return self

    def quantize(self, weight: Tensor) -> Tensor:
        return self.stored(weight).codes.view(weight.shape)

    def stored_values(self, weight: Tensor) -> Tensor:
        return self.values(self.stored(weight)).view(weight.shape)

    def values(self, stored: StoredBlocks) -> Tensor:
        """Dequantize: float32 ``[num_sub_blocks, sub_block_size]``, bit-equal to ggml's."""
        return self.level_values(stored.codes).mul_(stored.scale).add_(stored.offset)


def is_ggml(grid: Grid) -> TypeGuard[GgmlGrid]:
    """True for a GGUF type: the grids that store scales of their own rounding."""
    return grid.stores_scales


class FormulaGrid(GgmlGrid):
    """Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 without an importance matrix.

    The quantizer divides by a float32 scale and stores it as float16. Weights are placed in the middle of their cell,
    so a code lands however coarse the stored scale is.
    """

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        if self.kernels is not None and blocks.device.type == "cpu":
            return self.kernels.formula_lattice(self, blocks, shape)
        divisor, base, holders = self._scale(blocks)
        scale, offset = divisor.half().float(), None if base is None else base.half().float()
        inverse = torch.where(scale != 0, scale.reciprocal(), torch.zeros_like(scale))
        centred = blocks if offset is None else blocks - offset
        frozen = holders.logical_or_(scale == 0)
        codes = self._codes(blocks, divisor, base)
        coordinate = self.coordinate(centred * inverse)
        return Lattice(self, blocks, scale, coordinate, frozen, shape, offset, codes, divisor, base)

    def stored(self, weight: Tensor) -> StoredBlocks:
        blocks = cut_blocks(self.read(weight), self.block_type.block_size)
        if self.kernels is not None and blocks.device.type == "cpu":
            return self.kernels.formula_stored(self, blocks)
        divisor, base, _ = self._scale(blocks)
        offset = torch.zeros_like(divisor) if base is None else base.half().float()
        return StoredBlocks(self._codes(blocks, divisor, base), divisor.half().float(), offset)

    def _scale(self, blocks: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The float32 scale and offset of each block, and what holds them."""
        if self.block_type.has_offset:
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            return (high - low) / (self.num_levels - 1), low, (blocks == low) | (blocks == high)
        magnitudes = blocks.abs()
        absmax = magnitudes.amax(dim=1, keepdim=True)
        holders = magnitudes == absmax
        if self.block_type.name == "Q8_0":
            return absmax / 127, None, holders
        # The first of several largest magnitudes gives the scale its sign; argmax of a bool finds the first.
        first = holders.to(torch.uint8).argmax(1, keepdim=True)
        return blocks.gather(1, first) / self.levels[0].item(), None, holders

    def _codes(self, blocks: Tensor, divisor: Tensor, base: Tensor | None) -> Tensor:
        inverse = torch.where(divisor != 0, divisor.reciprocal(), torch.zeros_like(divisor))
        if base is not None:
            return ((blocks - base) * inverse + 0.5).clamp_(max=self.num_levels - 1).to(torch.uint8)
        scaled = blocks * inverse
        if self.block_type.name == "Q8_0":
            # roundf: halves away from zero.
            magnitudes = scaled.abs()
            whole = magnitudes.floor()
            return (whole.add_(magnitudes - whole >= 0.5).copysign_(scaled) + 128).to(torch.uint8)
        half = self.num_levels // 2
        return (scaled + (half + 0.5)).clamp_(max=self.num_levels - 1).to(torch.uint8)


class SearchedGrid(GgmlGrid):
    """A type whose scales the quantizer searches for, in blocks or, with an importance matrix, in rows."""

    searched = True

    def __init__(
        self,
        block_type: BlockType,
        quantizer: Quantizer,
        outtype: torch.dtype = torch.float32,
        importance: Tensor | None = None,
        kernels: Kernels | None = None,
        *,
        min_as_planned: float = MIN_AS_PLANNED,
    ) -> None:
        super().__init__(block_type, outtype, kernels, min_as_planned=min_as_planned)
        self.quantizer = quantizer
        self.importance = importance

    def of_matrix(self, index: int) -> Grid:
        if self.importance is None or self.importance.dim() == 1:
            return self
        return self._with(self.quantizer, self.importance[index])

    @property
    def is_restated(self) -> bool:
        return self.quantizer.is_restated(self.block_type)

    def asked_directly(self) -> GgmlGrid:
        return self._with(self.quantizer.real(), self.importance)

    def lattice(self, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Lattice:
        stored = self.stored(blocks.reshape(-1, shape[1]))
        if self.kernels is not None and blocks.device.type == "cpu":
            coordinate, frozen = self.kernels.coordinates(self, blocks, stored)
            return Lattice(self, blocks, stored.scale, coordinate, frozen, shape, stored.offset, stored.codes)
        inverse = torch.where(stored.scale != 0, stored.scale.reciprocal(), torch.zeros_like(stored.scale))
        coordinate = self.coordinate((blocks - stored.offset) * inverse)
        frozen = (stored.scale == 0).expand_as(blocks).clone()
        if self.block_type.has_offset:
            frozen.scatter_(1, blocks.argmax(1, keepdim=True), True)
            frozen.scatter_(1, blocks.argmin(1, keepdim=True), True)
        else:
            frozen.scatter_(1, blocks.abs().argmax(1, keepdim=True), True)
        return Lattice(self, blocks, stored.scale, coordinate, frozen, shape, stored.offset, stored.codes)

    def stored(self, weight: Tensor) -> StoredBlocks:
        return self.quantizer(self.block_type, self.read(weight), self.importance)

    def _with(self, quantizer: Quantizer, importance: Tensor | None) -> SearchedGrid:
        return SearchedGrid(
            self.block_type, quantizer, self.outtype, importance, self.kernels, min_as_planned=self.min_as_planned
        )
