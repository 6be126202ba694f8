"""The column loop of error feedback; the definition is in :mod:`qcbguard_plugins.defenses.feedback`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins.grids.base import Ladder
from qcbguard_plugins.kernels.compiler import kernel
from qcbguard_plugins.threads import map_over_threads

# Rows that are worked on side by side; with all columns of a batch they fill the first cache.
_ROWS_PER_RUN = 64
_ZERO, _ONE = np.float32(0), np.float32(1)


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
