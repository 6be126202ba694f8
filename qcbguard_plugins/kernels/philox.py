"""Philox4x32-10, compiled; the definition is :mod:`qcbguard_plugins.draws`."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins.draws import KEY_STEPS, LANES, MULTIPLIERS, NUM_ROUNDS
from qcbguard_plugins.kernels.compiler import kernel

_M0, _M1 = np.uint32(MULTIPLIERS[0]), np.uint32(MULTIPLIERS[1])
_K0, _K1 = np.uint32(KEY_STEPS[0]), np.uint32(KEY_STEPS[1])
_HALF, _BYTE = np.uint64(32), np.uint32(8)
_UNIT = np.float32(2.0**-24)


@kernel
def fill_draws(key0, key1, first_group, draws):
    """Fill whole groups of ``4 * LANES`` draws in [0, 1).

    Args:
        key0: uint32, the low half of the key.
        key1: uint32, its high half.
        first_group: Number of the first group.
        draws: float32 ``[num_groups * 4 * LANES]``, the outcome.
    """
    for group in range(len(draws) // (4 * LANES)):
        counter = np.uint64(first_group + group) * np.uint64(LANES)
        high, low = np.uint32(counter >> _HALF), np.uint32(counter)
        start = group * 4 * LANES
        for lane in range(LANES):
            c0, c1, c2, c3 = np.uint32(low + np.uint32(lane)), high, np.uint32(0), np.uint32(0)
            k0, k1 = key0, key1
            for _ in range(NUM_ROUNDS):
                p0, p1 = np.uint64(c0) * np.uint64(_M0), np.uint64(c2) * np.uint64(_M1)
                c0 = np.uint32(np.uint32(p1 >> _HALF) ^ c1 ^ k0)
                c2 = np.uint32(np.uint32(p0 >> _HALF) ^ c3 ^ k1)
                c1, c3 = np.uint32(p1), np.uint32(p0)
                k0, k1 = np.uint32(k0 + _K0), np.uint32(k1 + _K1)
            draws[start + lane] = np.float32(np.int32(c0 >> _BYTE)) * _UNIT
            draws[start + LANES + lane] = np.float32(np.int32(c1 >> _BYTE)) * _UNIT
            draws[start + 2 * LANES + lane] = np.float32(np.int32(c2 >> _BYTE)) * _UNIT
            draws[start + 3 * LANES + lane] = np.float32(np.int32(c3 >> _BYTE)) * _UNIT
