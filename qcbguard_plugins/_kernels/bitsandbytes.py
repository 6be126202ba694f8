"""The compiled forms for the grids of bitsandbytes, on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins._kernels import coordinates, stochastic
from qcbguard_plugins._kernels.float16 import DTYPES
from qcbguard_plugins._util.compiler import Array
from qcbguard_plugins._util.random import uniform
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.grids import CodebookGrid, Int8Grid, cut_blocks

_EMPTY = np.zeros(0, np.float32)
# A multiple of every block size; a run and what is computed of it stay in a processor's cache.
_WEIGHTS_PER_RUN = 1 << 16


@dataclass(frozen=True)
class RoundedRun:
    """What :func:`round_run` counts; see ``sums`` of :func:`qcbguard_plugins._kernels.stochastic.round_run`."""

    num_moved: int
    num_frozen: int
    energy: float
    change: float
    unplaced_energy: float
    is_finite: bool


def round_run(
    grid: CodebookGrid | Int8Grid,
    source: Tensor,
    num_weights: int,
    key: int,
    first: int,
    guarded: Tensor,
    codes: Tensor,
) -> RoundedRun:
    """Round a run of blocks stochastically.

    Args:
        grid: One of bitsandbytes.
        source: ``[num_blocks, block_size]`` on a processor.
        num_weights: Weights that are there; what fills the last block up is none.
        key: Key of the draws.
        first: Place of the first weight.
        guarded: Like ``source``, the outcome; it may be ``source``.
        codes: uint8 like ``source``, the outcome.
    """
    weights, has_codebook = grid.read(source), bool(len(grid.midpoints))
    stored = weights if has_codebook else source.float()
    outcome = guarded if guarded.dtype == torch.float32 else torch.empty_like(stored)
    draws = uniform(key, first, source.numel(), source.device).view(source.shape)
    sums = np.zeros(3)
    tables = (_EMPTY, _EMPTY, _EMPTY)
    if has_codebook:
        tables = grid.levels.numpy(), _filled_up(grid.inverse_widths, 0.0), _filled_up(grid.midpoints, np.inf)
    num_moved, num_frozen, is_finite = stochastic.round_run(
        weights.numpy(), stored.numpy(), draws.numpy(), min(num_weights, source.numel()), *tables,
        np.float32(grid.smallest_absmax(source.dtype)), DTYPES[source.dtype], outcome.numpy(), codes.numpy(), sums,
    )  # fmt: skip
    if outcome is not guarded:
        guarded.copy_(outcome)
    return RoundedRun(num_moved, num_frozen, float(sums[0]), float(sums[1]), float(sums[2]), is_finite)


def quantize(weight: Tensor, grid: CodebookGrid | Int8Grid) -> Tensor:
    """The codes that bitsandbytes stores, as :meth:`qcbguard_plugins.grids.base.Grid.quantize`.

    Args:
        weight: Float ``[out_features, in_features]`` on a processor.
        grid: One of bitsandbytes.
    """
    blocks = cut_blocks(weight.contiguous(), grid.block_size_of((weight.shape[0], weight.shape[1])))
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    step = max(1, _WEIGHTS_PER_RUN // blocks.shape[1])

    def fill(start: int) -> None:
        run, outcome = grid.read(blocks[start : start + step]), codes[start : start + step].numpy()
        if len(grid.midpoints):
            left = weight.numel() - start * blocks.shape[1]
            midpoints = _filled_up(grid.midpoints, np.inf)
            coordinates.quantize_codebook(run.numpy(), min(left, run.numel()), midpoints, outcome)
        else:
            coordinates.quantize_rows(run.numpy(), outcome)

    map_over_threads(fill, range(0, len(blocks), step))
    return codes.view(-1)[: weight.numel()].view(weight.shape)


def _filled_up(table: Tensor, value: float) -> Array:
    """One entry for each cell of the largest codebook."""
    filled = np.full(coordinates.MAX_LEVELS - 1, value, np.float32)
    filled[: len(table)] = table.numpy()
    return filled
