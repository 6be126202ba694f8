"""What the searches of all types share: lanes, weights of the error, and ggml's way to round."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._util.compiler import kernel

# Sub-blocks that are searched side by side. Their weights, offsets and errors fit the first cache together.
LANES = 64
# Weights of a lane that are summed up in a register before the sums go back to memory.
BATCH = 8

ZERO, ONE = np.float32(0), np.float32(1)
# Added and taken away again, this leaves the nearest whole number, ties to even.
ROUNDER = np.float32(12582912)
# Blocks whose largest magnitude is below this are all zero to ggml (GROUP_MAX_EPS).
TINY = np.float32(1e-15)

# Where the weights of the error come from: ggml's choice of each type, or an importance matrix.
SQUARE, MAGNITUDE, RAISED_MAGNITUDE, IMPORTANCE, RAISED_IMPORTANCE = range(5)


@kernel
def at(place, lane):
    """Where a lane's weight lies; unsigned, as a loop over what could be a negative index is not vectorized."""
    return np.uint64(place) * np.uint64(LANES) + np.uint64(lane)


@kernel
def nearest_int(value):
    """ggml's ``nearest_int``, for any float32, those too large for it included."""
    bits = np.float32(value + ROUNDER).view(np.int32)
    return np.int32(np.int32(bits & np.int32(0x007FFFFF)) - np.int32(0x00400000))


@kernel
def clamp(value, low, high):
    """An int32 within bounds."""
    above = value if value > low else np.int32(low)
    return above if above < high else np.int32(high)


@kernel
def mean_squares(weights, unit, factor):
    """``factor`` times the mean square of each run of ``unit`` weights."""
    means = np.empty(len(weights) // unit, np.float32)
    for i in range(len(means)):
        total = ZERO
        for j in range(i * unit, (i + 1) * unit):
            total += weights[j] * weights[j]
        means[i] = np.float32(factor * total) / np.float32(unit)
    return means


@kernel
def load_lanes(weights, first, size, x):
    """Lay sub-blocks out in ``x``, place by place, one lane for each of them; lanes past the end are zero."""
    count = min(LANES, len(weights) // size - first)
    for lane in range(count):
        start = (first + lane) * size
        for i in range(size):
            x[at(i, lane)] = weights[start + i]
    for lane in range(count, LANES):
        for i in range(size):
            x[at(i, lane)] = ZERO
    return count


@kernel
def find_largest(x, size, largest, magnitudes):
    """Of each lane the first weight of the largest magnitude, with its sign, and that magnitude."""
    for v in range(LANES):
        largest[v] = ZERO
        magnitudes[v] = ZERO
    for i in range(size):
        for v in range(LANES):
            larger = abs(x[at(i, v)]) > magnitudes[v]
            largest[v] = x[at(i, v)] if larger else largest[v]
            magnitudes[v] = abs(x[at(i, v)]) if larger else magnitudes[v]


@kernel
def weigh_lanes(x, size, kind, importance, means, unit, first, w):
    """Fill ``w`` with the weight of each squared error.

    ``importance`` has one entry a column, and rows follow each other without a gap; ``means`` has one a ``unit``.
    """
    if kind >= IMPORTANCE:
        for lane in range(LANES):
            start = (first + lane) * size
            mean = means[min(start // unit, len(means) - 1)]
            column = start % len(importance)
            for i in range(size):
                weight = importance[column + i]
                if kind == RAISED_IMPORTANCE:
                    weight *= np.sqrt(np.float32(mean + x[at(i, lane)] * x[at(i, lane)]))
                w[at(i, lane)] = weight
        return
    for i in range(size):
        for lane in range(LANES):
            w[at(i, lane)] = x[at(i, lane)] * x[at(i, lane)] if kind == SQUARE else abs(x[at(i, lane)])
    if kind == RAISED_MAGNITUDE:
        sums = np.zeros(LANES, np.float32)
        for i in range(size):
            for lane in range(LANES):
                sums[lane] += x[at(i, lane)] * x[at(i, lane)]
        for lane in range(LANES):
            sums[lane] = np.sqrt(np.float32(sums[lane] / np.float32(size)))
        for i in range(size):
            for lane in range(LANES):
                w[at(i, lane)] = sums[lane] + w[at(i, lane)]
