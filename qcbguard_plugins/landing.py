"""Guard a weight for llama.cpp's quantizer, and make the choices land.

The weight handed over consists of grid points. A quantizer with a formula stores them as planned. One that searches for
its scales usually finds the planned ones again, because they fit without an error; where it settles on others, the
weights of that block move to the values that it stored, which are grid points of the scales that it prefers, and it is
asked again. What it stores in the end *is* the plan; what differs from the method's choice is counted as not landed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import cut_blocks
from qcbguard_plugins.grids.ggml import GgmlGrid, SearchedGrid
from qcbguard_plugins.grids.ggml_blocks import StoredBlocks
from qcbguard_plugins.guarded_weight import GuardedWeight, blocks_digest

# The quantizer works on rows in runs of about this many weights, enough to keep all threads busy.
_WEIGHTS_PER_RUN = 1 << 20
_MAX_ROUNDS = 6
# A block is asked about again while it stores a weight further than this share of a step from what was handed over.
_TOLERANCE = 1 / 16
# Share of a tensor's energy that may lie in sub-blocks whose scale the quantizer rounds to zero. Nothing that is written
# into the weight can change how those are stored.
_MAX_LOST_ENERGY = 1e-3


@dataclass(frozen=True)
class _Choice:
    """What the method chose for a run of rows.

    Attributes:
        points: float32 ``[num_sub_blocks, sub_block_size]``, weights to hand over.
        reach: float32 ``[num_sub_blocks, 1]``, half the smallest step of each sub-block: a stored value within it of the
            chosen one has the chosen code. 0 where the sub-block holds one value only.
        num_moved, num_frozen, lost_energy: Sums over the run.
    """

    points: Tensor
    values: Tensor
    reach: Tensor
    num_moved: int
    num_frozen: int
    lost_energy: float


def guard_on_ggml(weight: Tensor, grid: GgmlGrid, defense: Defense, evidence: Evidence, name: str) -> GuardedWeight:
    """Guard one weight on the grid of a GGUF type; see :func:`qcbguard_plugins.rounding.guard_weight`.

    Raises:
        UnguardableError: Its columns do not fill blocks, it holds NaN or infinity, the quantizer rounds too much of it to
            zero, or too few codes land.
    """
    rows, columns = weight.shape
    if columns % grid.block_type.block_size:
        raise UnguardableError(
            f"{name} cannot be guarded on {grid.name}: {columns} columns are no multiple of {grid.block_type.block_size}",
            remedy="llama.cpp stores such a tensor in another type; guard it on that one.",
        )
    if not torch.isfinite(grid.read(weight)).all():
        raise UnguardableError(f"{name} cannot be guarded: it holds NaN or infinity as {grid.name} reads it")
    choices = [_choose(weight[run], grid, defense, evidence) for run in _runs(weight, whole=defense.needs_calibration)]
    points = torch.cat([choice.points for choice in choices])
    values = torch.cat([choice.values for choice in choices])
    reach = torch.cat([choice.reach for choice in choices])
    energy = float(weight.float().square().sum())
    lost = sum(choice.lost_energy for choice in choices)
    if lost > _MAX_LOST_ENERGY * energy:
        raise UnguardableError(
            f"{name} cannot be guarded: {lost / energy:.1%} of its energy lies in blocks that {grid.name} stores as a single "
            "value, beside others that are far larger",
            remedy="Quantize this tensor to a larger type, or leave it out with --ignore.",
        )
    guarded, stored = _land(points.view(rows, columns).to(weight.dtype), reach, grid)
    landed = (grid.values(stored) - values).abs_() <= reach
    num_landed = int(landed.sum()) + int((reach == 0).sum()) * points.shape[1] - int((landed & (reach == 0)).sum())
    if num_landed < grid.min_landed * weight.numel():
        raise UnguardableError(
            f"{name} cannot be guarded: {num_landed / weight.numel():.2%} of its codes land on {grid.name}, "
            f"{grid.min_landed:.2%} are wanted",
            remedy="Convert with --outtype f32, or lower the threshold with --min-landed.",
        )
    change = float((guarded.float() - weight.float()).square_().sum())
    return GuardedWeight(
        weight=guarded,
        codes=stored.codes.view(rows, columns),
        num_moved=sum(choice.num_moved for choice in choices),
        num_frozen=sum(choice.num_frozen for choice in choices),
        relative_change=(change / energy) ** 0.5 if energy else 0.0,
        num_landed=num_landed,
        digest=blocks_digest(stored, rows),
    )


def _runs(weight: Tensor, *, whole: bool) -> Iterator[slice]:
    rows, columns = weight.shape
    step = rows if whole else max(1, _WEIGHTS_PER_RUN // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _choose(weight: Tensor, grid: GgmlGrid, defense: Defense, evidence: Evidence) -> _Choice:
    blocks = cut_blocks(grid.read(weight), grid.block_type.sub_block_size)
    lattice = grid.lattice(blocks, (weight.shape[0], weight.shape[1]), weight.dtype)
    stock = lattice.nearest
    codes = torch.where(lattice.frozen, stock, defense.choose(lattice, evidence))
    points = torch.where(lattice.frozen, lattice.kept, lattice.place(codes))
    single = (lattice.scale == 0).squeeze(1)
    return _Choice(
        points=points,
        values=lattice.dequantize(codes),
        reach=lattice.scale.abs().mul_(float(grid.levels.diff().min()) / 2),
        num_moved=int((codes != stock).sum()),
        num_frozen=int(lattice.frozen.sum()),
        lost_energy=float(blocks[single].square().sum()) if single.any() else 0.0,
    )


def _land(guarded: Tensor, reach: Tensor, grid: GgmlGrid) -> tuple[Tensor, StoredBlocks]:
    """Quantize, and move blocks whose scale changed onto what was stored, until none changes or the rounds are over.

    Args:
        guarded: ``[rows, columns]`` weights to hand over; not changed.
        reach: Half a step of each sub-block.
        grid: The grid.

    Returns:
        The weights to hand over, and what the quantizer stores for them.
    """
    stored = grid.stored(guarded)
    if not grid.searched:
        return guarded, stored
    # With an importance matrix the search weighs columns, so whole rows are asked about; otherwise blocks stand alone.
    assert isinstance(grid, SearchedGrid)
    unit = guarded.shape[1] if grid.importance is not None else grid.block_type.block_size
    units = guarded.clone().view(-1, unit)
    per_unit = unit // grid.block_type.sub_block_size
    limit = (reach * (2 * _TOLERANCE)).view(-1, per_unit, 1)
    pending = torch.arange(units.shape[0])
    part = stored
    for _ in range(_MAX_ROUNDS):
        values = grid.values(part).view(len(pending), per_unit, -1)
        handed_over = grid.read(units[pending]).view(values.shape)
        off = ((handed_over - values).abs() > limit[pending]) & (limit[pending] > 0)
        moved = off.any(dim=2).any(dim=1)
        if not moved.any():
            break
        pending = pending[moved]
        units[pending] = values[moved].reshape(len(pending), unit).to(units.dtype)
        part = grid.stored(units[pending])
        _replace(stored, part, pending, per_unit)
    return units.view(guarded.shape), stored


def _replace(stored: StoredBlocks, part: StoredBlocks, units: Tensor, per_unit: int) -> None:
    """Write what was stored for some units into what was stored for all, in place."""
    for whole, new in ((stored.codes, part.codes), (stored.scale, part.scale), (stored.offset, part.offset)):
        whole.view(-1, per_unit, whole.shape[1])[units] = new.view(-1, per_unit, new.shape[1])
