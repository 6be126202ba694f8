"""The width of a dither, chosen by itself.

Three rules, of which the widest answer counts. The first needs nothing but the weights and leaves an attacker no test
to pass; the second spends what plain rounding would have spent; the third is for models that look attacked.

1. *Floor*: the mean error keeps at most a given share of plain rounding's own error, the attack included. A box that
   was tightened against narrow dithers raises this floor by itself, because its weights lie where those do nothing.
2. *Budget*: the dither is as wide as it can be while the layer's output stays closer to full precision than plain
   rounding leaves it.
3. *Precaution*: where the weight tests saw an attack in the model, nobody looked, or several formats share the outcome,
   rounding is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Half-widths in steps that are tried, narrowest first. At the last one rounding is unbiased.
WIDTHS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5)

#: Largest share of plain rounding's error that the mean error may keep. A dither of half-width 0.25 keeps 3/8 where
#: weights lie anywhere in their cells.
MAX_RETAINED = 0.45

#: Largest error of the layer's output, as a share of plain rounding's. What is left below one is for the inputs of use,
#: which are not those of calibration.
BUDGET = 0.45

#: Damping of the Hessian by which outputs are judged, as a share of its mean diagonal, for the same reason.
JUDGING_DAMPING = 0.1


@dataclass(frozen=True)
class Width:
    """A width and why it is no narrower: ``precaution`` (rule 3), ``budget`` or ``floor``."""

    value: float
    because: str


def retained_share(position: Tensor, error: Tensor, step: Tensor, width: float) -> float:
    """How much of plain rounding's error is left in the mean over a dither's draws.

    Args:
        position: Places between the neighbours, in [0, 1].
        error: Plain rounding's errors, same shape.
        step: Distance of the neighbours, same shape; 0 where a weight has no choice.
        width: Half-width of the dither in steps, above 0.

    Returns:
        The mean dithered error along plain rounding's error over that error's energy: 1 for plain rounding, 0 for
        unbiased rounding, and 0 where there is no error.
    """
    error = error.masked_fill(step == 0, 0.0)
    energy = float(error.double().square().sum())
    if energy == 0.0:
        return 0.0
    up = ((position - 0.5) / (2 * width) + 0.5).clamp_(0, 1)
    return float(((up - position) * step * error).double().sum()) / energy


def choose_width(costs: list[float], plain_cost: float, retained: list[float]) -> Width:
    """Weigh floor and budget.

    Args:
        costs: Error of the layer's output at each of :data:`WIDTHS`, or at the first of them.
        plain_cost: The same for plain rounding.
        retained: :func:`retained_share` at each of :data:`WIDTHS`.
    """
    floor = next((i for i, share in enumerate(retained) if share <= MAX_RETAINED), len(WIDTHS) - 1)
    affordable = max((i for i, cost in enumerate(costs) if cost <= BUDGET * plain_cost), default=0)
    return Width(WIDTHS[max(floor, affordable)], "budget" if affordable > floor else "floor")


def quadratic_cost(error: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of each row, ``diag(E H E^T)``: float32 ``[..., num_rows, 1]``."""
    return ((error @ hessian) * error).sum(dim=-1, keepdim=True)


def damped(hessian: Tensor, share: float) -> Tensor:
    """A copy of the Hessian with a share of its mean diagonal added to the diagonal."""
    result = hessian.clone()
    result.diagonal().add_(share * float(hessian.diagonal().mean()))
    return torch.as_tensor(result)
