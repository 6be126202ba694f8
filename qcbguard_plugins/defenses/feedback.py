"""Dithered error feedback on the stock quantizer's grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import (
    ChoiceContext,
    Defense,
    hessian_operations,
    register_defense,
    require_range,
    require_whole,
)
from qcbguard_plugins.defenses.dither_width import (
    BUDGET,
    JUDGING_DAMPING,
    WIDTHS,
    Width,
    choose_width,
    damped,
    quadratic_cost,
    retained_share,
)
from qcbguard_plugins.errors import CalibrationError, UsageError
from qcbguard_plugins.grids.base import Lattice

AUTO = "auto"
_COLUMNS_PER_BATCH = 128
_DAMPING_ATTEMPTS = 4
# Draws of a row that are compared where rounding need not be unbiased.
_COMPARED_DRAWS = 4
# Weights whose draws are made at a time; on a GPU every column costs a fixed time for each run.
_WEIGHTS_PER_RUN, _WEIGHTS_PER_GPU_RUN = 1 << 19, 1 << 24
# Rows on which widths are tried. They are drawn at random: an attacker who knew them could prepare them.
_TRIAL_ROWS = 64


@register_defense("feedback", "random rounding with error feedback, needs a forward pass (default)")
@dataclass(frozen=True)
class Feedback(Defense):
    """Round column by column at random, and spread each error over the columns still to come.

    Each column is rounded on the stock grid, its scales fixed, with probability
    ``clip(1/2 + (position - 1/2) / (2 * width), 0, 1)`` of rounding up. The error is compensated in the later columns
    through the inverse Hessian of the layer's inputs, which minimises the change of the layer's output. At ``width``
    1/2 rounding is unbiased; at 0 it is plain rounding with feedback. Columns with the largest inputs come first. Rows
    do not depend on each other.

    Several candidate roundings (draws) of each row are kept side by side. At every column they together round up as
    often as independent coins would, but those round up whose weight is closest to the upper level. Their differences
    act as the noise, so little extra noise is needed. At ``width`` 1/2 one of them is kept at random, else the best of
    some.

    Attributes:
        width: Half-width of the dither in steps, in [0, 0.5]; ``"auto"`` chooses it for each tensor, see
            :mod:`qcbguard_plugins.defenses.dither_width`: 1/2 where the weight tests saw an attack, or nobody looked.
        draws: Number of draws for each row, at least 1. More take more time and stay nearer to full precision.
        damp_percent: Damping of the Hessian, as a share of its mean diagonal, in (0, 1].

    References:
        GPTQ, arXiv 2210.17323, Algorithm 1 (the feedback); QuIP, arXiv 2307.13304, section 3 (linear feedback with
        stochastic rounding).
    """

    needs_calibration: ClassVar[bool] = True
    is_random: ClassVar[bool] = True

    width: float | str = AUTO
    draws: int = 8
    damp_percent: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.width, str) and self.width != AUTO:
            raise UsageError(f"feedback: width must be {AUTO} or lie between 0 and 0.5, got {self.width!r}")
        if not isinstance(self.width, str):
            require_range(self.width, 0.0, 0.5, "feedback: width")
        require_whole(self.draws, 1, "feedback: draws")
        require_range(self.damp_percent, 1e-8, 1.0, "feedback: damp_percent")

    @property
    def weighs_evidence(self) -> bool:
        return self.width == AUTO

    def operations(self, shape: tuple[int, int], num_sequences: int, sequence_length: int) -> float:
        rows, columns = shape
        return hessian_operations(columns, num_sequences * sequence_length) + self.draws * 4.0 * rows * columns**2

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        if context.hessian is None:
            raise CalibrationError("feedback needs the inputs of the layer, and none were gathered")
        order = context.hessian.diagonal().argsort(descending=True, stable=True)
        hessian = context.hessian[order][:, order]
        factor, damp_percent = inverse_hessian_factor(hessian, self.damp_percent)
        if damp_percent != self.damp_percent:
            context.chosen["damp_percent"] = damp_percent
        problem = _Problem(lattice, order, factor)
        width = self._choose_width(problem, hessian, context)
        uniform = context.uniform(problem.weight)
        lots = context.uniform(problem.weight.new_empty(self.draws, len(uniform)))
        # A choice among unbiased draws would prefer those that plain rounding is like.
        num_compared = 1 if width == WIDTHS[-1] else _COMPARED_DRAWS
        codes = torch.empty_like(uniform, dtype=torch.uint8)
        for run in problem.runs():
            part = problem.rows(run)
            drawn = part.round(uniform[run], width, self.draws)
            codes[run] = part.least_costly(drawn, lots[:, run].argsort(dim=0)[:num_compared], hessian)
        return lattice.from_matrix(codes[:, order.argsort()])

    def _choose_width(self, problem: _Problem, hessian: Tensor, context: ChoiceContext) -> float:
        if isinstance(self.width, (int, float)):
            return self.width
        width = (
            Width(WIDTHS[-1], "precaution")
            if context.looks_attacked
            else _affordable_width(problem, hessian, context, self.draws)
        )
        context.chosen.update(width=width.value, because=width.because)
        return width.value


def _affordable_width(problem: _Problem, hessian: Tensor, context: ChoiceContext, num_draws: int) -> Width:
    """Try widths on some rows, with the same random numbers, up to the first that costs too much."""
    num_rows = problem.weight.shape[0]
    rows = torch.from_numpy(context.rng.permutation(num_rows)[:_TRIAL_ROWS]).to(problem.weight.device)
    trial = problem.rows(rows)
    judged_by = damped(hessian, JUDGING_DAMPING)
    position, error, step = trial.plain_rounding()
    uniform = context.uniform(trial.weight)
    plain_cost = float(quadratic_cost(error, judged_by).sum())
    costs: list[float] = []
    for width in WIDTHS:
        errors = trial.points(trial.round(uniform, width, num_draws)) - trial.weight
        costs.append(float(quadratic_cost(errors, judged_by).sum()) / num_draws)
        if costs[-1] > BUDGET * plain_cost:
            break
    return choose_width(costs, plain_cost, [retained_share(position, error, step, width) for width in WIDTHS])


class _Problem:
    """One weight with its columns in the order in which they are rounded.

    Attributes:
        weight: float32 ``[out_features, in_features]``, less the offsets of the grid, which no choice changes.
    """

    def __init__(self, lattice: Lattice, order: Tensor, factor: Tensor) -> None:
        self._grid = lattice.grid
        self._factor = factor
        offset = 0.0 if lattice.offset is None else lattice.offset
        self.weight = lattice.matrix(lattice.blocks - offset)[:, order]
        self._kept = lattice.matrix(lattice.kept - offset)[:, order]
        self._scale = lattice.matrix(lattice.scale)[:, order]
        self._frozen = lattice.matrix(lattice.frozen)[:, order]
        self._nearest = lattice.matrix(lattice.nearest)[:, order]

    def runs(self) -> list[slice]:
        """The rows, some at a time, so that all draws of them take little memory."""
        num_rows, num_columns = self.weight.shape
        size = _WEIGHTS_PER_RUN if self.weight.device.type == "cpu" else _WEIGHTS_PER_GPU_RUN
        step = max(1, size // num_columns)
        return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]

    def rows(self, index: Tensor | slice) -> _Problem:
        """Some of the rows."""
        part = copy.copy(self)
        part.weight, part._kept, part._scale = self.weight[index], self._kept[index], self._scale[index]
        part._frozen, part._nearest = self._frozen[index], self._nearest[index]
        return part

    def plain_rounding(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every weight its position, plain rounding's error and the step; the last two are 0 where it is frozen."""
        inverse_scale = torch.where(self._scale != 0, self._scale.reciprocal(), torch.zeros_like(self._scale))
        coordinate = self._grid.coordinate(self.weight * inverse_scale)
        lower = coordinate.floor().clamp_(max=self._grid.num_levels - 2)
        step = self._grid.level_values(lower + 1).sub_(self._grid.level_values(lower)).mul_(self._scale)
        error = self.points(self._nearest) - self.weight
        return coordinate - lower, error, step.masked_fill_(self._frozen, 0.0)

    def points(self, codes: Tensor) -> Tensor:
        """The guarded weight that has these codes."""
        return torch.where(self._frozen, self._kept, self._grid.level_values(codes) * self._scale)

    def least_costly(self, codes: Tensor, contenders: Tensor, hessian: Tensor) -> Tensor:
        """Of each row the draw that changes its output least.

        Args:
            codes: uint8 ``[num_draws, out_features, in_features]``.
            contenders: int64 ``[num_contenders, out_features]``, numbers of the draws that are compared.
            hessian: ``[in_features, in_features]``, in the order of the columns.

        Returns:
            uint8 ``[out_features, in_features]``.
        """
        every_row = torch.arange(codes.shape[1], device=codes.device)
        compared = codes[contenders, every_row]
        if len(compared) == 1:
            return compared[0]
        return compared[quadratic_cost(self.points(compared) - self.weight, hessian)[..., 0].argmin(dim=0), every_row]

    def round(self, uniform: Tensor, width: float, num_draws: int) -> Tensor:
        """Codes of several candidate roundings, chosen together.

        The draws of a row differ by the errors that they have compensated. Together they round up as often as
        independent coins would, but those round up whose weight is closest to the upper level.

        Args:
            uniform: float32 ``[out_features, in_features]``, one random number in [0, 1) for all draws of a weight.
            width: Half-width of the dither in steps.
            num_draws: Number of draws.

        Returns:
            uint8 ``[num_draws, out_features, in_features]``. The mean of a weight over all its draws is random; that
            of the errors, at ``width`` 1/2 and conditional on all columns before, is zero.
        """
        # A dither without width is a step of the probability, and this is steep enough for one.
        gain = 1 / (2 * width) if width else float(torch.finfo(torch.float32).max)
        pending = self.weight.repeat(num_draws, 1, 1)
        codes = torch.empty(pending.shape, dtype=torch.uint8, device=pending.device)
        num_columns = pending.shape[2]
        for start in range(0, num_columns, _COLUMNS_PER_BATCH):
            columns = slice(start, min(start + _COLUMNS_PER_BATCH, num_columns))
            codes[..., columns], errors = self._round_batch(columns, pending[..., columns], uniform[:, columns], gain)
            pending[..., columns.stop :] -= errors @ self._factor[columns, columns.stop :]
        return torch.where(self._frozen, self._nearest, codes)

    def _round_batch(self, columns: slice, pending: Tensor, uniform: Tensor, gain: float) -> tuple[Tensor, Tensor]:
        """Round one batch of columns; return codes, and errors, each over its pivot, for the columns behind."""
        compiled = _load_kernel() if pending.device.type == "cpu" else None
        kept, scale, frozen = self._kept[:, columns], self._scale[:, columns], self._frozen[:, columns]
        within = self._factor[columns, columns]
        if compiled is not None:
            return compiled(
                pending, kept, scale, frozen, uniform, gain, within, self._grid.levels, self._grid.coordinate_table
            )
        # With the columns first, each of them is contiguous, and every step below works on one.
        weight = pending.permute(2, 0, 1).contiguous()
        kept, frozen, uniform = kept.T, frozen.T, uniform.T
        scale = scale.T.contiguous()
        inverse_scale = torch.where(scale != 0, scale.reciprocal(), torch.zeros_like(scale))
        errors = torch.empty_like(weight)
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for i in range(len(weight)):
            coordinate = self._grid.coordinate(weight[i] * inverse_scale[i])
            lower = coordinate.floor().clamp_(max=self._grid.num_levels - 2)
            cell = self._grid.level_values(lower + 1) - self._grid.level_values(lower)
            codes[i] = lower + _goes_up(coordinate - lower, cell, uniform[i], gain)
            rounded = torch.where(frozen[i], kept[i], self._grid.level_values(codes[i]) * scale[i])
            errors[i] = (weight[i] - rounded) / within[i, i]
            weight[i + 1 :] -= within[i, i + 1 :, None, None] * errors[i]
        return codes.permute(1, 2, 0), errors.permute(1, 2, 0)


def _goes_up(position: Tensor, cell: Tensor, uniform: Tensor, gain: float) -> Tensor:
    """Which draws of one column round up.

    Each brings the share of its cell that it would round up by on average. What they bring is handed out again, a whole
    cell at a time, to those with the highest position first, the last one by chance.

    Args:
        position: float32 ``[num_draws, out_features]``, places between the neighbours, in [0, 1].
        cell: float32 like it, distances of the neighbours.
        uniform: float32 ``[out_features]``.
        gain: One over the dither's full width.
    """
    brought = cell * ((position - 0.5) * gain + 0.5).clamp_(0, 1)
    total = torch.zeros_like(uniform)
    for share in brought:
        total = total + share
    first = torch.zeros_like(position)
    for k in range(len(position)):
        higher = position[k] > position
        higher[k + 1 :] |= position[k] == position[k + 1 :]
        first = first + torch.where(higher, cell[k], torch.zeros_like(cell[k]))
    return total - first > uniform * cell


@lru_cache(maxsize=1)
def _load_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The column loop, compiled; ``None`` without numba."""
    try:
        from qcbguard_plugins._kernels.feedback import round_batch
    except ImportError:
        return None
    return round_batch


def inverse_hessian_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Args:
        hessian: ``[in_features, in_features]``, symmetric, positive semidefinite.
        damp_percent: Damping as a share of the mean diagonal; raised tenfold, up to three times, where the
            factorization fails.

    Returns:
        float32 ``[in_features, in_features]``, upper triangular, and the damping that it took.

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
        damping = damp_percent * 10.0**attempt
        damped = hessian.double()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.item():
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item():
            return upper.float(), damping
    raise CalibrationError("the Hessian of a layer cannot be factorized", remedy="Raise damp_percent.")
