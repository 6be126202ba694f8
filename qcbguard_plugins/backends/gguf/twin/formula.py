"""Stochastic rounding on a type with a formula in one pass: place, choose, hand over, store, compare, count."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins.backends.gguf.twin.landing import choose, choose_points, compare, measure
from qcbguard_plugins.backends.gguf.twin.places import encode_by_formula, place_by_formula
from qcbguard_plugins.kernels.compiler import kernel
from qcbguard_plugins.kernels.half import to_bfloat16, to_half
from qcbguard_plugins.kernels.stochastic import BFLOAT16, FLOAT16

# Blocks that are worked on at a time; all that is computed of them stays in the first cache.
_BLOCKS_PER_CHUNK = 64
_FINITE = np.int32(0x7F800000)


@kernel
def guard_run(
    weights, draws, size, levels, lowest, with_offset, half_step, dtype, guarded, codes, scales, offsets, counts, sums
):
    """Guard some blocks; see :mod:`qcbguard_plugins.landing` for what each step means.

    Args:
        weights: float32 ``[num_blocks, size]``, numbers of ``dtype``.
        draws: float32 like it.
        size: Weights a block.
        levels: float32, the levels of the type.
        lowest: float32, the lowest code that is stored.
        with_offset: True where both ends of a block hold its scale.
        half_step: float32, half the least distance of levels.
        dtype: That of the file.
        guarded: float32 like ``weights``, the outcome, numbers of ``dtype``.
        codes: uint8 like it, what is stored for that.
        scales: float32, one a block, the same.
        offsets: float32, one a block, the same.
        counts: int64 ``[3]``, the weights that moved, those that have no choice, and those that land.
        sums: float64 ``[3]``, see :func:`~qcbguard_plugins.backends.gguf.twin.landing.measure`.

    Returns:
        False where a weight is not finite; then nothing counts.
    """
    top = np.float32(len(levels) - 1)
    coordinate = np.empty((_BLOCKS_PER_CHUNK, size), np.float32)
    nearest, chosen = np.empty((_BLOCKS_PER_CHUNK, size), np.uint8), np.empty((_BLOCKS_PER_CHUNK, size), np.uint8)
    wanted, frozen = np.empty((_BLOCKS_PER_CHUNK, size), np.uint8), np.empty((_BLOCKS_PER_CHUNK, size), np.bool_)
    chosen_scales, chosen_offsets = np.empty(_BLOCKS_PER_CHUNK, np.float32), np.empty(_BLOCKS_PER_CHUNK, np.float32)
    divisors, bases = np.empty(_BLOCKS_PER_CHUNK, np.float32), np.empty(_BLOCKS_PER_CHUNK, np.float32)
    landed, misses = np.empty(_BLOCKS_PER_CHUNK, np.int32), np.empty(_BLOCKS_PER_CHUNK, np.float32)
    for first in range(0, len(weights), _BLOCKS_PER_CHUNK):
        count = min(_BLOCKS_PER_CHUNK, len(weights) - first)
        part, points = weights[first : first + count], guarded[first : first + count]
        if not _is_finite(part, size):
            return False
        place_by_formula(
            part, size, levels[0], lowest, top, with_offset, nearest[:count], chosen_scales[:count],
            chosen_offsets[:count], divisors[:count], bases[:count], coordinate[:count], frozen[:count],
        )  # fmt: skip
        choose(coordinate[:count], draws[first : first + count], size, top - np.float32(1), wanted[:count])
        num_moved, num_frozen = choose_points(
            part, size, levels, True, wanted[:count], nearest[:count], frozen[:count], True, chosen_scales[:count],
            chosen_offsets[:count], divisors[:count], bases[: count if with_offset else 0], points, chosen[:count],
        )  # fmt: skip
        _store(points, size, dtype)
        stored = codes[first : first + count]
        encode_by_formula(
            points, size, levels[0], top, with_offset, stored, scales[first : first + count],
            offsets[first : first + count],
        )  # fmt: skip
        compare(
            size, levels, True, stored, scales[first : first + count], offsets[first : first + count], chosen[:count],
            chosen_scales[:count], chosen_offsets[:count], half_step, 1, landed[:count], misses[:count],
        )  # fmt: skip
        energy, lost, change = measure(part, points, size, chosen_scales[:count])
        sums[0] += energy
        sums[1] += lost
        sums[2] += change
        counts[0] += num_moved
        counts[1] += num_frozen
        for block in range(count):
            counts[2] += landed[block]
    return True


@kernel
def _is_finite(weights, size):
    largest = np.int32(0)
    for block in range(len(weights)):
        for i in range(size):
            bits = np.int32(np.float32(weights[block, i]).view(np.int32) & np.int32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
    return largest < _FINITE


@kernel
def _store(points, size, dtype):
    if dtype == BFLOAT16:
        for block in range(len(points)):
            for i in range(size):
                points[block, i] = to_bfloat16(points[block, i])
    elif dtype == FLOAT16:
        for block in range(len(points)):
            for i in range(size):
                points[block, i] = to_half(points[block, i])
