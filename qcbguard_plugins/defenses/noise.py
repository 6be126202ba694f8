"""Gaussian noise before rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcbguard_plugins.defenses.base import ChoiceContext, Defense, register_defense, require_range, round_up_where
from qcbguard_plugins.grids.base import Lattice


@register_defense("noise", "Gaussian noise before rounding, no data needed (baseline)")
@dataclass(frozen=True)
class Noise(Defense):
    """Round ``W + N(0, sigma)``, with sigma a share of the step, to one of the two neighbours of ``W``.

    Attributes:
        sigma: Standard deviation in steps (the distance of the two neighbours), in [0, 2].

    References:
        Egashira et al., Exploiting LLM Quantization, arXiv 2405.18137, section 5 (Gaussian noise).
    """

    is_random: ClassVar[bool] = True

    sigma: float = 0.3

    def __post_init__(self) -> None:
        require_range(self.sigma, 0.0, 2.0, "noise: sigma")

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        position = lattice.position
        return round_up_where(lattice, context.normal(position).mul_(self.sigma).add_(position) > 0.5)
