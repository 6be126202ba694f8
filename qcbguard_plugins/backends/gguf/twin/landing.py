"""Counting over weights: what was chosen, what is handed over, what is stored."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins.backends.gguf.twin.arithmetic import ZERO
from qcbguard_plugins.backends.gguf.twin.places import ends
from qcbguard_plugins.kernels.compiler import kernel, statistic


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
    num_moved, num_frozen = 0, 0
    for block in range(len(scales)):
        moved_here, frozen_here = np.int32(0), np.int32(0)
        for i in range(size):
            code = nearest[block, i] if frozen[block, i] else chosen[block, i]
            codes[block, i] = code
            moved_here += np.int32(code != nearest[block, i])
            frozen_here += np.int32(frozen[block, i])
        num_moved += moved_here
        num_frozen += frozen_here
        if not len(divisors):
            scale, offset = scales[block], offsets[block]
            for i in range(size):
                points[block, i] = _level(levels, even, codes[block, i]) * scale + offset
        else:
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
            for i in range(size):
                points[block, i] = weights[block, i] if frozen[block, i] else points[block, i]
    return num_moved, num_frozen


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
def choose(coordinate, draws, size, last, codes):
    """The upper neighbour where a position lies above a draw; ``codes`` is the outcome."""
    for block in range(len(coordinate)):
        for i in range(size):
            lower = min(np.float32(np.floor(coordinate[block, i])), last)
            up = np.float32(1) if coordinate[block, i] - lower > draws[block, i] else ZERO
            codes[block, i] = np.uint8(np.int32(lower + up))


@kernel
def compare(
    size, levels, even, codes, scales, offsets, chosen_codes, chosen_scales, chosen_offsets, half_step, per_unit,
    landed, misses,
):  # fmt: skip
    """Count by unit what is stored as chosen, and sum up by how many steps the rest misses, squared.

    A weight is stored as chosen within ``half_step`` chosen scales of the chosen value, and in a sub-block that holds
    one value only. ``landed`` and ``misses`` are the outcome.
    """
    for unit in range(len(landed)):
        landed[unit], misses[unit] = 0, ZERO
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
        landed[block // per_unit] += count
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
