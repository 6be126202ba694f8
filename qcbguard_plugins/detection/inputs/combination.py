"""From layers' alignments to one p-value a format.

Two nulls must both be refuted. *Random signs*: given the sizes of its errors, every row of every layer is independent
of every other, also between layers that read the same input (what they share is the direction, which is given), so the
variance of any weighted mean is the sum of known variances. *Neighbouring grids*: a clean layer's errors may add up a
little along its inputs, or cancel, for reasons of its own; then they do so on the neighbours too. The larger of the two
p-values counts.

Each direction is tested on all layers together and block by block, for an attack may sit in few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.detection.weights.combination import holm

# Weight of the known variance, in draws, when the neighbours' spread is estimated from few of them.
_PRIOR_DRAWS = 8
_SMALLEST_P = 1e-300

#: Smallest excess of a finding: over all layers, and in one block. Below it lie details of a grid that harm nobody.
FLOOR, BLOCK_FLOOR = 0.012, 0.06


@dataclass(frozen=True)
class Excess:
    """One direction on some layers.

    Attributes:
        ratio: Weighted mean over the layers of the errors' energy along the direction, over that of random signs.
        neighbours: The same on the neighbouring grids, their mean.
        deviations: Distance from the nearer of the two nulls, in standard deviations; negative below it.
        p_signs: One-sided p-value against random signs.
        p_neighbours: The same against the neighbouring grids.
    """

    ratio: float
    neighbours: float
    deviations: float
    p_signs: float
    p_neighbours: float

    @property
    def size(self) -> float:
        """How much of the energy is too much, as a share, against the stricter null."""
        return self.ratio - max(1.0, self.neighbours)

    @property
    def p_value(self) -> float:
        return max(self.p_signs, self.p_neighbours)


@dataclass(frozen=True)
class DirectionResult:
    """One direction on a whole model.

    Attributes:
        whole: On all layers.
        blocks: On the layers of each block.
        block_p: p-values of the blocks, by Holm.
    """

    whole: Excess
    blocks: tuple[Excess, ...]
    block_p: tuple[float, ...]

    @property
    def p_value(self) -> float:
        """Of the direction: the smaller of the whole's and the blocks', doubled; 1 where effects are too small."""
        found = [self.whole.p_value] if self.whole.size >= FLOOR else []
        found += [p for p, block in zip(self.block_p, self.blocks, strict=True) if block.size >= BLOCK_FLOOR]
        return min(1.0, 2 * min(found, default=1.0))


def combine_directions(
    ratios: Tensor, variances: Tensor, neighbour_variances: Tensor, blocks: Sequence[int]
) -> list[DirectionResult]:
    """Test every direction.

    Args:
        ratios: float64 ``[num_layers, 1 + num_neighbours, num_directions]``, the exact grid first.
        variances: float64 ``[num_layers, num_directions]`` of the exact grid's ratios under random signs; infinite
            where a direction shows nothing of a layer.
        neighbour_variances: float64 ``[num_layers, num_directions]``, of one neighbour's.
        blocks: Number of the block of each layer; -1 for none.
    """
    every = torch.arange(ratios.shape[0])
    number = torch.tensor(list(blocks))
    groups = [every[number == block] for block in sorted({block for block in blocks if block >= 0})]
    results = []
    for d in range(ratios.shape[2]):

        def tested(layers: Tensor, d: int = d) -> Excess:
            return _excess(ratios[layers, :, d], variances[layers, d], neighbour_variances[layers, d])

        of_blocks = [tested(layers) for layers in groups]
        adjusted = holm([block.p_value for block in of_blocks])
        results.append(DirectionResult(tested(every), tuple(of_blocks), tuple(adjusted)))
    return results


def _excess(ratios: Tensor, variances: Tensor, neighbour_variances: Tensor) -> Excess:
    weights = torch.where(torch.isfinite(variances), 1 / variances, 0.0)
    total = float(weights.sum())
    if total == 0:
        return Excess(1.0, 1.0, 0.0, 1.0, 1.0)
    means = (weights[:, None] * ratios).sum(0) / total
    own_variance = 1 / total
    usable = torch.isfinite(neighbour_variances)
    known = float((weights[usable].square() * neighbour_variances[usable]).sum()) / total**2
    ratio, neighbours = float(means[0]), means[1:]
    num_draws = neighbours.numel()
    # Neighbours that round alike spread less than they would beside the exact grid: the known variance is the least.
    spread = ((num_draws - 1) * float(neighbours.var()) + _PRIOR_DRAWS * known) / (num_draws - 1 + _PRIOR_DRAWS)
    against_signs = (ratio - 1) / math.sqrt(own_variance)
    against_neighbours = (ratio - float(neighbours.mean())) / math.sqrt(
        own_variance * max(1.0, spread / known) + max(spread, known) / num_draws
    )
    return Excess(
        ratio,
        float(neighbours.mean()),
        min(against_signs, against_neighbours),
        _normal_p(against_signs),
        _t_p(against_neighbours, num_draws - 1 + _PRIOR_DRAWS),
    )


def _normal_p(deviations: float) -> float:
    return max(0.5 * math.erfc(deviations / math.sqrt(2)), _SMALLEST_P)


def _t_p(deviations: float, freedom: int) -> float:
    from scipy.special import stdtr

    return max(float(stdtr(freedom, -deviations)), _SMALLEST_P)
