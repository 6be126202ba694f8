"""Types whose sub-blocks have a scale and an offset: Q2_K, Q4_K, Q5_K; with an importance matrix Q4_1 and Q5_1."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._kernels.float16 import to_half
from qcbguard_plugins._kernels.ggml.arithmetic import (
    BATCH,
    LANES,
    ONE,
    RAISED_IMPORTANCE,
    TINY,
    ZERO,
    at,
    clamp,
    load_lanes,
    mean_squares,
    nearest_int,
    weigh_lanes,
)
from qcbguard_plugins._util.compiler import kernel

# Where the rows of the state of a search begin, one entry a lane. They lie in one array, as those of the weights do, so
# that the compiler knows that they do not overlap.
_LOW, _HIGH, _SUM_W, _SUM_X, _INVERSE, _ERROR = range(0, 6 * LANES, LANES)
_SUM_L, _SUM_L2, _SUM_XL, _DETERMINANT, _TRY_SCALE, _TRY_OFFSET = range(6 * LANES, 12 * LANES, LANES)
_BEST_ERROR, _SCALE, _OFFSET, _BEST_INVERSE, _BEST_BASE = range(12 * LANES, 17 * LANES, LANES)
_NUM_STATES = 17


@kernel
def _search(x, w, state, size, top, steps, absolute):
    """Find scale and offset of each lane: fit a line through the codes that each of ``steps`` divisors gives."""
    for v in range(LANES):
        state[_LOW + v] = x[v]
        state[_HIGH + v] = x[v]
        state[_SUM_W + v] = w[v]
        state[_SUM_X + v] = w[v] * x[v]
    for i in range(1, size):
        for v in range(LANES):
            state[_SUM_W + v] += w[at(i, v)]
            state[_SUM_X + v] += w[at(i, v)] * x[at(i, v)]
        for v in range(LANES):
            low, high, value = state[_LOW + v], state[_HIGH + v], x[at(i, v)]
            state[_LOW + v] = value if value < low else low
            state[_HIGH + v] = value if value > high else high
    for v in range(LANES):
        low = state[_LOW + v]
        low = low if low < ZERO else ZERO
        inverse = np.float32(top) / (state[_HIGH + v] - low)
        state[_OFFSET + v] = low
        state[_SCALE + v] = ONE / inverse
        state[_INVERSE + v] = inverse
        state[_BEST_BASE + v] = low
        state[_BEST_INVERSE + v] = inverse
        state[_TRY_SCALE + v] = state[_SCALE + v]
        state[_TRY_OFFSET + v] = low
    _measure(x, w, state, size, top, absolute)
    for v in range(LANES):
        state[_BEST_ERROR + v] = state[_ERROR + v]
    for step in steps:
        for v in range(LANES):
            # The range that the next divisor is taken from starts at the best offset so far.
            state[_INVERSE + v] = step / (state[_HIGH + v] - state[_OFFSET + v])
        _fit(x, w, state, size, top)
        _measure(x, w, state, size, top, absolute)
        for v in range(LANES):
            better = (state[_DETERMINANT + v] > ZERO) & (state[_ERROR + v] < state[_BEST_ERROR + v])
            state[_BEST_ERROR + v] = state[_ERROR + v] if better else state[_BEST_ERROR + v]
            state[_SCALE + v] = state[_TRY_SCALE + v] if better else state[_SCALE + v]
            state[_BEST_BASE + v] = state[_OFFSET + v] if better else state[_BEST_BASE + v]
            state[_OFFSET + v] = state[_TRY_OFFSET + v] if better else state[_OFFSET + v]
            state[_BEST_INVERSE + v] = state[_INVERSE + v] if better else state[_BEST_INVERSE + v]


@kernel
def _fit(x, w, state, size, top):
    """Weighted least squares of the weights on the codes of one divisor."""
    for v in range(LANES):
        state[_SUM_L + v] = ZERO
        state[_SUM_L2 + v] = ZERO
        state[_SUM_XL + v] = ZERO
    for start in range(0, size, BATCH):
        for v in range(LANES):
            inverse, base = state[_INVERSE + v], state[_OFFSET + v]
            sum_l, sum_l2, sum_xl = state[_SUM_L + v], state[_SUM_L2 + v], state[_SUM_XL + v]
            for k in range(BATCH):
                level = nearest_int(inverse * (x[at(start + k, v)] - base))
                code = np.float32(clamp(level, np.int32(0), np.int32(top)))
                weighted = w[at(start + k, v)] * code
                sum_l += weighted
                sum_l2 += weighted * code
                sum_xl += weighted * x[at(start + k, v)]
            state[_SUM_L + v] = sum_l
            state[_SUM_L2 + v] = sum_l2
            state[_SUM_XL + v] = sum_xl
    for v in range(LANES):
        sum_w, sum_x = state[_SUM_W + v], state[_SUM_X + v]
        sum_l, sum_l2, sum_xl = state[_SUM_L + v], state[_SUM_L2 + v], state[_SUM_XL + v]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        without = sum_xl / sum_l2
        state[_DETERMINANT + v] = determinant
        state[_TRY_SCALE + v] = without if offset > ZERO else scale
        state[_TRY_OFFSET + v] = ZERO if offset > ZERO else offset


@kernel
def _measure(x, w, state, size, top, absolute):
    """The weighted error that the codes of one divisor have with the scale and offset under trial."""
    for v in range(LANES):
        state[_ERROR + v] = ZERO
    for start in range(0, size, BATCH):
        for v in range(LANES):
            inverse, base = state[_INVERSE + v], state[_OFFSET + v]
            scale, offset, error = state[_TRY_SCALE + v], state[_TRY_OFFSET + v], state[_ERROR + v]
            for k in range(BATCH):
                level = nearest_int(inverse * (x[at(start + k, v)] - base))
                code = np.float32(clamp(level, np.int32(0), np.int32(top)))
                difference = (scale * code + offset) - x[at(start + k, v)]
                difference = abs(difference) if absolute else difference * difference
                error += w[at(start + k, v)] * difference
            state[_ERROR + v] = error


@kernel
def _quantize_positive(values, weights, top, levels):
    """Codes for the scales or offsets of a super-block, weighted; returns their common scale."""
    largest = ZERO
    for value in values:
        largest = max(largest, value)
    if largest < TINY:
        levels[:] = 0
        return ZERO
    limit = np.float32(top)
    inverse = limit / largest
    best_inverse, best = inverse, ZERO
    for i in range(len(values)):
        code = np.float32(np.int32(nearest_int(inverse * values[i]) & np.int32(0xFF)))
        difference = values[i] - (ONE / inverse) * code
        best += (weights[i] * difference) * difference
    for step in range(-4, 5):
        if step == 0:
            continue
        trial = (np.float32(0.1) * np.float32(step) + limit) / largest
        scale, error = ONE / trial, ZERO
        for i in range(len(values)):
            code = np.float32(min(np.int32(top), nearest_int(trial * values[i])))
            difference = values[i] - scale * code
            error += (weights[i] * difference) * difference
        if error < best:
            best, best_inverse = error, trial
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(len(values)):
        level = np.int32(min(np.int32(top), nearest_int(best_inverse * values[i])) & np.int32(0xFF))
        levels[i] = level
        sum_lx += (weights[i] * values[i]) * np.float32(level)
        sum_l2 += (weights[i] * np.float32(level)) * np.float32(level)
    for _ in range(5):
        changed = False
        for i in range(len(values)):
            weight, value, code = weights[i], values[i], np.float32(levels[i])
            lx, l2 = sum_lx - (weight * value) * code, sum_l2 - (weight * code) * code
            if lx > ZERO and l2 > ZERO:
                level = min(np.int32(top), nearest_int((value * l2) / lx))
                if level != levels[i]:
                    code = np.float32(level)
                    lx += (weight * value) * code
                    l2 += (weight * code) * code
                    if (lx * lx) * sum_l2 > (sum_lx * sum_lx) * l2:
                        levels[i] = np.int32(level & np.int32(0xFF))
                        sum_lx, sum_l2, changed = lx, l2, True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


@kernel
def _quantize_by_largest(values, top, levels):
    """Codes for the scales or offsets of a super-block by the largest of them; returns their common scale."""
    largest = ZERO
    for value in values:
        largest = value if value > largest else largest
    limit = np.float32(top)
    inverse = limit / largest if largest > ZERO else ZERO
    for i in range(len(values)):
        level = np.int32(nearest_int(inverse * values[i]) & np.int32(0xFF))
        levels[i] = min(np.int32(top), level)
    return largest / limit


@kernel
def _round(weights, steps, lows, top, codes):
    for i in range(len(weights)):
        codes[i] = clamp(nearest_int((weights[i] + lows[i]) / steps[i]), np.int32(0), np.int32(top))


@kernel
def quantize_super_blocks(
    weights, importance, unit, factor, kind, size, top, scale_top, steps, absolute, codes, scales, offsets
):
    """Quantize super-blocks of 256 weights.

    Args:
        weights: float32, all weights in a row.
        importance: float32, one entry a column; empty without an importance matrix.
        unit: Weights that share a mean square, which importance is raised by.
        factor: What that mean square is multiplied by.
        kind: Where the weights of the error come from.
        size: Weights a sub-block.
        top: The largest code.
        scale_top: The largest code of a scale or an offset.
        steps: float32, numerators of the divisors that are tried.
        absolute: True to measure errors by magnitude and not by square.
        codes: uint8 like ``weights``, the outcome.
        scales: float32, one a sub-block, the outcome.
        offsets: float32, one a sub-block, the outcome.
    """
    x, w = np.empty(size * LANES, np.float32), np.empty(size * LANES, np.float32)
    state = np.empty(_NUM_STATES * LANES, np.float32)
    per_super = 256 // size
    scale_levels, offset_levels = np.empty(per_super, np.int32), np.empty(per_super, np.int32)
    mins = np.empty(LANES, np.float32)
    each_step, each_low = np.empty(256, np.float32), np.empty(256, np.float32)
    means = mean_squares(weights, unit, factor) if len(importance) else np.zeros(1, np.float32)
    for first in range(0, len(weights) // size, LANES):
        count = load_lanes(weights, first, size, x)
        weigh_lanes(x, size, kind, importance, means, unit, first, w)
        _search(x, w, state, size, top, steps, absolute)
        for v in range(LANES):
            mins[v] = -state[_OFFSET + v]
        for block in range(0, count, per_super):
            found = state[_SCALE + block : _SCALE + block + per_super]
            lows = mins[block : block + per_super]
            if len(importance):
                sums = state[_SUM_W + block : _SUM_W + block + per_super]
                scale = _quantize_positive(found, sums, scale_top, scale_levels)
                offset = _quantize_positive(lows, sums, scale_top, offset_levels)
            else:
                scale = _quantize_by_largest(found, scale_top, scale_levels)
                offset = _quantize_by_largest(lows, scale_top, offset_levels)
            scale, offset = to_half(scale), to_half(offset)
            for j in range(per_super):
                v = block + j
                step = scale * np.float32(scale_levels[j])
                low = offset * np.float32(offset_levels[j])
                scales[first + v] = step
                offsets[first + v] = -low
                for i in range(j * size, (j + 1) * size):
                    each_step[i], each_low[i] = step, low
            part = slice((first + block) * size, (first + block + per_super) * size)
            _round(weights[part], each_step, each_low, top, codes[part])
            for v in range(block, block + per_super):
                if scales[first + v] == ZERO:
                    inverse, base = state[_BEST_INVERSE + v], state[_BEST_BASE + v]
                    for i in range((first + v) * size, (first + v + 1) * size):
                        code = nearest_int(inverse * (weights[i] - base))
                        codes[i] = clamp(code, np.int32(0), np.int32(top))


@kernel
def quantize_blocks(weights, importance, unit, size, top, steps, codes, scales, offsets):
    """Quantize single blocks that store their scale and offset as they are, weighed by an importance matrix."""
    x, w = np.empty(size * LANES, np.float32), np.empty(size * LANES, np.float32)
    state = np.empty(_NUM_STATES * LANES, np.float32)
    means = mean_squares(weights, unit, ONE)
    for first in range(0, len(weights) // size, LANES):
        count = load_lanes(weights, first, size, x)
        weigh_lanes(x, size, RAISED_IMPORTANCE, importance, means, unit, first, w)
        _search(x, w, state, size, top, steps, False)
        for v in range(count):
            scales[first + v] = to_half(state[_SCALE + v])
            offsets[first + v] = to_half(state[_OFFSET + v])
            inverse, base = state[_BEST_INVERSE + v], state[_BEST_BASE + v]
            start = (first + v) * size
            for i in range(start, start + size):
                codes[i] = clamp(nearest_int(inverse * (weights[i] - base)), np.int32(0), np.int32(top))
