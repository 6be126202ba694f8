"""From many tensors' evidence to one p-value a test and format, and from those to a verdict.

Two kinds of attack need two kinds of sum. One that touches every tensor a little shows in the mean over tensors,
compared with the same mean on each neighbouring grid; whatever tensors have in common (a storage dtype, a grid of their
own) moves those means alike, so no independence between tensors is assumed. One that sits in few tensors shows in the
largest of them, corrected for their number. The smaller of the two p-values counts, doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Weight of the spread that all tensors share, in draws, when one tensor's own spread is estimated from few draws
# (moderated t-statistic: Smyth, Statistical Applications in Genetics and Molecular Biology 3 (2004)).
_PRIOR_DRAWS = 8

# Spreads below this (in log units) are rounding noise of the statistic itself.
_SMALLEST_SPREAD = 1e-3
_SMALLEST_P = 1e-300


@dataclass(frozen=True)
class Combined:
    """One test on one format.

    Attributes:
        effect: Mean over tensors of the log statistic's excess over the neighbours; ``exp(effect) - 1`` as a share.
        p_mean: p-value of that mean.
        effects: The excess of each tensor.
        p_values: p-value of each tensor by itself.
        adjusted: The same, corrected by Holm for the number of tensors.
    """

    effect: float
    p_mean: float
    effects: tuple[float, ...]
    p_values: tuple[float, ...]
    adjusted: tuple[float, ...]

    @property
    def p_value(self) -> float:
        """p-value of the test: the smaller of the mean's and the largest tensor's, doubled."""
        return min(1.0, 2 * min(self.p_mean, min(self.adjusted, default=1.0)))


@dataclass(frozen=True)
class Excess:
    """How far the exact grid stands out, without a p-value.

    Attributes:
        mean: Mean over tensors of the log statistic's excess over the neighbours.
        deviations: The same in standard deviations of the neighbours' means (a t-statistic).
        of_tensors: The excess of each tensor.
    """

    mean: float
    deviations: float
    of_tensors: tuple[float, ...]


def excess(statistics: Tensor) -> Excess:
    """Compare the exact grid with its neighbours; argument as :func:`combine`, at least one tensor."""
    logs = _logs(statistics)
    neighbours = logs[:, 1:]
    effects = logs[:, 0] - neighbours.mean(1)
    mean, spread = float(effects.mean()), float(neighbours.mean(0).std())
    return Excess(mean, _deviations(mean, spread, neighbours.shape[1]), tuple(effects.tolist()))


def combine(statistics: Tensor) -> Combined:
    """Compare tensors' statistics on the exact grid with those on its neighbours.

    Args:
        statistics: float64 ``[num_tensors, 1 + num_neighbours]`` of positive numbers, the exact grid first; large is
            suspicious. Column k belongs to the same neighbouring grid in every row.

    Returns:
        Effects and p-values; those of no tensors are 0 and 1.
    """
    if statistics.shape[0] == 0:
        return Combined(0.0, 1.0, (), (), ())
    found = excess(statistics)
    neighbours = _logs(statistics)[:, 1:]
    num_draws = neighbours.shape[1]
    p_mean = _p_value(found.deviations, num_draws - 1)
    own = neighbours.var(1)
    shared = float(own.median())
    spread = ((num_draws - 1) * own + _PRIOR_DRAWS * shared) / (num_draws - 1 + _PRIOR_DRAWS)
    p_values = [
        _p_value(_deviations(e, s, num_draws), num_draws - 1 + _PRIOR_DRAWS)
        for e, s in zip(found.of_tensors, spread.sqrt().tolist(), strict=True)
    ]
    return Combined(found.mean, p_mean, found.of_tensors, tuple(p_values), tuple(holm(p_values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, Holm's way: the family-wise error stays below each returned value."""
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _logs(statistics: Tensor) -> Tensor:
    return statistics.double().clamp(min=1e-12).log()


def _deviations(excess: float, spread: float, num_draws: int) -> float:
    """One new draw's distance from the mean of ``num_draws``, in standard deviations of that distance."""
    return float(excess / (max(spread, _SMALLEST_SPREAD) * (1 + 1 / num_draws) ** 0.5))


def _p_value(deviations: float, freedom: int) -> float:
    """One-sided p-value of a t-statistic."""
    from scipy.special import stdtr

    return max(float(stdtr(freedom, -deviations)), _SMALLEST_P)
