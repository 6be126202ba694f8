"""Numbers of 16 bits, as the float32 that is left of one after it was stored."""

from __future__ import annotations

import numpy as np

from qcbguard_plugins.kernels.compiler import kernel


@kernel
def to_half(value):
    """The float32 that is left of one after it was stored as float16, ties to even."""
    if np.isnan(value):
        return np.float32(np.nan)
    magnitude = abs(value)
    if magnitude < np.float32(2.0**-14):
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
