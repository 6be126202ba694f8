"""Guard a weight for llama.cpp's quantizer, and make the choices land.

The weight handed over consists of grid points. A quantizer with a formula stores them as planned. One that searches for
its scales usually finds the planned ones again, because they fit without an error; where it settles on others, the
weights of that block move to the values that it stored, which are grid points of the scales that it prefers, and it is
asked again. What it stores in the end *is* the plan; what differs from the method's choice is counted as not landed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, rng_for
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import cut_blocks
from qcbguard_plugins.grids.ggml import GgmlGrid, SearchedGrid
from qcbguard_plugins.grids.ggml_blocks import StoredBlocks
from qcbguard_plugins.guarded_weight import GuardedWeight, digest_of_rows, row_digests
from qcbguard_plugins.threads import map_over_threads

# Rows are worked on in runs of about this many weights, which stay in a processor's cache. Each has random draws of its
# own, and rows do not depend on each other, so any thread may take any run.
_WEIGHTS_PER_RUN = 1 << 17
_MAX_ROUNDS = 6
# A block is asked about again while it stores a weight further than this share of a step from what was handed over.
_TOLERANCE = 1 / 16
# Share of a tensor's energy that may lie in sub-blocks whose scale the quantizer rounds to zero. Nothing that is
# written into the weight can change how those are stored.
_MAX_LOST_ENERGY = 1e-3


@dataclass(frozen=True)
class _Choice:
    """What the method chose for some rows, all of shape ``[num_sub_blocks, sub_block_size]`` but for ``reach``.

    Attributes:
        points: float32, weights to hand over.
        values: float32, the grid points that shall be stored.
        reach: float32 ``[num_sub_blocks, 1]``, half the smallest step of each sub-block: a stored value within it of
            the chosen one has the chosen code. 0 where the sub-block holds one value only.
        moved: Bool, choices that differ from plain rounding.
        frozen: Bool, weights that had no choice.
    """

    points: Tensor
    values: Tensor
    reach: Tensor
    moved: Tensor
    frozen: Tensor

    def rows(self, run: slice, num_columns: int) -> _Choice:
        """The part that lies in some of the rows."""
        per_row = num_columns // self.points.shape[1]
        part = slice(run.start * per_row, run.stop * per_row)
        return _Choice(self.points[part], self.values[part], self.reach[part], self.moved[part], self.frozen[part])


@dataclass(frozen=True)
class _Part:
    """The outcome for some rows: weights to hand over, what is stored, and sums."""

    guarded: Tensor
    codes: Tensor
    row_digests: list[bytes]
    num_landed: int
    num_moved: int
    num_frozen: int
    energy: float
    lost_energy: float
    change: float


def guard_on_ggml(
    weight: Tensor,
    grid: GgmlGrid,
    defense: Defense,
    *,
    seed: int,
    name: str,
    hessian: Tensor | None = None,
    attack_seen: bool = True,
    up: Tensor | None = None,
) -> GuardedWeight:
    """Guard one weight on the grid of a GGUF type; see :func:`qcbguard_plugins.rounding.guard_weight`.

    Raises:
        UnguardableError: Its columns do not fill blocks, it holds NaN or infinity, the quantizer rounds too much of it
            to zero, or too few codes land.
    """
    columns = weight.shape[1]
    if columns % grid.block_type.block_size:
        raise UnguardableError(
            f"{name} cannot be guarded on {grid.name}: {columns} columns are no multiple of "
            f"{grid.block_type.block_size}",
            remedy="llama.cpp stores such a tensor in another type; guard it on that one.",
        )
    if not torch.isfinite(grid.read(weight)).all():
        raise UnguardableError(f"{name} cannot be guarded: it holds NaN or infinity as {grid.name} reads it")
    settled: dict[str, float | str] = {}
    if defense.needs_calibration:
        evidence = Evidence(rng_for(seed, name), hessian, attack_seen, up, settled)
        choices = [_choose(weight, grid, defense, evidence)]
        parts = map_over_threads(lambda run: _finish(choices[0].rows(run, columns), weight, run, grid), _runs(weight))
    else:

        def round_run(run: slice) -> _Part:
            evidence = Evidence(rng_for(seed, f"{name}:{run.start}"))
            return _finish(_choose(weight[run], grid, defense, evidence), weight, run, grid)

        parts = map_over_threads(round_run, _runs(weight))
    energy, lost = sum(part.energy for part in parts), sum(part.lost_energy for part in parts)
    if lost > _MAX_LOST_ENERGY * energy:
        raise UnguardableError(
            f"{name} cannot be guarded: {lost / energy:.1%} of its energy lies in blocks that {grid.name} stores as a "
            "single value, beside others that are far larger",
            remedy="Quantize this tensor to a larger type, or leave it out with --ignore.",
        )
    num_landed = sum(part.num_landed for part in parts)
    if num_landed < grid.min_landed * weight.numel():
        raise UnguardableError(
            f"{name} cannot be guarded: {num_landed / weight.numel():.2%} of its codes land on {grid.name}, "
            f"{grid.min_landed:.2%} are wanted",
            remedy="Convert with --outtype f32, or lower the threshold with --min-landed.",
        )
    change = sum(part.change for part in parts)
    return GuardedWeight(
        weight=torch.cat([part.guarded for part in parts]),
        codes=torch.cat([part.codes for part in parts]),
        num_moved=sum(part.num_moved for part in parts),
        num_frozen=sum(part.num_frozen for part in parts),
        relative_change=(change / energy) ** 0.5 if energy else 0.0,
        num_landed=num_landed,
        digest=digest_of_rows(row for part in parts for row in part.row_digests),
        settled=settled,
    )


def _runs(weight: Tensor) -> list[slice]:
    rows, columns = weight.shape
    step = max(1, _WEIGHTS_PER_RUN // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _choose(weight: Tensor, grid: GgmlGrid, defense: Defense, evidence: Evidence) -> _Choice:
    blocks = cut_blocks(grid.read(weight), grid.block_type.sub_block_size)
    lattice = grid.lattice(blocks, (weight.shape[0], weight.shape[1]), weight.dtype)
    codes = torch.where(lattice.frozen, lattice.nearest, defense.choose(lattice, evidence))
    return _Choice(
        points=torch.where(lattice.frozen, lattice.kept, lattice.place(codes)),
        values=lattice.dequantize(codes),
        reach=lattice.scale.abs().mul_(float(grid.levels.diff().min()) / 2),
        moved=codes != lattice.nearest,
        frozen=lattice.frozen,
    )


def _finish(choice: _Choice, weight: Tensor, run: slice, grid: GgmlGrid) -> _Part:
    """Make the choices for a run of rows land, and count."""
    source = weight[run]
    guarded, stored = _land(choice.points.view(source.shape).to(weight.dtype), choice.reach, grid)
    landed = ((grid.values(stored) - choice.values).abs_() <= choice.reach) | (choice.reach == 0)
    original = source.float()
    single = (choice.reach == 0).squeeze(1)
    lost = float(original.view(choice.points.shape)[single].square().sum()) if single.any() else 0.0
    return _Part(
        guarded=guarded,
        codes=stored.codes.view(source.shape),
        row_digests=row_digests(stored, source.shape[0]),
        num_landed=int(landed.sum()),
        num_moved=int(choice.moved.sum()),
        num_frozen=int(choice.frozen.sum()),
        energy=float(original.square().sum()),
        lost_energy=lost,
        change=float((guarded.float() - original).square_().sum()),
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
