"""The constants of Philox4x32-10, which the torch form and the compiled form share.

References:
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

# The generator's constants, from the paper.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10

#: Counters that are encrypted side by side. Each gives four numbers: of a group of ``4 * LANES`` places, number ``i``
#: comes from counter ``i % LANES`` and is word ``i // LANES`` of what that becomes.
LANES = 16
GROUP = 4 * LANES
