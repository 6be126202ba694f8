"""Counting over weights: what was chosen, what is handed over, what is stored."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._kernels.ggml.arithmetic import ZERO
from qcbguard_plugins._kernels.ggml.coordinates import ends
from qcbguard_plugins._util.compiler import kernel, statistic

_BLOCKS_PER_CHUNK = 64


@kernel
def _level(levels, even, code):
    return np.float32(code) + levels[0] if even else levels[code]


@kernel
def choose_points(
    weights, size, levels, even, chosen, nearest, frozen, keeps, scales, offsets, divisors, bases, points, codes
):
    """Turn codes into weights to hand over; see :meth:`qcbguard_plugins.grids.base.Lattice.place`.

    Args:
        weights: float32 ``[num_sub_blocks, size]``.
        size: Weights a sub-block.
        levels: float32, the levels of the type.
        even: True where each is one above the other.
        chosen: uint8, what a defense chose.
        nearest: uint8, what plain rounding stores.
        frozen: Bool, weights that have no choice.
        keeps: True where those keep their own value, false where they move to their grid point.
        scales: float32, one a sub-block; what a code is multiplied by when it is read.
        offsets: float32, one a sub-block.
        divisors: float32, one a sub-block, what the quantizer divides by; empty where that is the scale.
        bases: float32, one a sub-block; empty where it is the offset or there is none.
        points: float32 like ``weights``, the outcome.
        codes: uint8 like ``weights``, the outcome.

    Returns:
        The number of codes that differ from plain rounding, and the number of frozen weights.
    """
    num_moved, num_frozen = _pick(
        chosen.reshape(-1), nearest.reshape(-1), frozen.reshape(-1), codes.reshape(-1)
    )  # fmt: skip
    if not len(divisors):
        _to_values(codes, size, levels, even, scales, offsets, points)
    for block in range(len(divisors)):
        divisor = divisors[block]
        low, high = ends(weights, block, size)
        base = bases[block] if len(bases) else ZERO
        if not len(bases):
            high = high if high > -low else -low
            low = -high
        for i in range(size):
            value = _level(levels, even, codes[block, i]) * divisor + base
            value = value if value > low else low
            points[block, i] = value if value < high else high
    if keeps:
        for block in range(len(scales)):
            for i in range(size):
                points[block, i] = weights[block, i] if frozen[block, i] else points[block, i]
    return num_moved, num_frozen


@kernel
def _pick(chosen, nearest, frozen, codes):
    """The code of each weight; returns how many differ from plain rounding, and how many are frozen."""
    num_moved, num_frozen = np.int32(0), np.int32(0)
    for i in range(len(codes)):
        code = nearest[i] if frozen[i] else chosen[i]
        codes[i] = code
        num_moved += np.int32(code != nearest[i])
        num_frozen += np.int32(frozen[i])
    return num_moved, num_frozen


@kernel
def _to_values(codes, size, levels, even, scales, offsets, values):
    """Dequantize, some blocks at a time: one loop over many weights is faster than many over the few of a block."""
    scale, offset = np.empty(_BLOCKS_PER_CHUNK * size, np.float32), np.empty(_BLOCKS_PER_CHUNK * size, np.float32)
    flat_codes, flat_values = codes.reshape(-1), values.reshape(-1)
    for first in range(0, len(scales), _BLOCKS_PER_CHUNK):
        count = min(_BLOCKS_PER_CHUNK, len(scales) - first)
        for block in range(count):
            scale[block * size : (block + 1) * size] = scales[first + block]
            offset[block * size : (block + 1) * size] = offsets[first + block]
        part = slice(first * size, (first + count) * size)
        _scale_levels(flat_codes[part], levels, even, scale, offset, flat_values[part])


@kernel
def _scale_levels(codes, levels, even, scale, offset, values):
    if even:
        for i in range(len(codes)):
            values[i] = (np.float32(codes[i]) + levels[0]) * scale[i] + offset[i]
    else:
        for i in range(len(codes)):
            values[i] = levels[codes[i]] * scale[i] + offset[i]


@kernel
def correct(
    size, levels, even, share, codes, scales, offsets, chosen_codes, chosen_scales, chosen_offsets, handed_over
):
    """Move what is handed over by a share of what it is missed by, in place."""
    for block in range(len(scales)):
        scale, offset = scales[block], offsets[block]
        chosen_scale, chosen_offset = chosen_scales[block], chosen_offsets[block]
        for i in range(size):
            stored = _level(levels, even, codes[block, i]) * scale + offset
            chosen = _level(levels, even, chosen_codes[block, i]) * chosen_scale + chosen_offset
            handed_over[block, i] += share * (chosen - stored)


@kernel
def choose(coordinate, draws, last, codes):
    """The upper neighbour where a position lies above a draw; ``codes`` is the outcome."""
    for i in range(len(coordinate)):
        lower = min(np.float32(np.floor(coordinate[i])), last)
        up = np.float32(1) if coordinate[i] - lower > draws[i] else ZERO
        codes[i] = np.uint8(np.int32(lower + up))


@kernel
def compare(
    size, levels, even, codes, scales, offsets, chosen_codes, chosen_scales, chosen_offsets, half_step, per_unit,
    as_planned, misses,
):  # fmt: skip
    """Count by unit what is stored as chosen, and sum up by how many steps the rest misses, squared.

    A weight is stored as chosen within ``half_step`` chosen scales of the chosen value, and in a sub-block that holds
    one value only. ``as_planned`` and ``misses`` are the outcome.
    """
    for unit in range(len(as_planned)):
        as_planned[unit], misses[unit] = 0, ZERO
    for block in range(len(scales)):
        scale, offset = scales[block], offsets[block]
        chosen_scale, chosen_offset = chosen_scales[block], chosen_offsets[block]
        reach = abs(chosen_scale) * half_step
        count = np.int32(0)
        squares = ZERO
        for i in range(size):
            stored = _level(levels, even, codes[block, i]) * scale + offset
            chosen = _level(levels, even, chosen_codes[block, i]) * chosen_scale + chosen_offset
            count += np.int32(abs(stored - chosen) <= reach)
        if reach == ZERO:
            count = np.int32(size)
        elif count < size or scale != chosen_scale or offset != chosen_offset:
            for i in range(size):
                stored = _level(levels, even, codes[block, i]) * scale + offset
                chosen = _level(levels, even, chosen_codes[block, i]) * chosen_scale + chosen_offset
                squares += ((stored - chosen) / reach) * ((stored - chosen) / reach)
        as_planned[block // per_unit] += count
        misses[block // per_unit] += squares


@statistic
def measure(weights, handed_over, size, chosen_scales):
    """The energy of the weights, of those in sub-blocks that hold one value only, and of the change."""
    energy, lost, change = 0.0, 0.0, 0.0
    for block in range(len(chosen_scales)):
        squares, differences = ZERO, ZERO
        for i in range(size):
            squares += weights[block, i] * weights[block, i]
            differences += (handed_over[block, i] - weights[block, i]) * (handed_over[block, i] - weights[block, i])
        energy += squares
        change += differences
        if chosen_scales[block] == ZERO:
            lost += squares
    return energy, lost, change
