"""Stochastic rounding: unbiased, without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, register_defense
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

    def choose(self, lattice: Lattice, evidence: Evidence) -> Tensor:
        # The lower neighbour where the position is below the draw, the upper one elsewhere.
        coordinate = lattice.coordinate
        return (coordinate - evidence.uniform(coordinate)).ceil_().to(torch.uint8)
