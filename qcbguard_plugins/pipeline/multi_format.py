"""One weight for several quantizers.

The choice is made on the coarsest grid, and every other quantizer rounds the outcome once more. It is served too if
what it stores no longer follows its own rounding error of the original weight: that error is the direction in which an
attacker hides a backdoor. The coarsest comes first because its choices move a weight across many steps of a finer grid,
where its place between two levels is as good as random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.rounding.digests import combined_digest
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight

# Share of the original rounding error that may be left, where plain rounding has 1 and unbiased rounding 0, and the
# number of standard deviations by which a random choice may miss it.
_MAX_ERROR_LEFT = 0.1
_DEVIATIONS = 4


def coarsest_first(weight: Tensor, grids: Sequence[Grid]) -> list[Grid]:
    """Sort grids by their rounding error of a weight, the largest first."""
    if len(grids) == 1:
        return list(grids)

    def rounding_error(grid: Grid) -> float:
        return float((grid.stored_values(weight) - grid.read(weight)).square().sum())

    return sorted(grids, key=rounding_error, reverse=True)


def require_all_grids(weight: Tensor, guarded: GuardedWeight, grids: Sequence[Grid], name: str) -> GuardedWeight:
    """Check a weight that was guarded on the first of several grids on the others.

    Args:
        weight: ``[out_features, in_features]``, the original as the quantizers read it.
        guarded: The outcome on the first grid.
        grids: All grids.
        name: Name of the tensor.

    Returns:
        The guarded weight, its digest covering all grids.

    Raises:
        UnguardableError: Another quantizer would keep too much of its own rounding error of the original.
    """
    if len(grids) == 1:
        return guarded
    digests = {grids[0].name: guarded.digest}
    for grid in grids[1:]:
        for left, deviation in errors_left(weight, guarded.weight, grid):
            if abs(left) > _MAX_ERROR_LEFT + _DEVIATIONS * deviation:
                raise UnguardableError(
                    f"{name} cannot be guarded for {grids[0].name} and {grid.name} at once: guarded for the first, the "
                    f"second would keep {left:.0%} of its rounding error",
                    remedy="Guard once for each format.",
                )
        digests[grid.name] = backend_of(grid.name).stored_digest(guarded.weight, grid)
    return replace(guarded, digest=combined_digest(digests))


def errors_left(weight: Tensor, guarded: Tensor, grid: Grid) -> list[tuple[float, float]]:
    """How much of its rounding error of the original a quantizer keeps on the guarded weight.

    The original error is looked for in all that changes, and again in the quantizer's own rounding of the guarded
    weight: beside a much coarser first grid it would be lost in the noise of the former.

    Returns:
        Two pairs ``(share, standard_error)``: how much of the original rounding error is left in the total change, and
        how much in the quantizer's own rounding.
    """
    original, offered = grid.read(weight), grid.read(guarded)
    error = grid.stored_values(weight) - original
    energy = float(error.square().sum())
    if energy == 0:
        return []
    stored = grid.stored_values(guarded)
    return [
        (float((error * change).sum()) / energy, (float(change.square().sum()) / energy / weight.numel()) ** 0.5)
        for change in (stored - original, stored - offered)
    ]
