"""Stochastic rounding on a type with a formula in one pass: draw, place, choose, hand over, store, compare, count.

What a block becomes stays in the first cache from its weights to its counts. The loops are cut as a compiler needs them
to turn each into vector instructions.
"""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._kernels.float16 import load, round_to, store, to_half
from qcbguard_plugins._kernels.ggml.arithmetic import ONE, ZERO
from qcbguard_plugins._kernels.ggml.coordinates import TOP_OF_8_BITS, code_of, divisor_of, order_of, value_of
from qcbguard_plugins._util.compiler import kernel, statistic
from qcbguard_plugins._util.philox import fill_groups, round_keys
from qcbguard_plugins._util.philox_constants import GROUP

# Weights a block, of every type with a formula.
SIZE = 32
# Blocks that are worked on at a time.
_BLOCKS_PER_CHUNK = 64
# Blocks whose ends are looked for side by side; a shorter loop would be unrolled before it could be vectorized.
_SIDE_BY_SIDE = 4
# What sorts just above the finite numbers, and just below them.
_ABOVE, _BELOW = np.int32(0x7F800000), np.int32(-0x7F800001)
# Two counts in one sum: of weights that moved, and this many times that of those that have no choice.
_SECOND = np.int32(1 << 16)


@kernel
def guard_run(
    source, key0, key1, place, lowest_level, lowest, top, with_offset, dtype, target, codes, packed_rows, counts, sums
):  # fmt: skip
    """Guard some blocks; see :mod:`qcbguard_plugins.rounding.searched` for what each step means.

    Args:
        source: The weights in a row: float32, or the bits of a 16-bit dtype as uint16.
        key0: uint32, the low half of the key of the draws.
        key1: uint32, its high half.
        place: Place of the first weight, a multiple of ``SIZE``.
        lowest_level: float32, the lowest level of the type.
        lowest: float32, the lowest code that is stored.
        top: float32, the highest code.
        with_offset: True where both ends of a block hold its scale.
        dtype: That of the file.
        target: Like ``source``, the outcome; it may be ``source``.
        codes: uint8 ``[num_blocks, SIZE]``, what is stored for that.
        packed_rows: uint8 ``[num_rows, row_bytes]``, that and its scales; see
            :func:`qcbguard_plugins.rounding.guarded_weight.pack_rows`.
        counts: int64 ``[3]``, the weights that moved, those that have no choice, and those that land.
        sums: float64 ``[3]``, see :func:`~qcbguard_plugins._kernels.ggml.counting.measure`.

    Returns:
        False where a weight is not finite; then nothing counts.
    """
    keys, num_blocks = round_keys(key0, key1), len(codes)
    scales, offsets = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    draws = np.empty(_BLOCKS_PER_CHUNK * SIZE + GROUP, np.float32)
    lows, highs = np.empty(_BLOCKS_PER_CHUNK, np.int32), np.empty(_BLOCKS_PER_CHUNK, np.int32)
    divisors, bases = np.empty(_BLOCKS_PER_CHUNK, np.float32), np.empty(_BLOCKS_PER_CHUNK, np.float32)
    wanted = np.empty((_BLOCKS_PER_CHUNK, SIZE), np.uint8)
    weights = np.empty((_BLOCKS_PER_CHUNK, SIZE), np.float32)
    guarded = np.empty((_BLOCKS_PER_CHUNK, SIZE), np.float32)
    for first in range(0, num_blocks, _BLOCKS_PER_CHUNK):
        count = min(_BLOCKS_PER_CHUNK, num_blocks - first)
        flat, flat_guarded = weights.reshape(-1)[: count * SIZE], guarded.reshape(-1)[: count * SIZE]
        part = slice(first * SIZE, (first + count) * SIZE)
        load(source[part], dtype, flat)
        group, skipped = divmod(place + first * SIZE, GROUP)
        fill_groups(keys, group, draws[: -(-(skipped + count * SIZE) // GROUP) * GROUP])
        # By block, as the weights are: a loop over a sum of two indices is not vectorized.
        draws_here = draws[skipped : skipped + count * SIZE].reshape(-1, SIZE)
        if not _find_ends(weights, count, lows, highs):
            return False
        _find_scales(
            weights, count, lows, highs, lowest_level, top, with_offset, divisors, bases,
            scales[first : first + count], offsets[first : first + count],
        )  # fmt: skip
        for i in range(count):
            block = first + i
            low, high, divisor, base = value_of(lows[i]), value_of(highs[i]), divisors[i], bases[i]
            if not with_offset:
                high = high if high > -low else -low
                low = -high
            both = _choose(
                weights, i, draws_here, scales[block], offsets[block], divisor, base, low, high, lowest_level, lowest,
                top, with_offset, guarded, wanted,
            )  # fmt: skip
            counts[0] += both & (_SECOND - np.int32(1))
            counts[1] += both // _SECOND
        round_to(flat_guarded, dtype)
        store(flat_guarded, dtype, target[part])
        # The ends kept their values and nothing lies beyond them, so the quantizer finds the scales above again.
        for i in range(count):
            block = first + i
            counts[2] += _encode(
                guarded, i, divisors[i], bases[i], scales[block], offsets[block], wanted, lowest_level, top,
                with_offset, codes, block,
            )  # fmt: skip
            if scales[block] == ZERO:
                for j in range(SIZE):
                    sums[1] += weights[i, j] * weights[i, j]
        energy, change = _measure(flat, flat_guarded)
        sums[0] += energy
        sums[2] += change
    _pack(codes.reshape(len(packed_rows), -1), scales, offsets, with_offset, packed_rows)
    return True


@kernel
def _pack(codes, scales, offsets, with_offset, packed_rows):
    num_rows, columns = codes.shape
    half, per_row = columns // 2, columns // SIZE
    # Behind the codes, which fill a byte or half of one each, come the values.
    begin = packed_rows.shape[1] - 4 * per_row * (2 if with_offset else 1)
    for row in range(num_rows):
        packed = packed_rows[row]
        if begin == half:
            for i in range(half):
                packed[i] = codes[row, i] | (codes[row, half + i] << np.uint8(4))
        else:
            for i in range(columns):
                packed[i] = codes[row, i]
        # Adding zero turns -0.0 into 0.0.
        packed[begin : begin + 4 * per_row].view(np.float32)[:] = scales[row * per_row : (row + 1) * per_row] + ZERO
        if with_offset:
            packed[begin + 4 * per_row :].view(np.float32)[:] = offsets[row * per_row : (row + 1) * per_row] + ZERO


@kernel
def _find_ends(weights, count, lows, highs):
    """What the smallest and the largest weight of each block sort as; false where a weight is not finite."""
    last = count - 1
    for a in range(0, count, _SIDE_BY_SIDE):
        b, c, d = min(a + 1, last), min(a + 2, last), min(a + 3, last)
        low_a, low_b, low_c, low_d = _ABOVE, _ABOVE, _ABOVE, _ABOVE
        high_a, high_b, high_c, high_d = _BELOW, _BELOW, _BELOW, _BELOW
        for i in range(SIZE):
            value_a, value_b = order_of(weights[a, i]), order_of(weights[b, i])
            value_c, value_d = order_of(weights[c, i]), order_of(weights[d, i])
            low_a, low_b = min(low_a, value_a), min(low_b, value_b)
            low_c, low_d = min(low_c, value_c), min(low_d, value_d)
            high_a, high_b = max(high_a, value_a), max(high_b, value_b)
            high_c, high_d = max(high_c, value_c), max(high_d, value_d)
        lows[a], lows[b], lows[c], lows[d] = low_a, low_b, low_c, low_d
        highs[a], highs[b], highs[c], highs[d] = high_a, high_b, high_c, high_d
    lowest, highest = lows[0], highs[0]
    for i in range(count):
        lowest, highest = min(lowest, lows[i]), max(highest, highs[i])
    return lowest > _BELOW and highest < _ABOVE


@kernel
def _find_scales(weights, count, lows, highs, lowest_level, top, with_offset, divisors, bases, scales, offsets):
    """What the weights of each block are divided by and begin at, and both as float16 keeps them."""
    num_tied = np.int32(0)
    if with_offset:
        for i in range(count):
            divisors[i] = (value_of(highs[i]) - value_of(lows[i])) / top
            bases[i] = value_of(lows[i])
            offsets[i] = to_half(bases[i])
    else:
        for i in range(count):
            low, high = value_of(lows[i]), value_of(highs[i])
            largest = high if high > -low else low
            divisors[i] = abs(largest) / np.float32(127) if top == TOP_OF_8_BITS else largest / lowest_level
            bases[i], offsets[i] = ZERO, ZERO
            num_tied += np.int32(high == -low)
    if num_tied:
        for i in range(count):
            low, high = value_of(lows[i]), value_of(highs[i])
            divisors[i], bases[i] = divisor_of(weights, i, low, high, lowest_level, top, with_offset)
    for i in range(count):
        scales[i] = to_half(divisors[i])


@kernel
def _choose(
    weights, row, draws, scale, offset, divisor, base, low, high, lowest_level, lowest, top, with_offset, guarded,
    wanted,
):  # fmt: skip
    inverse = ONE / scale if scale != ZERO else ZERO
    inverse_divisor = ONE / divisor if divisor != ZERO else ZERO
    last, empty = top - ONE, scale == ZERO
    both = np.int32(0)
    for i in range(SIZE):
        weight = weights[row, i]
        nearest = np.int32(code_of(weight, inverse_divisor, base, top, with_offset))
        coordinate = (weight - offset) * inverse - lowest_level
        coordinate = coordinate if coordinate > lowest else lowest
        coordinate = coordinate if coordinate < top else top
        lower = min(np.float32(np.floor(coordinate)), last)
        up = ONE if coordinate - lower > draws[row, i] else ZERO
        frozen = empty | (weight == low) | (weight == high)
        code = nearest if frozen else np.int32(lower + up)
        both += np.int32(code != nearest) + (_SECOND if frozen else np.int32(0))
        value = (np.float32(code) + lowest_level) * divisor + base
        value = value if value > low else low
        value = value if value < high else high
        guarded[row, i] = weight if frozen else value
        wanted[row, i] = np.uint8(code)
    return both


@kernel
def _encode(
    points, row, divisor, base, scale, offset, wanted, lowest_level, top, with_offset, codes, block
):  # fmt: skip
    """Fill the codes that are stored; returns how many of them stand for the value that was chosen."""
    inverse = ONE / divisor if divisor != ZERO else ZERO
    reach = abs(scale) * np.float32(0.5)
    num_as_planned = np.int32(0)
    for i in range(SIZE):
        code = np.int32(code_of(points[row, i], inverse, base, top, with_offset))
        stored = (np.float32(code) + lowest_level) * scale + offset
        value = (np.float32(wanted[row, i]) + lowest_level) * scale + offset
        num_as_planned += np.int32(abs(stored - value) <= reach)
        codes[block, i] = np.uint8(code)
    return num_as_planned if reach != ZERO else np.int32(SIZE)


@statistic
def _measure(weights, guarded):
    energy, change = ZERO, ZERO
    for i in range(len(weights)):
        energy += weights[i] * weights[i]
        difference = guarded[i] - weights[i]
        change += difference * difference
    return energy, change
