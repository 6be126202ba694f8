"""How kernels are compiled, and kept for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function; no operation may be contracted or reordered, and it may run beside others."""
    return _compile(function)


def statistic(function: Callable[..., Any]) -> Any:
    """Compile a function whose sums may be taken in any order."""
    return _compile(function, fastmath={"reassoc", "nsz"})


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # There is no folder that the outcome could be kept in, so every process compiles it for itself.
        return numba.njit(**options)(function)
