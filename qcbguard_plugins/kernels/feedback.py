"""The column loops of error feedback; their definition is in :mod:`qcbguard_plugins.defenses.feedback`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins.grids.base import Ladder
from qcbguard_plugins.kernels.compiler import kernel
from qcbguard_plugins.threads import map_over_threads

# Rows that are worked on side by side; with all columns of a batch they fill the first cache.
_ROWS_PER_RUN = 64
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def round_batch(
    weight: Tensor,
    kept: Tensor,
    scale: Tensor,
    frozen: Tensor,
    thresholds: Tensor,
    factor: Tensor,
    levels: Tensor,
    ladder: Ladder,
) -> tuple[Tensor, Tensor]:
    """Round a batch of columns one after the other, each error spread over the columns behind it in the batch.

    Args:
        weight: float32 ``[out_features, num_columns]``, errors of earlier columns taken off.
        kept: float32 like it, what frozen weights become.
        scale: float32 like it.
        frozen: Bool like it.
        thresholds: float32 like it, positions above which a weight rounds up.
        factor: float32 ``[num_columns, num_columns]``, the batch's part of the upper Cholesky factor.
        levels: float32, the levels of the grid.
        ladder: How values in units of the scale become coordinates.

    Returns:
        Codes, uint8, and errors over their pivots, float32, both like ``weight``.
    """
    codes, errors = np.empty(weight.shape, np.uint8), np.empty(weight.shape, np.float32)
    arrays = [np.ascontiguousarray(part.numpy()) for part in (weight, kept, scale, frozen, thresholds)]
    widths = np.empty(0, np.float32) if ladder.inverse_widths is None else ladder.inverse_widths.numpy()
    pivots = np.ascontiguousarray(factor.numpy())

    def work(start: int) -> None:
        part = slice(start, start + _ROWS_PER_RUN)
        _round_rows(
            *(array[part] for array in arrays), pivots, levels.numpy(), widths, np.float32(ladder.shift),
            np.float32(ladder.lowest), codes[part], errors[part],
        )  # fmt: skip

    map_over_threads(work, range(0, len(codes), _ROWS_PER_RUN))
    return torch.from_numpy(codes), torch.from_numpy(errors)


def refine_batch(
    slope: Tensor,
    codes: Tensor,
    scale: Tensor,
    frozen: Tensor,
    within: Tensor,
    held: tuple[Tensor, Tensor, Tensor],
    levels: Tensor,
    ladder: Ladder,
) -> tuple[Tensor, Tensor]:
    """Step to neighbouring levels in a batch of columns, one after the other, where that lowers the squared error.

    Args:
        slope: float32 ``[out_features, num_columns]``, half the derivative of each row's squared error.
        codes: uint8 like it.
        scale: float32 like it.
        frozen: Bool like it, weights that stay.
        within: float32 ``[num_columns, num_columns]``, the batch's part of the Hessian.
        held: Plain rounding's errors, like ``slope``; and ``[out_features]``, what a change along them costs, and the
            change so far.
        levels: float32, the levels of the grid.
        ladder: How values in units of the scale become coordinates.

    Returns:
        Codes, uint8, and by how much the weights changed, float32, both like ``slope``.
    """
    chosen = np.array(codes.numpy(), order="C")
    moves = np.zeros(chosen.shape, np.float32)
    pending = np.array(slope.numpy(), order="C")
    drift = np.array(held[2].numpy())
    arrays = [pending, drift, *(np.ascontiguousarray(part.numpy()) for part in (scale, frozen, *held[:2]))]
    products = np.ascontiguousarray(within.numpy())

    def work(start: int) -> None:
        part = slice(start, start + _ROWS_PER_RUN)
        _refine_rows(
            *(array[part] for array in arrays), products, levels.numpy(), np.float32(ladder.lowest), chosen[part],
            moves[part],
        )  # fmt: skip

    map_over_threads(work, range(0, len(chosen), _ROWS_PER_RUN))
    return torch.from_numpy(chosen), torch.from_numpy(moves)


@kernel
def _refine_rows(pending, drift, scale, frozen, plain, stiffness, within, levels, lowest, codes, moves):
    num_rows, num_columns = pending.shape
    least, top = np.int32(lowest), np.int32(len(levels) - 1)
    for row in range(num_rows):
        for column in range(num_columns):
            slope, unit = pending[row, column], scale[row, column]
            if frozen[row, column] or slope == _ZERO or unit == _ZERO:
                continue
            code = np.int32(codes[row, column])
            target = code - 1 if (slope > _ZERO) == (unit > _ZERO) else code + 1
            target = min(max(target, least), top)
            step = (levels[target] - levels[code]) * unit
            gain = step * (_TWO * slope + step * within[column, column])
            along = step * plain[row, column]
            strain = stiffness[row] * (along * (_TWO * drift[row] + along))
            if gain < _ZERO and gain + strain < _ZERO:
                codes[row, column] = np.uint8(target)
                moves[row, column] = step
                drift[row] += along
                for behind in range(column + 1, num_columns):
                    pending[row, behind] += within[column, behind] * step


@kernel
def _round_rows(weight, kept, scale, frozen, thresholds, factor, levels, widths, shift, lowest, codes, errors):
    num_rows, num_columns = weight.shape
    # Transposed, so that a step for all rows is one for neighbours in memory.
    pending = np.empty((num_columns, num_rows), np.float32)
    coordinate, error = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
    for row in range(num_rows):
        for column in range(num_columns):
            pending[column, row] = weight[row, column]
    top, last = np.float32(len(levels) - 1), np.float32(len(levels) - 2)
    for column in range(num_columns):
        for row in range(num_rows):
            step = scale[row, column]
            error[row] = pending[column, row] * (_ONE / step if step != _ZERO else _ZERO)
        if len(widths):
            for row in range(num_rows):
                coordinate[row] = _ZERO
            for j in range(len(widths)):
                level, width = levels[j], widths[j]
                for row in range(num_rows):
                    coordinate[row] += min(max((error[row] - level) * width, _ZERO), _ONE)
        else:
            for row in range(num_rows):
                coordinate[row] = min(max(error[row] - shift, lowest), top)
        pivot = factor[column, column]
        for row in range(num_rows):
            lower = min(np.float32(np.floor(coordinate[row])), last)
            up = _ONE if coordinate[row] - lower > thresholds[row, column] else _ZERO
            code = np.uint8(np.int32(lower + up))
            rounded = kept[row, column] if frozen[row, column] else levels[code] * scale[row, column]
            codes[row, column] = code
            error[row] = (pending[column, row] - rounded) / pivot
            errors[row, column] = error[row]
        for behind in range(column + 1, num_columns):
            share = factor[column, behind]
            for row in range(num_rows):
                pending[behind, row] -= share * error[row]
