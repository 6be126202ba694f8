"""Every error that the package raises on purpose, each with the exit code of the command line.

Exit codes: 0 clean, 1 finding, 2 error, 3 incomplete, 4 usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

_MAX_LISTED = 20


class QcbguardError(Exception):
    """Base of the package's errors.

    Args:
        summary: What failed, in one line.
        details: One line for each thing concerned, usually ``"tensor name  reason"``.
        remedy: What the user can do next.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, summary: str, *, details: Sequence[str] = (), remedy: str = "") -> None:
        self.summary = summary
        self.details = tuple(details)
        self.remedy = remedy
        lines = [summary, *(f"  - {line}" for line in self.details[:_MAX_LISTED])]
        if len(self.details) > _MAX_LISTED:
            lines.append(f"  ... and {len(self.details) - _MAX_LISTED} more")
        if remedy:
            lines.append(remedy)
        super().__init__("\n".join(lines))


class UsageError(QcbguardError, ValueError):
    """An argument that cannot mean anything: an unknown format or method, a pattern that matches nothing."""

    exit_code = 4


class CheckpointError(QcbguardError):
    """A checkpoint that cannot be read safely: missing, malformed, pickled, or quantized already."""


class TargetExistsError(QcbguardError, FileExistsError):
    """The output exists already; nothing is ever overwritten."""


class CalibrationError(QcbguardError):
    """A method needs calibration and there is no way to get it, or it went wrong."""


class UncalibratableError(CalibrationError):
    """A model that no text goes through, or that breaks on it: a method without data is the best there is for it."""


class PurificationError(QcbguardError):
    """A training of a purification went wrong, or what it gave cannot be stored."""


class MissingDependencyError(QcbguardError, ImportError):
    """An optional backend is not installed, or is too old to be hooked."""


class MemoryBudgetError(QcbguardError):
    """What must be in memory at once is larger than the budget."""


class UnguardableError(QcbguardError):
    """Tensors that the quantizer will read cannot be guarded, so the result would be incomplete."""

    exit_code = 3


class VerificationError(QcbguardError):
    """The stock quantizer stored other codes than planned, or a guarded file was changed."""

    exit_code = 1


class ProcessGroupError(QcbguardError):
    """Another process of a run that several share has ended."""
