"""What this process holds in memory and could hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qcbguard_plugins.errors import MemoryBudgetError

if TYPE_CHECKING:
    pass


_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    return read_status("VmRSS") or 0


def available_bytes() -> int:
    """Memory that this process could hold: what it has and what the machine has left."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    left = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), pages)
    return left + resident_bytes()


def read_status(field: str) -> int | None:
    """A size in ``/proc/self/status``, in bytes; ``None`` where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def budget_or_available(budget_bytes: int | None) -> int:
    return available_bytes() if budget_bytes is None else budget_bytes


def require_room(
    peak: int,
    budget_bytes: int | None,
    why: str,
    remedy: str = "Raise --max-memory or free some; --method stochastic needs least.",
) -> None:
    budget = budget_or_available(budget_bytes)
    if peak <= budget:
        return
    limit = "--max-memory" if budget_bytes is not None else "the memory that is left"
    raise MemoryBudgetError(
        f"this run needs about {human_bytes(peak)} of memory, and {limit} is {human_bytes(budget)}: {why}",
        remedy=remedy,
    )
