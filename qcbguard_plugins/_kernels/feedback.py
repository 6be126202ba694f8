"""The column loop of error feedback; the definition is in :mod:`qcbguard_plugins.defenses.feedback`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins._util.compiler import kernel
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.grids.base import CoordinateTable

# Draws of rows that are worked on side by side; with all columns of a batch they fill the first cache.
_DRAWS_PER_RUN = 64
_CALLS_PER_THREAD = 4
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def round_batch(
    weight: Tensor,
    kept: Tensor,
    scale: Tensor,
    frozen: Tensor,
    uniform: Tensor,
    gain: float,
    factor: Tensor,
    levels: Tensor,
    ladder: CoordinateTable,
) -> tuple[Tensor, Tensor]:
    """Round a batch of columns one after the other, each error spread over the columns behind it in the batch.

    Args:
        weight: float32 ``[num_draws, out_features, num_columns]``, errors of earlier columns taken off.
        kept: float32 ``[out_features, num_columns]``, what frozen weights become.
        scale: float32 like ``kept``.
        frozen: Bool like ``kept``.
        uniform: float32 like ``kept``, a random number in [0, 1) for all draws of a weight.
        gain: One over the dither's full width.
        factor: float32 ``[num_columns, num_columns]``, the batch's part of the upper Cholesky factor.
        levels: float32, the levels of the grid.
        ladder: How values in units of the scale become coordinates.

    Returns:
        Codes, uint8, and errors over their pivots, float32, both like ``weight``.
    """
    codes, errors = np.empty(weight.shape, np.uint8), np.empty(weight.shape, np.float32)
    draws = np.ascontiguousarray(weight.numpy())
    arrays = [np.ascontiguousarray(part.numpy()) for part in (kept, scale, frozen, uniform)]
    widths = np.empty(0, np.float32) if ladder.inverse_widths is None else ladder.inverse_widths.numpy()
    pivots = np.ascontiguousarray(factor.numpy())
    num_rows = weight.shape[1]
    # A call costs about as much as a row, so a thread gets many rows at once.
    step = -(-num_rows // (_CALLS_PER_THREAD * torch.get_num_threads()))

    def work(start: int) -> None:
        part = slice(start, start + step)
        _round_runs(
            draws[:, part], *(array[part] for array in arrays), np.float32(gain), pivots, levels.numpy(), widths,
            np.float32(ladder.shift), np.float32(ladder.lowest), codes[:, part], errors[:, part],
        )  # fmt: skip

    map_over_threads(work, range(0, num_rows, step))
    return torch.from_numpy(codes), torch.from_numpy(errors)


@kernel
def _round_runs(weight, kept, scale, frozen, uniform, gain, factor, levels, widths, shift, lowest, codes, errors):
    num_draws, num_rows, _ = weight.shape
    step = max(1, _DRAWS_PER_RUN // num_draws)
    for start in range(0, num_rows, step):
        run = slice(start, start + step)
        _round_rows(
            weight[:, run], kept[run], scale[run], frozen[run], uniform[run], gain, factor, levels, widths, shift,
            lowest, codes[:, run], errors[:, run],
        )  # fmt: skip


@kernel
def _round_rows(weight, kept, scale, frozen, uniform, gain, factor, levels, widths, shift, lowest, codes, errors):
    num_draws, num_rows, num_columns = weight.shape
    # With the columns first, a step for all draws of all rows is one for neighbours in memory.
    pending = np.empty((num_columns, num_draws, num_rows), np.float32)
    coordinate = np.empty((num_draws, num_rows), np.float32)
    error = np.empty((num_draws, num_rows), np.float32)
    position, cell = np.empty((num_draws, num_rows), np.float32), np.empty((num_draws, num_rows), np.float32)
    first, total = np.empty((num_draws, num_rows), np.float32), np.empty(num_rows, np.float32)
    lower = np.empty((num_draws, num_rows), np.int32)
    flat_pending, flat_error = pending.reshape(num_columns, -1), error.reshape(-1)
    for draw in range(num_draws):
        for row in range(num_rows):
            for column in range(num_columns):
                pending[column, draw, row] = weight[draw, row, column]
    top, last = np.float32(len(levels) - 1), np.float32(len(levels) - 2)
    for column in range(num_columns):
        total[:] = _ZERO
        for draw in range(num_draws):
            for row in range(num_rows):
                step = scale[row, column]
                error[draw, row] = pending[column, draw, row] * (_ONE / step if step != _ZERO else _ZERO)
            if len(widths):
                for row in range(num_rows):
                    coordinate[draw, row] = _ZERO
                for j in range(len(widths)):
                    level, width = levels[j], widths[j]
                    for row in range(num_rows):
                        coordinate[draw, row] += min(max((error[draw, row] - level) * width, _ZERO), _ONE)
            else:
                for row in range(num_rows):
                    coordinate[draw, row] = min(max(error[draw, row] - shift, lowest), top)
            for row in range(num_rows):
                below = min(np.float32(np.floor(coordinate[draw, row])), last)
                lower[draw, row] = np.int32(below)
                position[draw, row] = coordinate[draw, row] - below
            for row in range(num_rows):
                cell[draw, row] = levels[lower[draw, row] + 1] - levels[lower[draw, row]]
            for row in range(num_rows):
                share = min(max((position[draw, row] - _HALF) * gain + _HALF, _ZERO), _ONE)
                total[row] += cell[draw, row] * share
                first[draw, row] = _ZERO
        for other in range(num_draws):
            for draw in range(num_draws):
                for row in range(num_rows):
                    ahead = position[other, row] > position[draw, row]
                    if other < draw:
                        ahead |= position[other, row] == position[draw, row]
                    first[draw, row] += cell[other, row] if ahead else _ZERO
        pivot = factor[column, column]
        for draw in range(num_draws):
            for row in range(num_rows):
                up = total[row] - first[draw, row] > uniform[row, column] * cell[draw, row]
                code = np.uint8(lower[draw, row] + (1 if up else 0))
                rounded = kept[row, column] if frozen[row, column] else levels[code] * scale[row, column]
                codes[draw, row, column] = code
                error[draw, row] = (pending[column, draw, row] - rounded) / pivot
                errors[draw, row, column] = error[draw, row]
        for behind in range(column + 1, num_columns):
            share = factor[column, behind]
            for place in range(num_draws * num_rows):
                flat_pending[behind, place] -= share * flat_error[place]
