"""Scan a model's weights for quantization-conditioned backdoors: open, test tensor by tensor, judge."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.detection.weights.budget import require_room_for_scan
from qcbguard_plugins.detection.weights.measure import MAX_WEIGHTS, measure
from qcbguard_plugins.detection.weights.report import ScanReport
from qcbguard_plugins.detection.weights.verdict import conclude
from qcbguard_plugins.errors import MissingDependencyError, UsageError

DEFAULT_FORMATS = ("nf4", "fp4", "int8")


def scan_model(
    path: Path | str,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    seed: int | None = None,
    max_weights: int = MAX_WEIGHTS,
    progress: Callable[[int], object] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    budget_bytes: int | None = None,
) -> ScanReport:
    """Test a model's weights. Nothing of the model is run, and no class of it is built.

    Args:
        path: Folder with safetensors files, a ``.safetensors`` file or a ``.gguf`` file, in full precision.
        formats: Formats to test for.
        seed: Seed of the random rows and grids; a fresh one by default, so that an attacker cannot know it.
        max_weights: Weights of one tensor that are tested; larger ones are represented by random rows.
        progress: Called with the number of weights of each tensor when it is done.
        group: The processes that share the tensors; each of them gets the report.
        budget_bytes: What one process may hold in memory; by default what the machine has left.

    Returns:
        The report. With the same seed it is the same but for its date and duration, for any number of processes.

    Raises:
        UsageError: A format is unknown or the path names no model.
        CheckpointError: The model cannot be read safely, or holds nothing to test.
        MissingDependencyError: SciPy is not installed.
        MemoryBudgetError: It cannot be done within the budget.
    """
    start = time.monotonic()
    require_scipy()
    if not formats:
        raise UsageError("no format to scan for")
    grids = {name: backend_of(name).representative_grid(name) for name in dict.fromkeys(formats)}
    seed = group.broadcast(secrets.randbits(63) if seed is None else seed)
    source = open_weights(path)
    require_room_for_scan(source, grids.values(), max_weights, budget_bytes)
    measured = measure(source, grids, seed, max_weights, progress, group)
    return conclude(source, measured, seed=seed, elapsed_s=time.monotonic() - start)


def require_scipy() -> None:
    """Refuse to test without SciPy, whose distributions the p-values come from."""
    try:
        import scipy.special  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("scanning needs SciPy", remedy="pip install 'qcbguard-plugins[scan]'") from error
