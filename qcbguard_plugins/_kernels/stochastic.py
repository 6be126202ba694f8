"""Stochastic rounding on the grids of bitsandbytes in one pass over a weight."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._kernels.coordinates import (
    HALF,
    INVERSE_MAX_CODE,
    MAX_CODE,
    ZERO,
    code_in_codebook,
    code_in_row,
    largest_magnitude,
    over_codebook_scale,
    over_row_scale,
    place_in_codebook,
    place_in_row,
)
from qcbguard_plugins._kernels.float16 import round_to
from qcbguard_plugins._util.compiler import kernel, statistic

# Beside a midpoint only the quantizer's own arithmetic tells what is nearest, see qcbguard_plugins.grids.base.
_DOUBTFUL = np.float32(0.5 - 1e-4)


@kernel
def round_run(
    weights, stored, draws, num_weights, levels, inverse_widths, midpoints, smallest, dtype, guarded, codes, sums
):
    """Round a run of blocks.

    Args:
        weights: float32 ``[num_blocks, block_size]``, as the quantizer reads them.
        stored: The same as they are stored, in float32; it may be ``weights``.
        draws: float32 like ``weights``.
        num_weights: Weights that are there; what fills the last block up is none.
        levels: float32, the codebook; empty for the 255 even levels of LLM.int8.
        inverse_widths: float32 ``[MAX_LEVELS - 1]``, one over the width of each of its cells, filled up with zeros.
        midpoints: float32 ``[MAX_LEVELS - 1]``, the middle of each cell, filled up with infinity.
        smallest: float32, the scale below which all of a block keep their value.
        dtype: That in which the outcome will be stored.
        guarded: float32 like ``weights``, the outcome, numbers of ``dtype``; it may be ``stored``.
        codes: uint8 like ``weights``, the outcome.
        sums: float64 ``[3]``, the energy of the weights, of the change, and of blocks that could not be placed.

    Returns:
        The number of weights whose code is not the nearest, the number of those that keep their value, and whether all
        are finite; where they are not, nothing counts.
    """
    size = weights.shape[1]
    coordinates, values = np.empty(size, np.float32), np.empty(size, np.float32)
    # As wide as the weights: a loop over numbers of one width works on many at a time.
    nearest, chosen = np.empty(size, np.int32), np.empty(size, np.int32)
    even = len(levels) == 0
    top = np.float32(253) if even else np.float32(len(levels) - 2)
    num_moved, num_frozen = 0, 0
    for block in range(len(weights)):
        absmax = largest_magnitude(weights, block, size)
        if absmax == np.float32(np.inf):
            return 0, 0, False
        if even:
            place_in_row(weights, block, size, absmax, coordinates)
        else:
            place_in_codebook(weights, block, size, absmax, levels, inverse_widths, coordinates)
        _choose(coordinates, draws, block, size, top, nearest, chosen)
        _resolve_ties(weights, block, size, absmax, coordinates, midpoints, even, nearest)
        scale = absmax * INVERSE_MAX_CODE if even else absmax
        all_frozen = absmax < smallest
        # A weight is frozen from this magnitude on: the largest of the block, or any.
        frozen_from = ZERO if all_frozen else absmax
        for i in range(size):
            chosen[i] = nearest[i] if abs(weights[block, i]) >= frozen_from else chosen[i]
        if even:
            for i in range(size):
                values[i] = (np.float32(chosen[i]) - MAX_CODE) * scale
        else:
            for i in range(size):
                values[i] = levels[np.uint32(chosen[i])] * scale
        round_to(values, dtype)
        for i in range(size):
            values[i] = stored[block, i] if abs(weights[block, i]) >= frozen_from else values[i]
        count = min(size, num_weights - block * size)
        moved_here, frozen_here = np.int32(0), np.int32(0)
        for i in range(count):
            moved_here += np.int32(chosen[i] != nearest[i])
        for i in range(count):
            frozen_here += np.int32(abs(weights[block, i]) >= frozen_from)
        num_moved += moved_here
        num_frozen += frozen_here
        energy, change = _measure(weights, stored, values, block, count)
        sums[0] += energy
        sums[1] += change
        if all_frozen:
            for i in range(count):
                if abs(weights[block, i]) != absmax:
                    sums[2] += weights[block, i] * weights[block, i]
        for i in range(size):
            codes[block, i] = np.uint8(chosen[i])
        for i in range(count):
            guarded[block, i] = values[i]
    return num_moved, num_frozen, True


@kernel
def _choose(coordinates, draws, block, size, top, nearest, chosen):
    for i in range(size):
        coordinate = coordinates[i]
        lower = min(np.float32(np.floor(coordinate)), top)
        up = np.float32(1) if coordinate - lower > draws[block, i] else ZERO
        chosen[i] = np.int32(lower + up)
        nearest[i] = np.int32(np.ceil(coordinate - HALF))


@kernel
def _resolve_ties(weights, block, size, absmax, coordinates, midpoints, even, nearest):
    num_doubtful = np.int32(0)
    for i in range(size):
        num_doubtful += np.int32(abs(coordinates[i] - np.float32(nearest[i])) > _DOUBTFUL)
    if num_doubtful == 0:
        return
    for i in range(size):
        if abs(coordinates[i] - np.float32(nearest[i])) <= _DOUBTFUL:
            continue
        if even:
            nearest[i] = code_in_row(weights[block, i], over_row_scale(absmax))
        else:
            nearest[i] = code_in_codebook(weights[block, i] * over_codebook_scale(absmax), midpoints)


@statistic
def _measure(weights, stored, values, block, count):
    energy, change = ZERO, ZERO
    for i in range(count):
        energy += weights[block, i] * weights[block, i]
        difference = values[i] - stored[block, i]
        change += difference * difference
    return energy, change
