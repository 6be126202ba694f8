"""IQ4_NL and IQ4_XS, whose codes stand for the values of an uneven codebook."""

from __future__ import annotations

import itertools

import numpy as np

from qcbguard_plugins._kernels.float16 import to_half
from qcbguard_plugins._kernels.ggml.arithmetic import (
    LANES,
    ONE,
    TINY,
    ZERO,
    at,
    clamp,
    find_largest,
    load_lanes,
    mean_squares,
    nearest_int,
    weigh_lanes,
)
from qcbguard_plugins._util.compiler import kernel
from qcbguard_plugins.grids.ggml_blocks import IQ4_LEVELS

_SIZE = 32
_TRIES = 7
_NUM_LEVELS = len(IQ4_LEVELS)
_LOWEST = np.float32(IQ4_LEVELS[0])
# A value takes the upper of two levels from the middle between them on. ggml compares the two distances, which comes to
# the same: beside the middle both are exact. NaN, which weights near the largest float32 lead to, goes to the top.
_MIDDLES = tuple(np.float32((a + b) / 2) for a, b in itertools.pairwise(IQ4_LEVELS))
_WIDTHS = tuple(np.float32(b - a) for a, b in itertools.pairwise(IQ4_LEVELS))
(_M0, _M1, _M2, _M3, _M4, _M5, _M6, _M7, _M8, _M9, _M10, _M11, _M12, _M13, _M14) = _MIDDLES
(_W0, _W1, _W2, _W3, _W4, _W5, _W6, _W7, _W8, _W9, _W10, _W11, _W12, _W13, _W14) = _WIDTHS

# Where the rows of the state of a search begin, one entry a lane. They lie in one array, as those of the weights do, so
# that the compiler knows that they do not overlap.
_LARGEST, _MAGNITUDE, _INVERSE, _SUM_QX, _SUM_Q2, _SCALE, _BEST = range(0, 7 * LANES, LANES)
_NUM_STATES = 7


@kernel
def _level(value):
    """The nearest level of the codebook."""
    level = _LOWEST + (ZERO if value < _M0 else _W0)
    level += ZERO if value < _M1 else _W1
    level += ZERO if value < _M2 else _W2
    level += ZERO if value < _M3 else _W3
    level += ZERO if value < _M4 else _W4
    level += ZERO if value < _M5 else _W5
    level += ZERO if value < _M6 else _W6
    level += ZERO if value < _M7 else _W7
    level += ZERO if value < _M8 else _W8
    level += ZERO if value < _M9 else _W9
    level += ZERO if value < _M10 else _W10
    level += ZERO if value < _M11 else _W11
    level += ZERO if value < _M12 else _W12
    level += ZERO if value < _M13 else _W13
    level += ZERO if value < _M14 else _W14
    return level


@kernel
def _code(value):
    """The place of the nearest level in the codebook."""
    code = np.int32(0)
    for middle in _MIDDLES:
        code += np.int32(not value < middle)
    return code


@kernel
def _sum(x, w, state):
    """The sums that give the best scale for the codes of one divisor."""
    for v in range(LANES):
        state[_SUM_QX + v] = ZERO
        state[_SUM_Q2 + v] = ZERO
    for i in range(_SIZE):
        for v in range(LANES):
            value = x[at(i, v)]
            level = _level(state[_INVERSE + v] * value)
            weighted = w[at(i, v)] * level
            state[_SUM_QX + v] += weighted * value
            state[_SUM_Q2 + v] += weighted * level


@kernel
def _search(x, w, state):
    """Find the scale of each lane: the best of sixteen divisors."""
    find_largest(x, _SIZE, state[_LARGEST:], state[_MAGNITUDE:])
    for v in range(LANES):
        state[_INVERSE + v] = ONE / (-state[_LARGEST + v] / _LOWEST)
    _sum(x, w, state)
    for v in range(LANES):
        sum_q2 = state[_SUM_Q2 + v]
        scale = state[_SUM_QX + v] / sum_q2
        scale = scale if sum_q2 > ZERO else ZERO
        state[_SCALE + v] = scale
        state[_BEST + v] = scale * state[_SUM_QX + v]
    for step in range(-_TRIES, _TRIES + 1):
        numerator = np.float32(np.float32(step) + _LOWEST)
        for v in range(LANES):
            state[_INVERSE + v] = numerator / state[_LARGEST + v]
        _sum(x, w, state)
        for v in range(LANES):
            sum_qx, sum_q2, best = state[_SUM_QX + v], state[_SUM_Q2 + v], state[_BEST + v]
            better = (sum_q2 > ZERO) & (sum_qx * sum_qx > best * sum_q2)
            scale = sum_qx / sum_q2
            state[_SCALE + v] = scale if better else state[_SCALE + v]
            state[_BEST + v] = scale * sum_qx if better else best
    for v in range(LANES):
        state[_SCALE + v] = ZERO if state[_MAGNITUDE + v] < TINY else state[_SCALE + v]


@kernel
def quantize(weights, importance, unit, kind, per_super, codes, scales):
    """Quantize blocks of 32 weights.

    Args:
        weights: float32, all weights in a row.
        importance: float32, one entry a column; empty without an importance matrix.
        unit: Weights that share a mean square, which importance is raised by.
        kind: Where the weights of the error come from.
        per_super: Blocks that share a float16 scale: 1 for IQ4_NL, 8 for IQ4_XS.
        codes: uint8 like ``weights``, the outcome.
        scales: float32, one a block, the outcome.
    """
    x, w = np.empty(_SIZE * LANES, np.float32), np.empty(_SIZE * LANES, np.float32)
    state = np.empty(_NUM_STATES * LANES, np.float32)
    means = mean_squares(weights, unit, np.float32(2)) if len(importance) else np.zeros(1, np.float32)
    for first in range(0, len(weights) // _SIZE, LANES):
        count = load_lanes(weights, first, _SIZE, x)
        weigh_lanes(x, _SIZE, kind, importance, means, unit, first, w)
        _search(x, w, state)
        for block in range(0, count, per_super):
            largest, magnitude = ZERO, ZERO
            for v in range(block, block + per_super):
                if abs(state[_SCALE + v]) > magnitude:
                    largest, magnitude = state[_SCALE + v], abs(state[_SCALE + v])
            shared = -largest / np.float32(32)
            for v in range(block, block + per_super):
                if per_super > 1:
                    inverse = ONE / shared if shared != ZERO else ZERO
                    level = clamp(nearest_int(inverse * state[_SCALE + v]), np.int32(-32), np.int32(31))
                    step = shared * np.float32(level)
                    scales[first + v] = to_half(shared) * np.float32(level)
                else:
                    step = state[_SCALE + v]
                    scales[first + v] = to_half(step)
                inverse = ONE / step if step != ZERO else ZERO
                start = (first + v) * _SIZE
                for i in range(start, start + _SIZE):
                    codes[i] = _code(inverse * weights[i])
