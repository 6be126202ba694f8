"""FlipGuard: flip the codes with the largest rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import ChoiceContext, Defense, register_defense, require_range, round_up_where
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.base import Grid, Lattice

AUTO = "auto"

# Midpoints of the ranges that the paper reports for its models. It has no GGUF type: those take the share of NF4 up to
# 6 bits and of INT8 above.
_PAPER_SHARES = {"int8": 0.15, "fp4": 0.08, "nf4": 0.115}
_MAX_LEVELS_AS_NF4 = 64

# An error of u steps, u anywhere in [0, 1/2], has a mean energy of 1/12. Flipped, it takes u off the product of new and
# old error; flipping all above a takes off 1/4 - a^2, the whole energy at a^2 = 1/6. Their share is 1 - 2a.
_ORTHOGONAL_SHARE = 1 - 2 / 6**0.5


@register_defense("flipguard", "flip the codes with the largest errors of each block, no data needed")
@dataclass(frozen=True)
class FlipGuard(Defense):
    """Give the other of its two neighbours to the share of each block with the largest scaled rounding error.

    The other neighbour is the other end of the cell that holds the weight. It is not always the second nearest level,
    because cells of a codebook differ in width.

    Attributes:
        share: Share of each block to flip, in [0, 1]; ``None`` takes the middle of the paper's range for the format,
            and ``"auto"`` the share, 18 %, at which the new rounding error is orthogonal to the old one where weights
            lie anywhere in their cells.

    References:
        FlipGuard, arXiv 2606.28962, Algorithm 1.
    """

    share: float | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.share, str) and self.share != AUTO:
            raise UsageError(f"flipguard: share must be {AUTO} or lie between 0 and 1, got {self.share!r}")
        if self.share is not None and not isinstance(self.share, str):
            require_range(self.share, 0.0, 1.0, "flipguard: share")

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        levels = lattice.grid.levels.to(lattice.blocks.device)
        lower = lattice.lower.int()
        width = (levels[1:] - levels[:-1])[lower]
        position = lattice.position
        upper_is_nearest = lattice.upper_is_nearest
        error = torch.where(upper_is_nearest, 1 - position, position).mul_(width).masked_fill_(lattice.frozen, -1.0)
        if isinstance(self.share, str):
            share = _ORTHOGONAL_SHARE
        else:
            share = _paper_share(lattice.grid) if self.share is None else self.share
        flip = torch.zeros_like(upper_is_nearest)
        flip.scatter_(1, error.topk(round(share * error.shape[1]), dim=1).indices, True)
        return round_up_where(lattice, upper_is_nearest ^ flip)


def _paper_share(grid: Grid) -> float:
    like = "nf4" if grid.num_levels <= _MAX_LEVELS_AS_NF4 else "int8"
    return _PAPER_SHARES.get(grid.name.split("-")[0], _PAPER_SHARES[like])
