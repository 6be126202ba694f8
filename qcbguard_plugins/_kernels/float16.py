"""Numbers of 16 bits: read, written, and as the float32 that is left of one after it was stored."""

from __future__ import annotations

import numpy as np
import torch

from qcbguard_plugins._util.compiler import kernel

#: Dtypes in which a weight is stored, as kernels know them.
FLOAT32, FLOAT16, BFLOAT16 = range(3)
DTYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

# The smallest float16 of full precision, and the step of those below it.
_SMALLEST_NORMAL, _SUBNORMAL_STEP = np.float32(2.0**-14), np.float32(2.0**-24)
_HALVES_PER_ONE = np.float32(2.0**24)
# What the exponents of float32 and float16 differ by, in the bits of float32.
_BIAS = np.int32(112 << 23)
_INFINITE_HALF, _INFINITY = np.int32(0x7C00), np.int32(0x7F800000)


@kernel
def to_half(value):
    """The float32 that is left of one after it was stored as float16, ties to even."""
    if np.isnan(value):
        return np.float32(np.nan)
    magnitude = abs(value)
    if magnitude < _SMALLEST_NORMAL:
        # float16 has no finer step than 2**-24 here, and float32 none either between 1/2 and 1.
        rounded = np.float32(magnitude + np.float32(0.5)) - np.float32(0.5)
    else:
        bits = np.float32(magnitude).view(np.int32)
        odd = np.int32(np.int32(bits >> np.int32(13)) & np.int32(1))
        bits = np.int32(np.int32(bits + np.int32(0xFFF) + odd) & np.int32(~0x1FFF))
        rounded = np.int32(bits).view(np.float32)
        rounded = rounded if rounded < np.float32(65520) else np.float32(np.inf)
    return np.float32(np.copysign(np.float32(rounded), value))


@kernel
def to_bfloat16(value):
    """The float32 that is left of a finite one after it was stored as bfloat16, ties to even."""
    bits = np.float32(value).view(np.int32)
    odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
    return np.int32(np.int32(bits + np.int32(0x7FFF) + odd) & np.int32(-65536)).view(np.float32)


@kernel
def round_to(values, dtype):
    """Replace each float32 by what is left of it after it was stored."""
    if dtype == BFLOAT16:
        for i in range(len(values)):
            values[i] = to_bfloat16(values[i])
    elif dtype == FLOAT16:
        for i in range(len(values)):
            values[i] = to_half(values[i])


@kernel
def load(stored, dtype, values):
    """Read numbers as float32; infinity for NaN in float16.

    Args:
        stored: float32, or the bits of a 16-bit dtype as uint16.
        dtype: That of the numbers.
        values: float32 like it, the outcome.
    """
    if dtype == FLOAT32:
        for i in range(len(values)):
            values[i] = stored[i]
    elif dtype == BFLOAT16:
        for i in range(len(values)):
            values[i] = np.int32(np.int32(stored[i]) << np.int32(16)).view(np.float32)
    else:
        for i in range(len(values)):
            bits = np.int32(stored[i])
            magnitude = np.int32(bits & np.int32(0x7FFF))
            normal = np.int32(np.int32(magnitude << np.int32(13)) + _BIAS)
            normal = normal if magnitude < _INFINITE_HALF else _INFINITY
            value = np.int32(normal).view(np.float32)
            value = value if magnitude >= np.int32(0x400) else np.float32(magnitude) * _SUBNORMAL_STEP
            values[i] = -value if bits >= np.int32(0x8000) else value


@kernel
def store(values, dtype, stored):
    """Write float32 that :func:`round_to` left, the inverse of :func:`load`; infinity and NaN of float16 excepted."""
    if dtype == FLOAT32:
        for i in range(len(values)):
            stored[i] = values[i]
    elif dtype == BFLOAT16:
        for i in range(len(values)):
            stored[i] = np.uint16(np.uint32(np.float32(values[i]).view(np.uint32)) >> np.uint32(16))
    else:
        for i in range(len(values)):
            bits = np.float32(values[i]).view(np.int32)
            magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
            normal = np.int32(np.int32(magnitude - _BIAS) >> np.int32(13))
            whole = np.int32(abs(values[i]) * _HALVES_PER_ONE)
            half = normal if abs(values[i]) >= _SMALLEST_NORMAL else whole
            sign = np.int32(0x8000) if bits < np.int32(0) else np.int32(0)
            stored[i] = np.uint16(half | sign)
