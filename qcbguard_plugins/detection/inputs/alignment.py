"""The statistic: how far do the rounding errors of a layer add up along a direction of its inputs?

With the rounding error ``E = Q(W) - W`` and a direction ``u``, row ``i`` of the layer changes by ``x_i = (E u)_i``.
Were the signs of the errors random, ``x_i^2`` would be ``m_i = sum_j E_ij^2 u_j^2`` on average, with the variance
``2 (m_i^2 - sum_j E_ij^4 u_j^4)``, and rows would be independent. So ``sum x_i^2 / sum m_i`` is one for errors without
a direction, and its spread is known without drawing a sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Alignment:
    """One error matrix along some directions, all float64 ``[num_directions]``.

    Attributes:
        squared: ``sum_i x_i^2``.
        expected: Its mean under random signs.
        variance: Its variance under random signs.
    """

    squared: Tensor
    expected: Tensor
    variance: Tensor

    @property
    def ratio(self) -> Tensor:
        """About one for errors without a direction; one where a direction is zero or there is no error."""
        return torch.where(self.expected > 0, self.squared / self.expected.clamp(min=1e-300), 1.0)

    @property
    def relative_variance(self) -> Tensor:
        """Variance of :attr:`ratio` under random signs; infinite where there is nothing to see."""
        usable = (self.expected > 0) & (self.variance > 0)
        return torch.where(usable, self.variance / self.expected.square().clamp(min=1e-300), float("inf"))


def alignment(error: Tensor, directions: Tensor) -> Alignment:
    """Measure an error matrix.

    Args:
        error: float32 ``[rows, in_features]``.
        directions: float32 ``[in_features, num_directions]``; their lengths do not matter.
    """
    # Squares and fourth powers of small errors and large inputs leave float32's range unless both have a usual size.
    error = error / error.abs().amax().clamp(min=1e-30)
    directions = directions / directions.abs().amax(0).clamp(min=1e-30)
    moved = error @ directions
    squares, direction_squares = error.square(), directions.square()
    expected = (squares @ direction_squares).double()
    fourth = (squares.square() @ direction_squares.square()).double()
    # Where one input is all there is, the difference is float32's rounding and not a spread.
    spread = expected.square() - fourth
    variance = 2 * spread.where(spread > _ROUNDING * expected.square(), 0.0)
    return Alignment(moved.double().square().sum(0), expected.sum(0), variance.sum(0))
