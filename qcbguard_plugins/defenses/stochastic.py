"""Stochastic rounding: unbiased, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcbguard_plugins.defenses.base import ChoiceContext, Defense, register_defense, round_up_where
from qcbguard_plugins.grids.base import Lattice


@register_defense("stochastic", "unbiased rounding at random, no data needed")
@dataclass(frozen=True)
class Stochastic(Defense):
    """Round up with probability equal to the position between the neighbours.

    The expected stored weight is then the full-precision weight, so the mean rounding error along any direction,
    an attacker's included, is zero.

    References:
        Gupta et al., Deep Learning with Limited Numerical Precision, arXiv 1502.02551, section 3.1.
    """

    is_random: ClassVar[bool] = True
    is_stochastic_rounding: ClassVar[bool] = True

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        position = lattice.position
        return round_up_where(lattice, position > context.draws(position))
