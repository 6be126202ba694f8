"""Dtypes of weights in full precision."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype as reports spell it, such as ``"bfloat16"``; ``"None"`` for one that torch lacks."""
    return str(dtype).removeprefix("torch.")
