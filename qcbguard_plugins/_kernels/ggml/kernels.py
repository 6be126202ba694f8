"""The compiled forms of what the grids and the search do, on tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins._kernels.float16 import DTYPES
from qcbguard_plugins._kernels.ggml import coordinates, counting, formula
from qcbguard_plugins._util.compiler import Array
from qcbguard_plugins._util.random import split_key, uniform
from qcbguard_plugins.grids.base import Lattice
from qcbguard_plugins.grids.ggml import GgmlGrid, GuardedRun
from qcbguard_plugins.grids.ggml_blocks import IQ4_LEVELS, StoredBlocks

_EMPTY = np.zeros(0, np.float32)


def _flat(tensor: Tensor | None) -> Array:
    """All values in a row."""
    return _EMPTY if tensor is None else tensor.contiguous().numpy().reshape(-1)


def _rows(weight: Tensor) -> Array:
    """A matrix, one of a 16-bit dtype as its bits."""
    rows = weight.contiguous()
    return rows.numpy() if rows.dtype == torch.float32 else rows.view(torch.int16).numpy().view(np.uint16)


def _each(tensor: Tensor, size: int) -> Array:
    """One value a weight, by sub-block."""
    return tensor.contiguous().numpy().reshape(-1, size)


def _levels(grid: GgmlGrid) -> tuple[Array, bool]:
    """The levels of a type, and whether each is one above the other."""
    return grid.levels.numpy(), grid.block_type.levels != IQ4_LEVELS


class NumbaKernels:
    """Implements :class:`qcbguard_plugins.grids.ggml.Kernels`."""

    def coordinates(self, grid: GgmlGrid, blocks: Tensor, stored: StoredBlocks, /) -> tuple[Tensor, Tensor]:
        size, (levels, even) = grid.block_type.sub_block_size, _levels(grid)
        widths = _EMPTY if even else (1 / grid.levels.diff()).numpy()
        coordinate, frozen = torch.empty_like(blocks), torch.empty_like(blocks, dtype=torch.bool)
        coordinates.place_searched(
            _each(blocks, size), size, _flat(stored.scale), _flat(stored.offset),
            grid.block_type.has_offset, levels, widths, _each(coordinate, size), _each(frozen, size),
        )  # fmt: skip
        return coordinate, frozen

    def formula_lattice(self, grid: GgmlGrid, blocks: Tensor, shape: tuple[int, int], /) -> Lattice:
        size, with_offset, num_blocks = blocks.shape[1], grid.block_type.has_offset, len(blocks)
        coordinate, frozen = torch.empty_like(blocks), torch.empty_like(blocks, dtype=torch.bool)
        codes = torch.empty_like(blocks, dtype=torch.uint8)
        per_block = [torch.empty(num_blocks, 1) for _ in range(4)]
        coordinates.place_by_formula(
            _each(blocks, size), size, np.float32(grid.block_type.levels[0]), np.float32(grid.lowest_code),
            np.float32(grid.num_levels - 1), with_offset, _each(codes, size), *map(_flat, per_block),
            _each(coordinate, size), _each(frozen, size),
        )  # fmt: skip
        scale, offset, divisor, base = per_block
        return Lattice(
            grid, blocks, scale, coordinate, frozen, shape, offset if with_offset else None, codes, divisor,
            base if with_offset else None,
        )  # fmt: skip

    def formula_stored(self, grid: GgmlGrid, blocks: Tensor, /) -> StoredBlocks:
        size, codes = blocks.shape[1], torch.empty_like(blocks, dtype=torch.uint8)
        scale, offset = torch.empty(len(blocks), 1), torch.empty(len(blocks), 1)
        coordinates.encode_by_formula(
            _each(blocks, size), size, np.float32(grid.block_type.levels[0]), np.float32(grid.num_levels - 1),
            grid.block_type.has_offset, _each(codes, size), _flat(scale), _flat(offset),
        )  # fmt: skip
        return StoredBlocks(codes, scale, offset)

    def guard_by_formula(
        self, grid: GgmlGrid, weight: Tensor, key: int, guarded: Tensor, codes: Tensor, /
    ) -> Callable[[slice], GuardedRun]:
        # Arrays, because a thread that works on tensors waits for the interpreter at every operation.
        source, target, stored = _rows(weight), _rows(guarded), codes.numpy()
        columns, block_type = weight.shape[1], grid.block_type
        num_values = columns // formula.SIZE * (2 if block_type.has_offset else 1)
        row_bytes = (columns // 2 if block_type.is_narrow else columns) + 4 * num_values
        kind = (
            np.float32(block_type.levels[0]), np.float32(grid.lowest_code), np.float32(grid.num_levels - 1),
            block_type.has_offset, DTYPES[weight.dtype],
        )  # fmt: skip
        halves = split_key(key)

        def guard(run: slice) -> GuardedRun:
            packed = np.empty((run.stop - run.start, row_bytes), np.uint8)
            counts, sums = np.zeros(3, np.int64), np.zeros(3)
            is_finite = formula.guard_run(
                source[run].reshape(-1), *halves, run.start * columns, *kind, target[run].reshape(-1),
                stored[run].reshape(-1, formula.SIZE), packed, counts, sums,
            )  # fmt: skip
            num_moved, num_frozen, num_as_planned = counts.tolist()
            energy, lost, change = sums.tolist()
            return GuardedRun(packed, num_moved, num_frozen, num_as_planned, energy, lost, change, is_finite)

        return guard

    def choose(self, lattice: Lattice, key: int, first: int, /) -> Tensor:
        codes = torch.empty_like(lattice.blocks, dtype=torch.uint8)
        draws = uniform(key, first, codes.numel(), codes.device)
        last = np.float32(lattice.grid.num_levels - 2)
        counting.choose(_flat(lattice.coordinate), draws.numpy(), last, _flat(codes))
        return codes

    def correct(
        self, grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, share: float, handed_over: Tensor, /
    ) -> None:
        size = grid.block_type.sub_block_size
        counting.correct(
            size, *_levels(grid), np.float32(share), _each(stored.codes, size), _flat(stored.scale),
            _flat(stored.offset), _each(chosen.codes, size), _flat(chosen.scale), _flat(chosen.offset),
            handed_over.numpy().reshape(-1, size),
        )  # fmt: skip

    def choose_points(self, grid: GgmlGrid, lattice: Lattice, chosen: Tensor, /) -> tuple[Tensor, Tensor, int, int]:
        points, codes = torch.empty_like(lattice.blocks), torch.empty_like(chosen)
        size, (levels, even) = lattice.blocks.shape[1], _levels(grid)
        num_moved, num_frozen = counting.choose_points(
            _each(lattice.blocks, size), size, levels, even, _each(chosen, size), _each(lattice.nearest, size),
            _each(lattice.frozen, size), not grid.searched, _flat(lattice.scale), _offsets(lattice),
            _flat(lattice.divisor), _flat(lattice.base), _each(points, size), _each(codes, size),
        )  # fmt: skip
        return points, codes, num_moved, num_frozen

    def compare(
        self, grid: GgmlGrid, stored: StoredBlocks, chosen: StoredBlocks, unit: int, /
    ) -> tuple[Tensor, Tensor]:
        size, num_units = grid.block_type.sub_block_size, stored.codes.numel() // unit
        as_planned, misses = torch.empty(num_units, dtype=torch.int32), torch.empty(num_units)
        counting.compare(
            size, *_levels(grid), _each(stored.codes, size), _flat(stored.scale), _flat(stored.offset),
            _each(chosen.codes, size), _flat(chosen.scale), _flat(chosen.offset),
            np.float32(grid.levels.diff().min() / 2), unit // size, _flat(as_planned), _flat(misses),
        )  # fmt: skip
        return as_planned, misses

    def measure(
        self, grid: GgmlGrid, weight: Tensor, handed_over: Tensor, scale: Tensor, /
    ) -> tuple[float, float, float]:
        size = grid.block_type.sub_block_size
        sums: tuple[float, float, float] = counting.measure(
            _each(weight, size), _each(handed_over, size), size, _flat(scale)
        )
        return sums


def _offsets(lattice: Lattice) -> Array:
    return _flat(torch.zeros_like(lattice.scale) if lattice.offset is None else lattice.offset)
