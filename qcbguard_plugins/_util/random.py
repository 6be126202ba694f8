"""Random numbers that depend on a key and a place alone.

Whoever works on a weight, in whatever order, on whatever device, finds the same number for it: the generator has no
state, it encrypts the place. What is defined here in torch is compiled in :mod:`qcbguard_plugins._util.philox`.

References:
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011: Philox4x32 with ten rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins._util.philox_constants import GROUP, KEY_STEPS, LANES, MULTIPLIERS, NUM_ROUNDS

_MASK = 0xFFFFFFFF
# Groups that are worked on at a time; their int64 temporaries stay in a processor's cache.
_GROUPS_PER_RUN = 1 << 10


def seed_digest(seed: int, tensor_name: str) -> bytes:
    """32 bytes for one tensor, from which every generator of it starts.

    They depend on the run's seed and the tensor's name, and on nothing else, so the order of the work changes nothing.
    """
    return hashlib.sha256(f"{seed}:{tensor_name}".encode()).digest()


def philox_key(seed: int, tensor_name: str) -> int:
    """The key of one tensor, of 64 bits: the start of its :func:`seed_digest`."""
    return int.from_bytes(seed_digest(seed, tensor_name)[:8], "little")


def uniform(key: int, first: int, num_draws: int, device: torch.device) -> Tensor:
    """The draws of a run of places.

    Args:
        key: Of 64 bits, from :func:`philox_key`.
        first: The first place, at least 0.
        num_draws: Number of places.
        device: Where the outcome shall be; the same numbers on each.

    Returns:
        float32 ``[num_draws]``, multiples of ``2**-24`` in [0, 1).
    """
    first_group, skipped = divmod(first, GROUP)
    num_groups = -(-(skipped + num_draws) // GROUP)
    fill = _compiled() if device.type == "cpu" else None
    if fill is not None:
        draws = torch.empty(num_groups * GROUP)
        fill(*split_key(key), first_group, draws.numpy())
    else:
        step = _GROUPS_PER_RUN if device.type == "cpu" else num_groups
        runs = [
            philox(key, start, min(step, first_group + num_groups - start), device)
            for start in range(first_group, first_group + num_groups, max(1, step))
        ]
        draws = torch.cat(runs) if runs else torch.empty(0, device=device)
    return draws[skipped : skipped + num_draws]


def philox(key: int, first_group: int, num_groups: int, device: torch.device) -> Tensor:
    """The draws of whole groups: float32 ``[num_groups * GROUP]``."""
    counter = torch.arange(first_group * LANES, (first_group + num_groups) * LANES, device=device)
    words = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    keys = [key & _MASK, key >> 32]
    for _ in range(NUM_ROUNDS):
        # int64 products wrap around; both halves of them are right all the same.
        first, second = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [
            ((second >> 32) & _MASK) ^ words[1] ^ keys[0],
            second & _MASK,
            ((first >> 32) & _MASK) ^ words[3] ^ keys[1],
            first & _MASK,
        ]
        keys = [(key + step) & _MASK for key, step in zip(keys, KEY_STEPS, strict=True)]
    drawn = torch.stack([(word >> 8).view(-1, LANES) for word in words], dim=1)
    return drawn.reshape(-1).float().mul_(2.0**-24)


def split_key(key: int) -> tuple[Any, Any]:
    """The halves of a key as the compiled generator takes them."""
    import numpy as np

    return np.uint32(key & _MASK), np.uint32(key >> 32)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None] | None:
    try:
        from qcbguard_plugins._util.philox import fill_draws
    except ImportError:
        return None
    fill: Callable[..., None] = fill_draws
    return fill
