"""What this process holds in memory and could hold."""

from __future__ import annotations

import psutil
from pydantic import ByteSize

from qcbguard_plugins.errors import MemoryBudgetError


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Memory that this process could hold: what it has and what the machine has left."""
    return int(psutil.virtual_memory().available) + resident_bytes()


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it above one."""
    return ByteSize(count).human_readable(separator=" ")


def budget_or_available(budget_bytes: int | None) -> int:
    """A budget in bytes: the user's, or what this process could hold."""
    return available_bytes() if budget_bytes is None else budget_bytes


def require_room(
    peak: int,
    budget_bytes: int | None,
    why: str,
    remedy: str = "Raise --max-memory or free some; --method stochastic needs least.",
) -> None:
    """Refuse a run that does not fit.

    Args:
        peak: What the process will hold at its peak, in bytes.
        budget_bytes: What it may hold; by default what the machine has left.
        why: What needs that much.
        remedy: What the user can do.

    Raises:
        MemoryBudgetError: It needs more.
    """
    budget = budget_or_available(budget_bytes)
    if peak <= budget:
        return
    limit = "--max-memory" if budget_bytes is not None else "the memory that is left"
    raise MemoryBudgetError(
        f"this run needs about {human_bytes(peak)} of memory, and {limit} is {human_bytes(budget)}: {why}",
        remedy=remedy,
    )
