"""Philox4x32-10, compiled; the definition is :mod:`qcbguard_plugins._util.random`."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins._util.compiler import kernel
from qcbguard_plugins._util.philox_constants import KEY_STEPS, LANES, MULTIPLIERS, NUM_ROUNDS

# A product of two numbers below 2**32 is one vector instruction where the compiler sees that they are.
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_K0, _K1 = np.uint32(KEY_STEPS[0]), np.uint32(KEY_STEPS[1])
_HALF, _BYTE, _LOW = np.uint64(32), np.uint64(8), np.uint64(0xFFFFFFFF)
_UNIT = np.float32(2.0**-24)


@kernel
def round_keys(key0, key1):
    """The keys of all rounds, uint32 ``[2 * NUM_ROUNDS]``, from the halves of a key."""
    keys = np.empty(2 * NUM_ROUNDS, np.uint32)
    for i in range(NUM_ROUNDS):
        keys[2 * i], keys[2 * i + 1] = key0, key1
        key0, key1 = np.uint32(key0 + _K0), np.uint32(key1 + _K1)
    return keys


@kernel
def fill_groups(keys, first_group, draws):
    """Fill whole groups of ``4 * LANES`` draws in [0, 1).

    Args:
        keys: From :func:`round_keys`.
        first_group: Number of the first group.
        draws: float32 ``[num_groups * 4 * LANES]``, the outcome.
    """
    for group in range(len(draws) // (4 * LANES)):
        first = np.uint64(first_group + group) * np.uint64(LANES)
        start = group * 4 * LANES
        for lane in range(LANES):
            counter = first + np.uint64(lane)
            c0, c1, c2, c3 = counter & _LOW, counter >> _HALF, np.uint64(0), np.uint64(0)
            for i in range(NUM_ROUNDS):
                p0, p1 = c0 * _M0, c2 * _M1
                c0 = (p1 >> _HALF) ^ c1 ^ np.uint64(keys[2 * i])
                c2 = (p0 >> _HALF) ^ c3 ^ np.uint64(keys[2 * i + 1])
                c1, c3 = p1 & _LOW, p0 & _LOW
            draws[start + lane] = np.float32(np.int32(c0 >> _BYTE)) * _UNIT
            draws[start + LANES + lane] = np.float32(np.int32(c1 >> _BYTE)) * _UNIT
            draws[start + 2 * LANES + lane] = np.float32(np.int32(c2 >> _BYTE)) * _UNIT
            draws[start + 3 * LANES + lane] = np.float32(np.int32(c3 >> _BYTE)) * _UNIT


@kernel
def fill_draws(key0, key1, first_group, draws):
    """Fill whole groups of draws; see :func:`fill_groups`.

    Args:
        key0: uint32, the low half of the key.
        key1: uint32, its high half.
        first_group: Number of the first group.
        draws: float32 ``[num_groups * 4 * LANES]``, the outcome.
    """
    fill_groups(round_keys(key0, key1), first_group, draws)
