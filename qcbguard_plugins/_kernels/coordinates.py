"""Where weights lie on a grid of bitsandbytes, and what it stores for them."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._util.compiler import kernel

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
#: Levels of the largest codebook.
MAX_LEVELS = 16
MAX_CODE, INVERSE_MAX_CODE = np.float32(127), np.float32(7.874015718698502e-3)
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_SMALLEST_DIVISOR = np.float32(1e-38)
# Added and taken away again, this leaves the nearest whole number, ties to even.
_ROUNDER = np.float32(12582912)


@kernel
def largest_magnitude(weights, block, size):
    """The largest magnitude of a block; infinity where a weight is not finite."""
    bits = np.int32(0)
    for i in range(size):
        magnitude = np.int32(np.float32(weights[block, i]).view(np.int32) & _MAGNITUDE)
        bits = magnitude if magnitude > bits else bits
    bits = bits if bits < _INFINITY else _INFINITY
    return np.int32(bits).view(np.float32)


@kernel
def over_codebook_scale(absmax):
    """What bitsandbytes multiplies the weights of a 4-bit block with."""
    return ONE / max(absmax, _SMALLEST_DIVISOR)


@kernel
def over_row_scale(absmax):
    """What bitsandbytes multiplies the weights of an 8-bit row with: 127 times a reciprocal, which is no quotient."""
    return ONE / absmax * MAX_CODE if absmax > ZERO else ZERO


@kernel
def place_in_codebook(weights, block, size, absmax, levels, inverse_widths, coordinates):
    """Coordinates on a codebook of ``MAX_LEVELS`` levels or fewer, filled up: a sum of ramps, one a cell."""
    inverse = over_codebook_scale(absmax)
    for i in range(size):
        scaled, coordinate = weights[block, i] * inverse, ZERO
        # A number that the compiler knows, so that it unrolls this loop and works on many weights at a time.
        for j in range(MAX_LEVELS - 1):
            coordinate += min(max((scaled - levels[j]) * inverse_widths[j], ZERO), ONE)
        coordinates[i] = coordinate


@kernel
def place_in_row(weights, block, size, absmax, coordinates):
    """Coordinates on 255 even levels."""
    steps = over_row_scale(absmax)
    for i in range(size):
        coordinates[i] = min(max(weights[block, i] * steps + MAX_CODE, ZERO), MAX_CODE + MAX_CODE)


@kernel
def code_in_codebook(scaled, midpoints):
    """The code of a weight in units of its block's scale: the number of midpoints below it."""
    code = np.int32(0)
    for j in range(len(midpoints)):
        code += np.int32(scaled > midpoints[j])
    return code


@kernel
def code_in_row(weight, steps):
    """The code of a weight, halves to even."""
    return np.int32(np.float32(np.float32(weight * steps + _ROUNDER) - _ROUNDER) + MAX_CODE)


@kernel
def quantize_codebook(weights, num_weights, midpoints, codes):
    """What bitsandbytes stores in 4 bits.

    Args:
        weights: float32 ``[num_blocks, block_size]``.
        num_weights: Weights that are there; what fills the last block up is none.
        midpoints: float32 ``[MAX_LEVELS - 1]``, between the levels; what fills them up is infinity.
        codes: uint8 like ``weights``, the outcome.
    """
    size = weights.shape[1]
    for block in range(len(weights)):
        absmax = largest_magnitude(weights, block, size)
        inverse = over_codebook_scale(absmax)
        if num_weights - block * size < size:
            # The stock kernel divides the short last block instead of multiplying it by a reciprocal.
            for i in range(size):
                codes[block, i] = code_in_codebook(weights[block, i] / max(absmax, _SMALLEST_DIVISOR), midpoints)
            continue
        for i in range(size):
            scaled, code = weights[block, i] * inverse, np.int32(0)
            for j in range(MAX_LEVELS - 1):
                code += np.int32(scaled > midpoints[j])
            codes[block, i] = np.uint8(code)


@kernel
def quantize_rows(weights, codes):
    """What bitsandbytes stores in 8 bits for float32 rows that hold float16 numbers; ``codes`` is the outcome."""
    size = weights.shape[1]
    for row in range(len(weights)):
        absmax = largest_magnitude(weights, row, size)
        steps = over_row_scale(absmax)
        for i in range(size):
            codes[row, i] = code_in_row(weights[row, i], steps)
