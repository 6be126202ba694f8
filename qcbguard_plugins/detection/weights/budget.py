"""How much memory a scan takes, said before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qcbguard_plugins.checkpoint.weight_source import WeightSource
    from qcbguard_plugins.grids import Grid
from qcbguard_plugins._util.memory import require_room, resident_bytes

# Bytes a weight that is tested for an attack, and the libraries that are loaded for it; a ggml type is searched.
_SCANNED, _SCANNED_ON_GGML = 95.0, 125.0
_SCAN_BYTES, _GGML_SCAN_BYTES = 25 << 20, 60 << 20


def require_room_for_scan(
    source: WeightSource, grids: Iterable[Grid], max_weights: int, budget_bytes: int | None = None
) -> int:
    """Check that the largest tensor of a model can be scanned within a budget.

    Args:
        source: The model.
        grids: Those that it is tested on.
        max_weights: Weights of one tensor that are tested.
        budget_bytes: What the process may hold; by default what the machine has left.

    Returns:
        The peak of its resident memory, in bytes.

    Raises:
        MemoryBudgetError: It cannot.
    """
    largest = max(source.targets, key=lambda target: target.num_bytes)
    tested = min(max_weights, max(target.num_weights for target in source.targets))
    searched = any(grid.stores_scales for grid in grids)
    peak = resident_bytes() + (_GGML_SCAN_BYTES if searched else _SCAN_BYTES)
    peak += largest.num_bytes * (1 + largest.transposed)
    peak += round((_SCANNED_ON_GGML if searched else _SCANNED) * tested)
    why = f"{largest.name} of {largest.num_weights} weights is read in one piece, {tested} weights are tested at once"
    require_room(peak, budget_bytes, why, remedy="Raise --max-memory or free some, or leave --exhaustive out.")
    return peak
