"""The reimplementation of each type: rows of weights in, codes, scales and offsets out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins._kernels.ggml import codebook, symmetric, with_offset
from qcbguard_plugins._kernels.ggml.arithmetic import IMPORTANCE, MAGNITUDE, RAISED_IMPORTANCE, RAISED_MAGNITUDE, SQUARE
from qcbguard_plugins._util.compiler import Array
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.grids.ggml_blocks import BlockType, StoredBlocks

_SUPER = 256
_NO_IMPORTANCE = np.zeros(0, np.float32)
# Rows go to the threads in runs of about this many weights.
_WEIGHTS_PER_CHUNK = 1 << 17

# Weights, importance, codes, scales, offsets; the last three are filled.
Fill = Callable[[Array, Array, Array, Array, Array], None]


def _steps(first: float, width: float, num_steps: int, top: int) -> Array:
    """Numerators of the divisors that are tried, rounded as ggml rounds them."""
    indices = np.arange(num_steps, dtype=np.float32)
    return (np.float32(first) + np.float32(width) * indices) + np.float32(top)


def _with_offset(
    size: int, top: int, scale_top: int, kind: int, factor: float, plain: tuple[float, float, int], absolute: bool
) -> Fill:
    def fill(weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array) -> None:
        weighed = len(importance) > 0
        with_offset.quantize_super_blocks(
            weights, importance, _SUPER, np.float32(factor), RAISED_IMPORTANCE if weighed else kind, size, top,
            scale_top, _steps(*_WEIGHED_STEPS, top) if weighed else _steps(*plain, top), absolute and not weighed,
            codes, scales, offsets,
        )  # fmt: skip

    return fill


_WEIGHED_STEPS = (-0.9, 0.05, 37)


def _q3_k(weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array) -> None:
    weighed = len(importance) > 0
    kind = RAISED_IMPORTANCE if weighed else SQUARE
    symmetric.quantize_super_blocks(weights, importance, _SUPER, kind, 4, 32, not weighed, codes, scales)


def _q6_k(weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array) -> None:
    kind = IMPORTANCE if len(importance) else SQUARE
    symmetric.quantize_super_blocks(weights, importance, _SUPER, kind, 32, 128, False, codes, scales)


def _iq4(unit: int, weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array) -> None:
    kind = RAISED_IMPORTANCE if len(importance) else SQUARE
    codebook.quantize(weights, importance, unit, kind, unit // 32, codes, scales)


def _weighed(half: int, weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array) -> None:
    symmetric.quantize_blocks(weights, importance, len(importance), half, codes, scales)


def _weighed_with_offset(
    top: int, weights: Array, importance: Array, codes: Array, scales: Array, offsets: Array
) -> None:
    steps = _steps(*_WEIGHED_STEPS, top)
    with_offset.quantize_blocks(weights, importance, len(importance), 32, top, steps, codes, scales, offsets)


_FILL: dict[str, Fill] = {
    "Q2_K": _with_offset(16, 3, 15, MAGNITUDE, 1.0, (-0.5, 0.1, 16), True),
    "Q3_K": _q3_k,
    "Q4_K": _with_offset(32, 15, 63, RAISED_MAGNITUDE, 2.0, (-1.0, 0.1, 21), False),
    "Q5_K": _with_offset(32, 31, 63, RAISED_MAGNITUDE, 2.0, (-0.5, 0.1, 16), False),
    "Q6_K": _q6_k,
    "IQ4_NL": partial(_iq4, 32),
    "IQ4_XS": partial(_iq4, _SUPER),
    "Q4_0": partial(_weighed, 8),
    "Q5_0": partial(_weighed, 16),
    "Q4_1": partial(_weighed_with_offset, 15),
    "Q5_1": partial(_weighed_with_offset, 31),
}


def quantize(block_type: BlockType, weight: Tensor, importance: Tensor | None = None) -> StoredBlocks:
    """Quantize a weight as ggml does.

    Args:
        block_type: A type that searches for its scales, or any other but Q8_0 with an importance matrix.
        weight: float32 ``[num_rows, num_columns]``, columns a multiple of the block size, all finite.
        importance: float32 ``[num_columns]``, the importance matrix of the tensor.
    """
    fill, size = _FILL[block_type.name], block_type.sub_block_size
    rows = weight.detach().cpu().contiguous().numpy()
    num_rows, num_columns = rows.shape
    columns = _NO_IMPORTANCE if importance is None else np.ascontiguousarray(importance.cpu().numpy(), np.float32)
    codes = np.empty((num_rows, num_columns), np.uint8)
    scales = np.empty((num_rows, num_columns // size), np.float32)
    offsets = np.zeros_like(scales)
    step = max(1, _WEIGHTS_PER_CHUNK // num_columns)

    def fill_rows(start: int) -> None:
        part = slice(start, start + step)
        fill(rows[part].reshape(-1), columns, *(whole[part].reshape(-1) for whole in (codes, scales, offsets)))

    map_over_threads(fill_rows, range(0, num_rows, step))
    return StoredBlocks(
        torch.from_numpy(codes).view(-1, size),
        torch.from_numpy(scales).view(-1, 1),
        torch.from_numpy(offsets).view(-1, 1),
    )
