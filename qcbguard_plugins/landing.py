"""Guard a weight for llama.cpp's quantizer, and make the choices land.

The weight handed over consists of grid points. A quantizer with a formula stores them as planned. One that searches for
its scales usually finds the planned ones again, because they fit without an error; where it settles on others, the
weights of that block move to the values that it stored, which are grid points of the scales that it prefers, and it is
asked again. What it stores in the end *is* the plan; what differs from the method's choice is counted as not landed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, rng_for
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import Lattice, cut_blocks
from qcbguard_plugins.grids.ggml import GgmlGrid, SearchedGrid
from qcbguard_plugins.grids.ggml_blocks import StoredBlocks
from qcbguard_plugins.guarded_weight import GuardedWeight, digest_of_rows, row_digests
from qcbguard_plugins.landing_steps import choose_points, count_landed, find_moved, measure
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
class _Part:
    """The outcome for some rows, in sums; the weights and codes lie in the tensors of the whole."""

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
    settled: dict[str, float | str] = {}
    guarded, codes = torch.empty(weight.shape, dtype=weight.dtype), torch.empty(weight.shape, dtype=torch.uint8)

    def guard_rows() -> list[_Part]:
        if defense.needs_calibration:
            evidence = Evidence(rng_for(seed, name), hessian, attack_seen, up, settled)
            lattice, chosen = _choose(weight, grid, defense, evidence, name)
            per_row = columns // chosen.shape[1]

            def finish_run(run: slice) -> _Part:
                part = slice(run.start * per_row, run.stop * per_row)
                return _finish(_part_of(lattice, part), chosen[part], weight[run], grid, guarded[run], codes[run])

            return map_over_threads(finish_run, _runs(weight))

        def round_run(run: slice) -> _Part:
            evidence = Evidence(rng_for(seed, f"{name}:{run.start}"))
            lattice, chosen = _choose(weight[run], grid, defense, evidence, name)
            return _finish(lattice, chosen, weight[run], grid, guarded[run], codes[run])

        return map_over_threads(round_run, _runs(weight))

    restated = grid.is_restated
    parts = guard_rows()
    if grid.is_restated != restated:
        # The real quantizer was found to differ on some rows, so nothing that was answered in its place counts.
        parts = guard_rows()
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
        weight=guarded,
        codes=codes,
        num_moved=sum(part.num_moved for part in parts),
        num_frozen=sum(part.num_frozen for part in parts),
        relative_change=(change / energy) ** 0.5 if energy else 0.0,
        num_landed=num_landed,
        digest=digest_of_rows(row for part in parts for row in part.row_digests),
        energy=energy,
        settled=settled,
    )


def _runs(weight: Tensor) -> list[slice]:
    rows, columns = weight.shape
    step = max(1, _WEIGHTS_PER_RUN // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _choose(weight: Tensor, grid: GgmlGrid, defense: Defense, evidence: Evidence, name: str) -> tuple[Lattice, Tensor]:
    blocks = cut_blocks(grid.read(weight), grid.block_type.sub_block_size)
    # A sum is several times faster than to look at every weight, and finite weights rarely add up to infinity.
    if not torch.isfinite(blocks.sum()) and not torch.isfinite(blocks).all():
        raise UnguardableError(f"{name} cannot be guarded: it holds NaN or infinity as {grid.name} reads it")
    lattice = grid.lattice(blocks, (weight.shape[0], weight.shape[1]), weight.dtype)
    return lattice, defense.choose(lattice, evidence)


def _part_of(lattice: Lattice, part: slice) -> Lattice:
    """The lattice of a run of sub-blocks; its ``shape`` stays that of the whole."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[part]

    return replace(
        lattice,
        blocks=lattice.blocks[part],
        scale=lattice.scale[part],
        coordinate=lattice.coordinate[part],
        frozen=lattice.frozen[part],
        offset=cut(lattice.offset),
        stock_codes=cut(lattice.stock_codes),
        divisor=cut(lattice.divisor),
        base=cut(lattice.base),
    )


def _finish(lattice: Lattice, chosen: Tensor, source: Tensor, grid: GgmlGrid, guarded: Tensor, codes: Tensor) -> _Part:
    """Make the choices for a run of rows land, fill ``guarded`` and ``codes``, and count."""
    points, chosen_codes, num_moved, num_frozen = choose_points(grid, lattice, chosen)
    guarded.copy_(points.view(source.shape))
    stored = _land(guarded, lattice.scale, grid)
    codes.copy_(stored.codes.view(source.shape))
    energy, lost, change = measure(grid, source.float(), guarded.float(), lattice)
    return _Part(
        row_digests=row_digests(stored, source.shape[0]),
        num_landed=count_landed(grid, stored, chosen_codes, lattice),
        num_moved=num_moved,
        num_frozen=num_frozen,
        energy=energy,
        lost_energy=lost,
        change=change,
    )


def _land(guarded: Tensor, scale: Tensor, grid: GgmlGrid) -> StoredBlocks:
    """Quantize, and move blocks whose scale changed onto what was stored, until none changes or the rounds are over.

    Args:
        guarded: ``[rows, columns]`` weights to hand over; moved in place where they have to.
        scale: The scale of each sub-block that the choice was made with.
        grid: The grid.

    Returns:
        What the quantizer stores for them.
    """
    stored = grid.stored(guarded)
    if not grid.searched:
        return stored
    # With an importance matrix the search weighs columns, so whole rows are asked about; otherwise blocks stand alone.
    assert isinstance(grid, SearchedGrid)
    unit = guarded.shape[1] if grid.importance is not None else grid.block_type.block_size
    units, per_unit = guarded.view(-1, unit), unit // grid.block_type.sub_block_size
    tolerance = float(grid.levels.diff().min()) * _TOLERANCE
    scales = scale.view(-1, per_unit)
    pending, asked, part = torch.arange(units.shape[0]), units, stored
    for _ in range(_MAX_ROUNDS):
        moved = find_moved(grid, grid.read(asked), part, scales[pending].view(-1, 1), tolerance, unit)
        if not moved.any():
            break
        pending = pending[moved]
        asked = grid.values(_units_of(part, moved, per_unit)).view(-1, unit).to(units.dtype)
        units[pending] = asked
        part = grid.stored(asked)
        _replace(stored, part, pending, per_unit)
    return stored


def _units_of(stored: StoredBlocks, units: Tensor, per_unit: int) -> StoredBlocks:
    """What is stored for some units."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1, per_unit, tensor.shape[1])[units].view(-1, tensor.shape[1])

    return StoredBlocks(part(stored.codes), part(stored.scale), part(stored.offset))


def _replace(stored: StoredBlocks, part: StoredBlocks, units: Tensor, per_unit: int) -> None:
    """Write what was stored for some units into what was stored for all, in place."""
    for whole, new in ((stored.codes, part.codes), (stored.scale, part.scale), (stored.offset, part.offset)):
        whole.view(-1, per_unit, whole.shape[1])[units] = new.view(-1, per_unit, new.shape[1])
