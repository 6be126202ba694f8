"""Dithered error feedback on the stock quantizer's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, register_defense, require_range
from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.grids.base import Lattice

_COLUMNS_PER_BATCH = 128
_DAMPING_ATTEMPTS = 4


@register_defense("feedback", "unbiased rounding with error feedback, needs a forward pass (default)")
@dataclass(frozen=True)
class Feedback(Defense):
    """Round column by column at random, and spread each error over the columns still to come.

    Each column is rounded on the stock grid, its scales fixed, with probability
    ``clip(1/2 + (position - 1/2) / (2 * width), 0, 1)`` of rounding up. The error is compensated in the later columns
    through the inverse Hessian of the layer's inputs, which minimises the change of the layer's output. At ``width``
    1/2 rounding is unbiased; at 0 it is plain rounding with feedback.

    Attributes:
        width: Half-width of the dither in steps, in [0, 0.5].
        damp_percent: Damping of the Hessian, as a share of its mean diagonal, in (0, 1].

    References:
        GPTQ, arXiv 2210.17323, Algorithm 1 (the feedback); QuIP, arXiv 2307.13304, section 3 (linear feedback with
        stochastic rounding).
    """

    needs_calibration: ClassVar[bool] = True

    width: float = 0.5
    damp_percent: float = 0.01

    def __post_init__(self) -> None:
        require_range(self.width, 0.0, 0.5, "feedback: width")
        require_range(self.damp_percent, 1e-8, 1.0, "feedback: damp_percent")

    def choose(self, lattice: Lattice, evidence: Evidence) -> Tensor:
        if evidence.hessian is None:
            raise CalibrationError("feedback needs the inputs of the layer, and none were gathered")
        factor = inverse_hessian_factor(evidence.hessian, self.damp_percent)
        weight = lattice.matrix(lattice.blocks).clone()
        codes = lattice.matrix(lattice.nearest).clone()
        dither = self._threshold(evidence.uniform(weight))
        num_columns = weight.shape[1]
        for start in range(0, num_columns, _COLUMNS_PER_BATCH):
            columns = slice(start, min(start + _COLUMNS_PER_BATCH, num_columns))
            errors = self._round_columns(lattice, columns, weight, codes, dither, factor)
            weight[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        return lattice.from_matrix(codes)

    def _threshold(self, uniform: Tensor) -> Tensor:
        """The position above which a weight rounds up."""
        return uniform.sub_(0.5).mul_(2 * self.width).add_(0.5)

    def _round_columns(
        self, lattice: Lattice, columns: slice, weight: Tensor, codes: Tensor, dither: Tensor, factor: Tensor
    ) -> Tensor:
        """Round one batch of columns in place; return the errors, each over its pivot, for the columns behind."""
        grid = lattice.grid
        # Columns become contiguous rows: every step below works on one of them.
        pending = weight[:, columns].T.contiguous()
        kept = lattice.matrix(lattice.kept)[:, columns].T
        scale = lattice.matrix(lattice.scale)[:, columns].T.contiguous()
        inverse_scale = torch.where(scale != 0, scale.reciprocal(), torch.zeros_like(scale))
        offset = scale.new_zeros(1) if lattice.offset is None else lattice.matrix(lattice.offset)[:, columns].T
        offset = offset.expand_as(scale).contiguous()
        frozen = lattice.matrix(lattice.frozen)[:, columns].T
        threshold = dither[:, columns].T.contiguous()
        within = factor[columns, columns]
        errors = torch.empty_like(pending)
        chosen = torch.empty_like(pending, dtype=torch.uint8)
        for i in range(pending.shape[0]):
            coordinate = grid.coordinate((pending[i] - offset[i]) * inverse_scale[i])
            lower = coordinate.floor().clamp_(max=grid.num_levels - 2)
            chosen[i] = (lower + (coordinate - lower > threshold[i])).to(torch.uint8)
            points = grid.level_values(chosen[i]).mul_(scale[i]).add_(offset[i])
            rounded = torch.where(frozen[i], kept[i], points)
            errors[i] = (pending[i] - rounded) / within[i, i]
            pending[i + 1 :] -= within[i, i + 1 :, None] * errors[i]
        codes[:, columns] = torch.where(frozen, codes[:, columns].T, chosen).T
        return errors.T


def inverse_hessian_factor(hessian: Tensor, damp_percent: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Args:
        hessian: ``[in_features, in_features]``, symmetric, positive semidefinite.
        damp_percent: Damping as a share of the mean diagonal; raised tenfold, up to three times, where the
            factorization fails.

    Returns:
        float32 ``[in_features, in_features]``, upper triangular.

    Raises:
        CalibrationError: The Hessian is not finite, is zero, or cannot be factorized at any damping.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    if not torch.isfinite(hessian).all():
        raise CalibrationError("the inputs of a layer hold NaN or infinity, so it cannot be calibrated")
    if mean <= 0:
        raise CalibrationError(
            "no calibration input reached a layer",
            remedy="Use more or other calibration text, or a method that needs none, such as stochastic.",
        )
    for attempt in range(_DAMPING_ATTEMPTS):
        damped = hessian.double()
        damped.diagonal().add_(damp_percent * mean * 10.0**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.item():
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item():
            factor: Tensor = upper.float()
            return factor
    raise CalibrationError("the Hessian of a layer cannot be factorized", remedy="Raise damp_percent.")
