"""Where weights lie between the levels of their sub-blocks, and the scales that follow from a formula."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._kernels.float16 import to_half
from qcbguard_plugins._kernels.ggml.arithmetic import ONE, ZERO
from qcbguard_plugins._util.compiler import kernel

_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
TOP_OF_8_BITS, _HALF = np.float32(255), np.float32(0.5)


@kernel
def order_of(value):
    """An int32 that sorts as the float32 does; largest of integers, unlike of floats, vectorizes."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _ALL_BUT_SIGN))


@kernel
def value_of(order):
    """The inverse of :func:`order_of`."""
    return np.int32(order ^ np.int32(np.int32(order >> np.int32(31)) & _ALL_BUT_SIGN)).view(np.float32)


@kernel
def _magnitude(value):
    return np.int32(np.float32(value).view(np.int32) & _ALL_BUT_SIGN)


@kernel
def ends(weights, block, size):
    """The smallest and the largest weight of a sub-block."""
    low, high = order_of(weights[block, 0]), order_of(weights[block, 0])
    for i in range(size):
        low, high = min(low, order_of(weights[block, i])), max(high, order_of(weights[block, i]))
    return value_of(low), value_of(high)


@kernel
def _largest(weights, block, size):
    """The bits of the largest magnitude of a sub-block."""
    largest = _magnitude(weights[block, 0])
    for i in range(size):
        largest = max(largest, _magnitude(weights[block, i]))
    return largest


@kernel
def _first_largest(weights, block, size):
    """The place of the first weight of the largest magnitude."""
    largest = _largest(weights, block, size)
    for i in range(size):
        if _magnitude(weights[block, i]) == largest:
            return i
    return 0


@kernel
def _place_evenly(weights, block, size, scale, offset, zero, lowest, top, coordinate):
    inverse = ONE / scale if scale != ZERO else ZERO
    for i in range(size):
        value = (weights[block, i] - offset) * inverse - zero
        value = value if value > lowest else lowest
        coordinate[block, i] = value if value < top else top


@kernel
def _place_on_ramps(weights, block, size, scale, levels, widths, coordinate):
    inverse = ONE / scale if scale != ZERO else ZERO
    for i in range(size):
        coordinate[block, i] = ZERO
    for k in range(len(widths)):
        level, inverse_width = levels[k], widths[k]
        for i in range(size):
            ramp = (weights[block, i] * inverse - level) * inverse_width
            ramp = ramp if ramp > ZERO else ZERO
            coordinate[block, i] += ramp if ramp < ONE else ONE


@kernel
def place_searched(weights, size, scales, offsets, with_offset, levels, widths, coordinate, frozen):
    """Places on scales that a search has found.

    Args:
        weights: float32 ``[num_sub_blocks, size]``.
        size: Weights a sub-block.
        scales: float32, one a sub-block.
        offsets: float32, one a sub-block.
        with_offset: True where both ends of a sub-block hold its scale.
        levels: float32, the levels of the type.
        widths: float32, one over the distance of neighbouring levels where they are uneven; otherwise empty.
        coordinate: float32 like ``weights``, the outcome.
        frozen: Bool like ``weights``, the outcome.
    """
    top = np.float32(len(levels) - 1)
    for block in range(len(scales)):
        scale = scales[block]
        if len(widths):
            _place_on_ramps(weights, block, size, scale, levels, widths, coordinate)
        else:
            _place_evenly(weights, block, size, scale, offsets[block], levels[0], ZERO, top, coordinate)
        for i in range(size):
            frozen[block, i] = scale == ZERO
        if with_offset:
            low, high = ends(weights, block, size)
            first_low, first_high = size, size
            for i in range(size - 1, -1, -1):
                first_low = i if weights[block, i] == low else first_low
                first_high = i if weights[block, i] == high else first_high
            frozen[block, first_low] = True
            frozen[block, first_high] = True
        else:
            frozen[block, _first_largest(weights, block, size)] = True


@kernel
def divisor_of(weights, block, low, high, lowest_level, top, with_offset):
    """Divisor and base of one block of a type with a formula, its ends being known."""
    if with_offset:
        return (high - low) / top, low
    largest = high if high > -low else low
    if high == -low:
        # Of several largest magnitudes the first gives the scale its sign.
        largest = weights[block, _first_largest(weights, block, weights.shape[1])]
    return abs(largest) / np.float32(127) if top == TOP_OF_8_BITS else largest / lowest_level, ZERO


@kernel
def code_of(weight, inverse, base, top, with_offset):
    """The code that a type with a formula stores for a weight, float32."""
    if top == TOP_OF_8_BITS:
        # Halves away from zero, as roundf does.
        scaled = weight * inverse
        distance = abs(scaled)
        whole = np.float32(np.int32(distance))
        whole = whole + ONE if distance - whole >= _HALF else whole
        return (-whole if scaled < ZERO else whole) + np.float32(128)
    middle = _HALF if with_offset else np.float32((top + ONE) * _HALF + _HALF)
    value = (weight - base) * inverse + middle
    return value if value < top else top


@kernel
def _formula(weights, block, size, lowest_level, top, with_offset):
    low, high = ends(weights, block, size)
    return divisor_of(weights, block, low, high, lowest_level, top, with_offset)


@kernel
def _encode(weights, block, size, divisor, base, top, with_offset, codes):
    inverse = ONE / divisor if divisor != ZERO else ZERO
    for i in range(size):
        codes[block, i] = np.int32(code_of(weights[block, i], inverse, base, top, with_offset))


@kernel
def encode_by_formula(weights, size, lowest_level, top, with_offset, codes, scales, offsets):
    """What a type with a formula stores: codes, and scales and offsets as float16 keeps them."""
    for block in range(len(scales)):
        divisor, base = _formula(weights, block, size, lowest_level, top, with_offset)
        _encode(weights, block, size, divisor, base, top, with_offset, codes)
        scales[block] = to_half(divisor)
        offsets[block] = to_half(base)


@kernel
def place_by_formula(
    weights, size, lowest_level, lowest, top, with_offset, codes, scales, offsets, divisors, bases, coordinate, frozen
):
    """Codes and places of weights on a type with a formula; see :func:`place_searched`."""
    for block in range(len(scales)):
        divisor, base = _formula(weights, block, size, lowest_level, top, with_offset)
        scale, offset = to_half(divisor), to_half(base)
        scales[block], offsets[block], divisors[block], bases[block] = scale, offset, divisor, base
        _encode(weights, block, size, divisor, base, top, with_offset, codes)
        _place_evenly(weights, block, size, scale, offset, lowest_level, lowest, top, coordinate)
        low, high = ends(weights, block, size)
        if not with_offset:
            high = high if high > -low else -low
            low = -high
        for i in range(size):
            value = weights[block, i]
            frozen[block, i] = (scale == ZERO) | (value == low) | (value == high)
