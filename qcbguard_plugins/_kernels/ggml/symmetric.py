"""Types whose sub-blocks have a scale alone: Q3_K, Q6_K; with an importance matrix Q4_0 and Q5_0."""

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
    find_largest,
    load_lanes,
    mean_squares,
    nearest_int,
    weigh_lanes,
)
from qcbguard_plugins._util.compiler import kernel

# Where the rows of the state of a search begin, one entry a lane. They lie in one array, as those of the weights do, so
# that the compiler knows that they do not overlap.
_LARGEST, _MAGNITUDE, _INVERSE, _SUM_LX, _SUM_L2, _SCALE, _BEST, _BEST_INVERSE, _SUM_W = range(0, 9 * LANES, LANES)
_NUM_STATES = 9


@kernel
def _sum(x, w, state, size, half):
    """The sums that give the best scale for the codes of one divisor."""
    for v in range(LANES):
        state[_SUM_LX + v] = ZERO
        state[_SUM_L2 + v] = ZERO
    for start in range(0, size, BATCH):
        for v in range(LANES):
            inverse, sum_lx, sum_l2 = state[_INVERSE + v], state[_SUM_LX + v], state[_SUM_L2 + v]
            for k in range(BATCH):
                value, weight = x[at(start + k, v)], w[at(start + k, v)]
                level = clamp(nearest_int(inverse * value), np.int32(-half), np.int32(half - 1))
                code = np.float32(level)
                sum_lx += (weight * value) * code
                sum_l2 += (weight * code) * code
            state[_SUM_LX + v] = sum_lx
            state[_SUM_L2 + v] = sum_l2


@kernel
def _search(x, w, state, size, half):
    """Find the scale of each lane: the best of nineteen divisors."""
    find_largest(x, size, state[_LARGEST:], state[_MAGNITUDE:])
    limit = np.float32(half)
    for v in range(LANES):
        state[_INVERSE + v] = -limit / state[_LARGEST + v]
    _sum(x, w, state, size, half)
    for v in range(LANES):
        scale = state[_SUM_LX + v] / state[_SUM_L2 + v] if state[_SUM_L2 + v] != ZERO else ZERO
        state[_SCALE + v] = scale
        state[_BEST + v] = scale * state[_SUM_LX + v]
        state[_BEST_INVERSE + v] = state[_INVERSE + v]
    for step in range(-9, 10):
        if step == 0:
            continue
        numerator = -(limit + np.float32(0.1) * np.float32(step))
        for v in range(LANES):
            state[_INVERSE + v] = numerator / state[_LARGEST + v]
        _sum(x, w, state, size, half)
        for v in range(LANES):
            sum_lx, sum_l2, best = state[_SUM_LX + v], state[_SUM_L2 + v], state[_BEST + v]
            better = (sum_l2 > ZERO) & (sum_lx * sum_lx > best * sum_l2)
            scale = sum_lx / sum_l2
            state[_SCALE + v] = scale if better else state[_SCALE + v]
            state[_BEST + v] = scale * sum_lx if better else best
            state[_BEST_INVERSE + v] = state[_INVERSE + v] if better else state[_BEST_INVERSE + v]
    for v in range(LANES):
        state[_SCALE + v] = ZERO if state[_MAGNITUDE + v] < TINY else state[_SCALE + v]


@kernel
def _refine(x, w, levels, state, size, half):
    """Q3_K's own search: change one code after the other while that makes the best scale fit better."""
    find_largest(x, size, state[_LARGEST:], state[_MAGNITUDE:])
    for v in range(LANES):
        state[_INVERSE + v] = -np.float32(half) / state[_LARGEST + v]
        state[_SUM_LX + v] = ZERO
        state[_SUM_L2 + v] = ZERO
    for i in range(size):
        for v in range(LANES):
            level = clamp(nearest_int(state[_INVERSE + v] * x[at(i, v)]), np.int32(-half), np.int32(half - 1))
            code = np.float32(level)
            levels[at(i, v)] = code
            state[_SUM_LX + v] += (w[at(i, v)] * x[at(i, v)]) * code
            state[_SUM_L2 + v] += (w[at(i, v)] * code) * code
    for _ in range(5):
        # A lane in which no code changed stays as it is, so all may go on until the last has come to rest.
        num_changed = np.int32(0)
        for i in range(size):
            for v in range(LANES):
                value, weight, code = x[at(i, v)], w[at(i, v)], levels[at(i, v)]
                old_lx, old_l2 = state[_SUM_LX + v], state[_SUM_L2 + v]
                lx, l2 = old_lx - (weight * value) * code, old_l2 - (weight * code) * code
                new = np.float32(clamp(nearest_int((value * l2) / lx), np.int32(-half), np.int32(half - 1)))
                new_lx, new_l2 = lx + (weight * value) * new, l2 + (weight * new) * new
                better = (lx > ZERO) & (new != code) & (new_l2 > ZERO)
                better &= (new_lx * new_lx) * old_l2 > (old_lx * old_lx) * new_l2
                levels[at(i, v)] = new if better else code
                state[_SUM_LX + v] = new_lx if better else old_lx
                state[_SUM_L2 + v] = new_l2 if better else old_l2
                num_changed += np.int32(better)
        if num_changed == 0:
            break
    for v in range(LANES):
        scale = state[_SUM_LX + v] / state[_SUM_L2 + v] if state[_SUM_L2 + v] > ZERO else ZERO
        state[_SCALE + v] = ZERO if state[_MAGNITUDE + v] < TINY else scale


@kernel
def _quantize_scales(values, weights, half, levels):
    """Codes for the scales of a super-block, weighted; returns their common scale."""
    largest, magnitude = ZERO, ZERO
    for value in values:
        if abs(value) > magnitude:
            magnitude, largest = abs(value), value
    if magnitude < TINY:
        levels[:] = -half
        return ZERO
    limit = np.float32(half)
    scale, best, best_inverse = ZERO, ZERO, ZERO
    for index in range(19):
        # The plain divisor first, then those around it.
        step = 0 if index == 0 else index - 10 if index <= 9 else index - 9
        inverse = -(limit + np.float32(0.1) * np.float32(step)) / largest if step else -limit / largest
        sum_lx, sum_l2 = ZERO, ZERO
        for i in range(len(values)):
            code = np.float32(clamp(nearest_int(inverse * values[i]), np.int32(-half), np.int32(half - 1)))
            sum_lx += (weights[i] * values[i]) * code
            sum_l2 += (weights[i] * code) * code
        if index == 0:
            scale = sum_lx / sum_l2 if sum_l2 != ZERO else ZERO
            best, best_inverse = scale * sum_lx, inverse
        elif sum_l2 > ZERO and sum_lx * sum_lx > best * sum_l2:
            scale = sum_lx / sum_l2
            best, best_inverse = scale * sum_lx, inverse
    for i in range(len(values)):
        levels[i] = clamp(nearest_int(best_inverse * values[i]), np.int32(-half), np.int32(half - 1))
    return scale


@kernel
def _quantize_scales_by_largest(values, half, levels):
    """Codes for the scales of a super-block by the largest of them; returns their common scale."""
    largest, magnitude = ZERO, ZERO
    for value in values:
        if abs(value) > magnitude:
            magnitude, largest = abs(value), value
    if half == 128 and magnitude < TINY:
        levels[:] = 0
        return ZERO
    if largest == ZERO:
        levels[:] = -half
        return ZERO
    inverse = -np.float32(half) / largest
    for i in range(len(values)):
        levels[i] = clamp(nearest_int(inverse * values[i]), np.int32(-half), np.int32(half - 1))
    return ONE / inverse


@kernel
def _round(weights, steps, half, codes):
    for i in range(len(weights)):
        level = clamp(nearest_int(weights[i] / steps[i]), np.int32(-half), np.int32(half - 1))
        codes[i] = np.int32(level + np.int32(half))


@kernel
def quantize_super_blocks(weights, importance, unit, kind, half, scale_half, refined, codes, scales):
    """Quantize super-blocks of 256 weights in sub-blocks of 16.

    Args:
        weights: float32, all weights in a row.
        importance: float32, one entry a column; empty without an importance matrix.
        unit: Weights that share a mean square, which importance is raised by.
        kind: Where the weights of the error come from.
        half: Half the number of codes.
        scale_half: Half the number of codes of a scale.
        refined: True for Q3_K without an importance matrix.
        codes: uint8 like ``weights``, the outcome.
        scales: float32, one a sub-block, the outcome.
    """
    size, per_super = 16, 16
    x, w = np.empty(size * LANES, np.float32), np.empty(size * LANES, np.float32)
    kept = np.empty(size * LANES, np.float32)
    state = np.empty(_NUM_STATES * LANES, np.float32)
    levels, each_step = np.empty(per_super, np.int32), np.empty(256, np.float32)
    means = mean_squares(weights, unit, np.float32(2)) if len(importance) else np.zeros(1, np.float32)
    for first in range(0, len(weights) // size, LANES):
        count = load_lanes(weights, first, size, x)
        weigh_lanes(x, size, kind, importance, means, unit, first, w)
        if refined:
            _refine(x, w, kept, state, size, half)
        else:
            _search(x, w, state, size, half)
            for v in range(LANES):
                state[_SUM_W + v] = ZERO
            for i in range(size):
                for v in range(LANES):
                    state[_SUM_W + v] += w[at(i, v)]
        for block in range(0, count, per_super):
            found = state[_SCALE + block : _SCALE + block + per_super]
            if len(importance) and scale_half == 32:
                scale = _quantize_scales(found, state[_SUM_W + block : _SUM_W + block + per_super], scale_half, levels)
            else:
                scale = _quantize_scales_by_largest(found, scale_half, levels)
            emptied = scale_half == 128 and scale == ZERO
            scale = to_half(scale)
            for j in range(per_super):
                v = block + j
                step = scale * np.float32(levels[j])
                scales[first + v] = step
                for i in range(j * size, (j + 1) * size):
                    each_step[i] = step
            part = slice((first + block) * size, (first + block + per_super) * size)
            _round(weights[part], each_step, half, codes[part])
            for v in range(block, block + per_super):
                if scales[first + v] != ZERO:
                    continue
                for i in range(size):
                    if emptied or state[_MAGNITUDE + v] < TINY:
                        code = np.int32(0)
                    elif refined:
                        code = np.int32(np.int32(kept[at(i, v)]) + np.int32(half))
                    else:
                        level = nearest_int(state[_BEST_INVERSE + v] * x[at(i, v)])
                        code = np.int32(clamp(level, np.int32(-half), np.int32(half - 1)) + np.int32(half))
                    codes[(first + v) * size + i] = code


@kernel
def quantize_blocks(weights, importance, unit, half, codes, scales):
    """Quantize single blocks of 32 that store their scale as it is, weighed by an importance matrix."""
    size = 32
    x, w = np.empty(size * LANES, np.float32), np.empty(size * LANES, np.float32)
    state = np.empty(_NUM_STATES * LANES, np.float32)
    means = mean_squares(weights, unit, ONE)
    for first in range(0, len(weights) // size, LANES):
        count = load_lanes(weights, first, size, x)
        weigh_lanes(x, size, RAISED_IMPORTANCE, importance, means, unit, first, w)
        _search(x, w, state, size, half)
        for v in range(count):
            scales[first + v] = to_half(state[_SCALE + v])
            for i in range(size):
                level = nearest_int(state[_BEST_INVERSE + v] * x[at(i, v)])
                level = np.int32(clamp(level, np.int32(-half), np.int32(half - 1)) + np.int32(half))
                codes[(first + v) * size + i] = level if state[_MAGNITUDE + v] >= TINY else np.int32(0)
