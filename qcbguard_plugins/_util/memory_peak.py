"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qcbguard_plugins._util.memory import resident_bytes

T = TypeVar("T")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# The kernel sets the high-water mark back to the present size when it is sent this number (proc_pid_clear_refs(5)).
_RESET_HIGH_WATER_MARK = "5"


def with_peak_bytes(work: Callable[[], T]) -> tuple[T, int | None]:
    """Do a piece of work and measure the memory that it adds to the process at its highest.

    Returns:
        The result, and the peak of the resident size less the resident size before; ``None`` where the kernel does not
        tell (anything but Linux).
    """
    _return_freed_memory()
    before = resident_bytes() if _reset() else None
    result = work()
    return result, None if before is None else max(0, peak_bytes() - before)


def peak_bytes() -> int:
    """The most that this process held since it began, or since the mark was set back, in bytes; Linux only.

    psutil does not tell the high-water mark of Linux.
    """
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _return_freed_memory() -> None:
    """Give freed memory back to the system: what is taken from it unseen would not count."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    try:
        _RESET.write_text(_RESET_HIGH_WATER_MARK, encoding="ascii")
    except OSError:
        return False
    return True
