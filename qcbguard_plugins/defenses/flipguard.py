"""FlipGuard: flip the codes with the largest rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, register_defense, require_range, round_up_where
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import Grid, Lattice

AUTO = "auto"

# Midpoints of the ranges that the paper reports for its models. It has no GGUF type: those take the share of NF4 up to
# 6 bits and of INT8 above.
_PAPER_SHARES = {"int8": 0.15, "fp4": 0.08, "nf4": 0.115}
_MAX_LEVELS_AS_NF4 = 64


@register_defense("flipguard", "flip the codes with the largest errors of each block, no data needed")
@dataclass(frozen=True)
class FlipGuard(Defense):
    """Give the other of its two neighbours to the share of each block with the largest scaled rounding error.

    The other neighbour is the other end of the cell that holds the weight. It is not always the second nearest level,
    because cells of a codebook differ in width.

    Attributes:
        share: Share of each block to flip, in [0, 1]; ``None`` takes the middle of the paper's range for the format,
            and ``"auto"`` flips in each block as many as make the new rounding error orthogonal to the old one.
            For weights anywhere in their cells that is 18 %: there ``1 - 2a`` with ``a^2 = 1/6``, because a flip of an
            error ``u`` takes ``u`` steps off the product of the two errors, which starts at their energy of 1/12.

    References:
        FlipGuard, arXiv 2606.28962, Algorithm 1.
    """

    share: float | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.share, str) and self.share != AUTO:
            raise UsageError(f"flipguard: share must be {AUTO} or lie between 0 and 1, got {self.share!r}")
        if self.share is not None and not isinstance(self.share, str):
            require_range(self.share, 0.0, 1.0, "flipguard: share")

    def choose(self, lattice: Lattice, evidence: Evidence) -> Tensor:
        levels = lattice.grid.levels.to(lattice.blocks.device)
        lower = lattice.lower.int()
        width = (levels[1:] - levels[:-1])[lower]
        position = lattice.position
        upper_is_nearest = lattice.upper_is_nearest
        error = torch.where(upper_is_nearest, 1 - position, position).mul_(width).masked_fill_(lattice.frozen, -1.0)
        if isinstance(self.share, str):
            flip = _orthogonalizing(error, width)
        else:
            share = _paper_share(lattice.grid) if self.share is None else self.share
            flip = torch.zeros_like(upper_is_nearest)
            flip.scatter_(1, error.topk(round(share * error.shape[1]), dim=1).indices, True)
        return round_up_where(lattice, upper_is_nearest ^ flip)


def _orthogonalizing(error: Tensor, step: Tensor) -> Tensor:
    """The largest errors of each block, as many as bring the product of new and old errors nearest to zero.

    Args:
        error: Magnitudes of plain rounding's errors ``[num_blocks, block_size]``; negative where a weight is frozen.
        step: Distance of the neighbours, same shape.
    """
    largest, order = error.sort(dim=1, descending=True, stable=True)
    largest = largest.clamp(min=0.0)
    gain = largest * step.gather(1, order)
    energy = largest.square().sum(dim=1, keepdim=True)
    before = energy - (gain.cumsum(dim=1) - gain)
    flipped = (before > gain / 2) & (gain > 0)
    return torch.zeros_like(error, dtype=torch.bool).scatter_(1, order, flipped)


def _paper_share(grid: Grid) -> float:
    like = "nf4" if grid.num_levels <= _MAX_LEVELS_AS_NF4 else "int8"
    return _PAPER_SHARES.get(grid.name.split("-")[0], _PAPER_SHARES[like])
