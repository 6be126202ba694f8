"""QVec: step away from the quantization error before rounding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qcbguard_plugins.defenses.base import ChoiceContext, Defense, register_defense, require_range, round_up_where
from qcbguard_plugins.grids.base import Lattice


@register_defense("qvec", "step against the rounding error, no data needed (baseline)")
@dataclass(frozen=True)
class QVec(Defense):
    """Round ``W - strength * (Q(W) - W)`` instead of ``W``.

    Attributes:
        strength: The paper's lambda, in [0, 1]. A weight flips when its error exceeds ``1 / (2 + 2 * strength)`` steps.

    References:
        QVec, arXiv 2606.20254.
    """

    strength: float = 0.25

    def __post_init__(self) -> None:
        require_range(self.strength, 0.0, 1.0, "qvec: strength")

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        position = lattice.position
        stepped = position + self.strength * (position - lattice.upper_is_nearest.float())
        return round_up_where(lattice, stepped > 0.5)
