"""Rounding as something that can be learned: a weight between its two neighbours, with a variable for the place.

``W* = lower + sigmoid(alpha) * step``, with ``alpha = logit(position)`` at the start, so that ``W* = W``. QuantGuard
trains the variables through the whole model, EFRAP a layer at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcbguard_plugins.grids.base import Lattice

# Positions are kept this far from the neighbours, where the logit is infinite. The start is off by as much.
_MARGIN = 1e-4

_TIE = 1e-5

# A grid with more levels is as fine as INT8, for constants that a paper gives for INT8 and for 4 bits.
_MAX_COARSE_LEVELS = 64


class SoftRounding(nn.Module):
    """The roundings of one weight. Scale holders are no variables: they keep their value, so scales are the stock's.

    Attributes:
        alpha: The variables, float32: ``[out_features, in_features]``, or ``[num_variables]`` where there is a band.
        is_fine: True on a grid as fine as INT8.
        num_weights: Number of weights, variables or not.
    """

    def __init__(self, lattice: Lattice, *, band: float | None = None, harden: bool = False) -> None:
        """Set up the variables.

        Args:
            lattice: Neighbours of the weight.
            band: Only weights whose position is at most this far from 1/2 are variables; ``None`` for all.
            harden: Whether the weight that is seen is rounded, and gradients pass straight through to ``alpha``.
        """
        super().__init__()
        self.harden = harden
        self.is_fine = lattice.grid.num_levels > _MAX_COARSE_LEVELS
        self.num_weights = lattice.shape[0] * lattice.shape[1]
        lower = lattice.dequantize(lattice.lower)
        step = lattice.dequantize(lattice.lower + 1).sub_(lower)
        lower = lattice.matrix(torch.where(lattice.frozen, lattice.kept, lower))
        step = lattice.matrix(step.masked_fill_(lattice.frozen, 0.0))
        position = lattice.matrix(lattice.position).clamp(_MARGIN, 1 - _MARGIN)
        self._plain_up = lattice.matrix(lattice.upper_is_nearest)
        self._index: Tensor | None = None
        self._rest: Tensor | None = None
        up = self._plain_up
        if band is not None:
            others = self._plain_up.float().mul_(step).add_(lower) if harden else lattice.matrix(lattice.blocks)
            inside = ((position - 0.5).abs() <= band) & ~lattice.matrix(lattice.frozen)
            self._index, self._rest = inside.view(-1).nonzero()[:, 0], others.clone()
            lower, step, position, up = lower[inside], step[inside], position[inside], up[inside]
        self._lower, self._step, self._position, self._up = lower, step, position, up.float()
        # On a tie the sign of alpha says where plain rounding goes.
        tie = (position - 0.5).abs() < _TIE
        self.alpha = nn.Parameter(torch.where(tie, _TIE * (2 * self._up - 1), torch.logit(position)))

    @property
    def soft(self) -> Tensor:
        """``sigmoid(alpha)``, in the shape of ``alpha``."""
        return torch.sigmoid(self.alpha)

    def weight(self) -> Tensor:
        """``W*``, or its rounding: float32 ``[out_features, in_features]``, differentiable in ``alpha``."""
        place = self.soft
        if self.harden:
            place = (place > 0.5).float() + place - place.detach()
        values = torch.addcmul(self._lower, place, self._step)
        if self._index is None or self._rest is None:
            return values
        return self._rest.view(-1).index_put((self._index,), values).view(self._rest.shape)

    def change(self) -> Tensor:
        """``W* - W`` of the variables, in the shape of ``alpha``; the rounding's where it is hardened is not meant."""
        return (self.soft - self._position) * self._step

    def reversal_loss(self) -> Tensor:
        """``sum |E| * BCE(sigmoid(alpha), 1 - delta)``: E plain rounding's error, delta 1 where it goes up."""
        return (self._distance * self._step.abs() * self._against_plain()).sum()

    def distance_loss(self) -> Tensor:
        """``sum (1 - E_w) * (W* - W)^2``: E_w the distance to the nearest neighbour, in steps."""
        return ((1 - self._distance) * self.change().square()).sum()

    def softness(self) -> Tensor:
        """``sum (1 - |2 h - 1|^2)`` over the variables that have a choice, ``h = sigmoid(alpha)``."""
        return ((1 - (2 * self.soft - 1).square()) * (self._step != 0)).sum()

    @torch.no_grad()
    def up(self) -> Tensor:
        """Bool ``[out_features, in_features]``: what was learned, true for the upper neighbour."""
        learned = self.alpha > 0
        if self._index is None:
            return learned
        return self._plain_up.view(-1).index_put((self._index,), learned).view(self._plain_up.shape)

    @property
    def _distance(self) -> Tensor:
        return torch.minimum(self._position, 1 - self._position)

    def _against_plain(self) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.alpha, 1 - self._up, reduction="none")
