"""Guard a weight for llama.cpp's quantizer, so that the choices are stored.

The weight handed over consists of grid points. A quantizer with a formula stores them as planned. K-quants search for
their scales, so a weight on a grid point is not always stored as that point. Quantize, compare, move the weights of a
wrong block by half the difference, try again; the closest result becomes the plan. Codes that still differ from the
method's choice are counted in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcbguard_plugins._util.random import philox_key
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.defenses.base import ChoiceContext, Defense, rng_for
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import Lattice, cut_blocks
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.grids.ggml_blocks import StoredBlocks
from qcbguard_plugins.rounding.digests import digest_of_rows, pack_rows, row_digests
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight
from qcbguard_plugins.rounding.search_steps import choose_points, compare, correct, measure

# Rows are worked on in runs of about this many weights. Shorter ones stay in a nearer cache, but more often have
# threads wait for the interpreter. Each has random draws of its own, and rows do not depend on each other, so any
# thread may take any run.
_WEIGHTS_PER_RUN = 1 << 19
# What is kept of choices is held for this many weights at a time.
_WEIGHTS_PER_SEGMENT = 1 << 23
_MAX_ROUNDS = 4
# Share of a miss by which a weight is moved before the quantizer is asked again.
_CORRECTION = 0.5
# Share of a tensor's energy that may lie in sub-blocks whose scale the quantizer rounds to zero. Nothing that is
# written into the weight can change how those are stored.
_MAX_LOST_ENERGY = 1e-3


# The lattice of some rows, and the codes that a defense takes on it.
_Choose = Callable[[slice], tuple[Lattice, Tensor]]


@dataclass(frozen=True)
class _Outcome:
    """What became of some rows."""

    row_digests: list[bytes]
    num_as_planned: int
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
    looks_attacked: bool = True,
    round_up: Tensor | None = None,
    overwrite: bool = False,
) -> GuardedWeight:
    """Guard one weight on the grid of a GGUF type; see :func:`qcbguard_plugins.rounding.guard_weight`.

    Raises:
        UnguardableError: Its columns do not fill blocks, it holds NaN or infinity, the quantizer rounds too much of it
            to zero, or too few codes land.
    """
    columns = weight.shape[1]
    if problem := grid.fits((weight.shape[0], columns)):
        raise UnguardableError(
            f"{name} cannot be guarded on {grid.name}: {problem}",
            remedy="llama.cpp stores such a tensor in another type; guard it on that one.",
        )
    chosen: dict[str, float | str] = {}
    job, key = _Job(weight, grid, defense, name, overwrite=overwrite), philox_key(seed, name)

    def choose(run: slice) -> tuple[Lattice, Tensor]:
        context = ChoiceContext(rng_for(seed, f"{name}:{run.start}"), key=key, offset=run.start * columns)
        return _choose(weight[run], grid, defense, context, name)

    if defense.needs_calibration:
        context = ChoiceContext(rng_for(seed, name), hessian, looks_attacked, round_up, chosen, key)
        whole, codes = _choose(weight, grid, defense, context, name)
        per_row = columns // codes.shape[1]

        def choose(run: slice) -> tuple[Lattice, Tensor]:
            part = slice(run.start * per_row, run.stop * per_row)
            return _part_of(whole, part), codes[part]

    restated = grid.is_restated
    outcomes = job.carry_out_at_once(key) if job.by_formula else job.carry_out(choose)
    if grid.is_restated != restated:
        # The real quantizer was found to differ on some rows, so nothing that was answered in its place counts.
        outcomes = job.carry_out(choose)
    energy, lost = sum(part.energy for part in outcomes), sum(part.lost_energy for part in outcomes)
    if lost > _MAX_LOST_ENERGY * energy:
        raise UnguardableError(
            f"{name} cannot be guarded: {lost / energy:.1%} of its energy lies in blocks that {grid.name} stores as a "
            "single value, beside others that are far larger",
            remedy="Quantize this tensor to a larger type, or leave it out with --ignore.",
        )
    num_as_planned = sum(part.num_as_planned for part in outcomes)
    if num_as_planned < grid.min_as_planned * weight.numel():
        raise UnguardableError(
            f"{name} cannot be guarded: {num_as_planned / weight.numel():.2%} of its codes are stored as chosen on "
            f"{grid.name}, {grid.min_as_planned:.2%} are wanted",
            remedy="Convert with --outtype f32, or lower the threshold with --min-as-planned.",
        )
    change = sum(part.change for part in outcomes)
    return GuardedWeight(
        weight=job.guarded,
        codes=job.codes,
        num_moved=sum(part.num_moved for part in outcomes),
        num_frozen=sum(part.num_frozen for part in outcomes),
        relative_change=(change / energy) ** 0.5 if energy else 0.0,
        num_as_planned=num_as_planned,
        digest=digest_of_rows(row for part in outcomes for row in part.row_digests),
        energy=energy,
        chosen=chosen,
    )


class _Job:
    """One weight on its way to the quantizer.

    Attributes:
        by_formula: Whether all that happens to a weight is compiled as a whole.
        guarded: The weight to hand over.
        codes: uint8 like it, what is stored.
    """

    def __init__(self, weight: Tensor, grid: GgmlGrid, defense: Defense, name: str, *, overwrite: bool) -> None:
        self.weight, self.grid, self.name = weight, grid, name
        self.by_formula = defense.is_stochastic_rounding and self._has_formula()
        # Elsewhere the weight is compared with its outcome in the end.
        in_place = overwrite and self.by_formula and weight.is_contiguous()
        self.guarded = weight if in_place else torch.empty(weight.shape, dtype=weight.dtype)
        self.codes = torch.empty(weight.shape, dtype=torch.uint8)
        # With an importance matrix the search weighs columns, so whole rows are asked about; otherwise blocks stand
        # alone.
        whole_rows = grid.importance is not None
        self.unit = weight.shape[1] if whole_rows else grid.block_type.block_size

    def _has_formula(self) -> bool:
        grid = self.grid
        by_formula = not grid.searched and grid.kernels is not None and grid.outtype == self.weight.dtype
        return by_formula and self.weight.device.type == "cpu"

    def carry_out_at_once(self, key: int) -> list[_Outcome]:
        """Guard stochastically, where ``by_formula`` says so."""
        rows, columns = self.weight.shape
        assert self.grid.kernels is not None
        guard_rows = self.grid.kernels.guard_by_formula(self.grid, self.weight, key, self.guarded, self.codes)

        def guard(run: slice) -> _Outcome:
            done = guard_rows(run)
            if not done.is_finite:
                raise _not_finite(self.name, self.grid)
            digests = row_digests(done.packed_rows)
            return _Outcome(
                digests,
                done.num_as_planned,
                done.num_moved,
                done.num_frozen,
                done.energy,
                done.lost_energy,
                done.change,
            )

        return map_over_threads(guard, _slices(0, rows, columns, _WEIGHTS_PER_RUN))

    def carry_out(self, choose: _Choose) -> list[_Outcome]:
        """Choose, land and count, some rows after the other."""
        segments = _slices(0, self.weight.shape[0], self.weight.shape[1], _WEIGHTS_PER_SEGMENT)
        return [outcome for rows in segments for outcome in self._segment(rows, choose)]

    def _segment(self, rows: slice, choose: _Choose) -> list[_Outcome]:
        columns, size = self.weight.shape[1], self.grid.block_type.sub_block_size
        num_blocks = (rows.stop - rows.start) * columns // size
        stored, chosen = (
            StoredBlocks(codes.view(-1, size), torch.empty(num_blocks, 1), torch.empty(num_blocks, 1))
            for codes in (self.codes[rows], torch.empty_like(self.codes[rows]))
        )
        units = _Units(self.guarded[rows].view(-1, self.unit), stored, chosen)

        def part_of(run: slice, width: int) -> slice:
            return slice((run.start - rows.start) * columns // width, (run.stop - rows.start) * columns // width)

        def ask(run: slice) -> tuple[int, int]:
            lattice, wanted = choose(run)
            points, codes, num_moved, num_frozen = choose_points(self.grid, lattice, wanted)
            guarded = self.guarded[run]
            guarded.copy_(points.view(guarded.shape))
            offset = torch.zeros_like(lattice.scale) if lattice.offset is None else lattice.offset
            choice, answer = StoredBlocks(codes, lattice.scale, offset), self.grid.stored(guarded)
            _write(chosen, choice, part_of(run, size))
            _write(stored, answer, part_of(run, size))
            part = part_of(run, self.unit)
            units.as_planned[part], units.misses[part] = compare(self.grid, answer, choice, self.unit)
            return num_moved, num_frozen

        def count(part: tuple[slice, tuple[int, int]]) -> _Outcome:
            run, counts = part
            blocks = part_of(run, size)
            energy, lost, change = measure(
                self.grid, self.weight[run].float(), self.guarded[run].float(), chosen.scale[blocks]
            )
            digests = row_digests(pack_rows(_cut(stored, blocks), self.grid.block_type, run.stop - run.start))
            num_as_planned = int(units.as_planned[part_of(run, self.unit)].sum())
            return _Outcome(digests, num_as_planned, *counts, energy, lost, change)

        runs = _slices(rows.start, rows.stop, columns, _WEIGHTS_PER_RUN)
        counts = map_over_threads(ask, runs)
        pending = (units.as_planned < self.unit).nonzero().squeeze(1)
        if self.grid.searched and len(pending):
            parts = torch.tensor_split(pending, min(torch.get_num_threads(), len(pending)))
            map_over_threads(lambda part: self._ask_again(units, part), parts)
        return map_over_threads(count, list(zip(runs, counts, strict=True)))

    def _ask_again(self, units: _Units, pending: Tensor) -> None:
        """Correct some units and ask again, until all of them lands or the rounds are over; the best answers stay."""
        grid, per_unit = self.grid, self.unit // self.grid.block_type.sub_block_size
        goal, answer = _take(units.chosen, pending, per_unit), _take(units.stored, pending, per_unit)
        offered = units.handed_over[pending].float()
        for _ in range(_MAX_ROUNDS):
            correct(grid, answer, goal, _CORRECTION, offered)
            asked = offered.to(units.handed_over.dtype)
            answer = grid.stored(asked)
            as_planned, misses = compare(grid, answer, goal, self.unit)
            most, least = units.as_planned[pending], units.misses[pending]
            better = (as_planned > most) | ((as_planned == most) & (misses < least))
            winners = pending[better]
            units.handed_over[winners] = asked[better]
            units.as_planned[winners], units.misses[winners] = as_planned[better], misses[better]
            for whole, new in _pairs(units.stored, _take(answer, better, per_unit)):
                whole.view(-1, per_unit, whole.shape[1])[winners] = new.view(-1, per_unit, new.shape[1])
            rest = units.as_planned[pending] < self.unit
            if not rest.any():
                return
            pending, offered = pending[rest], offered[rest]
            goal, answer = _take(goal, rest, per_unit), _take(answer, rest, per_unit)


class _Units:
    """What the quantizer is asked about as a whole, for some rows.

    Attributes:
        handed_over: ``[num_units, unit]``, the weights.
        stored: What it stores for them.
        chosen: What it shall store.
        as_planned: int32 ``[num_units]``, see :func:`qcbguard_plugins.rounding.search_steps.compare`.
        misses: float32 ``[num_units]``, as well.
    """

    def __init__(self, handed_over: Tensor, stored: StoredBlocks, chosen: StoredBlocks) -> None:
        self.handed_over, self.stored, self.chosen = handed_over, stored, chosen
        self.as_planned = torch.empty(len(handed_over), dtype=torch.int32)
        self.misses = torch.empty(len(handed_over))


def _slices(start: int, stop: int, columns: int, num_weights: int) -> list[slice]:
    """Cut rows into runs of about this many weights."""
    step = max(1, num_weights // columns)
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _pairs(first: StoredBlocks, second: StoredBlocks) -> list[tuple[Tensor, Tensor]]:
    return [(first.codes, second.codes), (first.scale, second.scale), (first.offset, second.offset)]


def _cut(stored: StoredBlocks, part: slice) -> StoredBlocks:
    return StoredBlocks(stored.codes[part], stored.scale[part], stored.offset[part])


def _write(stored: StoredBlocks, new: StoredBlocks, part: slice) -> None:
    for whole, values in _pairs(stored, new):
        whole[part] = values


def _take(stored: StoredBlocks, units: Tensor, per_unit: int) -> StoredBlocks:
    """What is stored for some units."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1, per_unit, tensor.shape[1])[units].view(-1, tensor.shape[1])

    return StoredBlocks(part(stored.codes), part(stored.scale), part(stored.offset))


def _choose(
    weight: Tensor, grid: GgmlGrid, defense: Defense, context: ChoiceContext, name: str
) -> tuple[Lattice, Tensor]:
    blocks = cut_blocks(grid.read(weight), grid.block_type.sub_block_size)
    # A sum is several times faster than to look at every weight, and finite weights rarely add up to infinity.
    if not torch.isfinite(blocks.sum()) and not torch.isfinite(blocks).all():
        raise _not_finite(name, grid)
    lattice = grid.lattice(blocks, (weight.shape[0], weight.shape[1]), weight.dtype)
    if grid.kernels is not None and defense.is_stochastic_rounding and blocks.device.type == "cpu":
        assert context.key is not None
        return lattice, grid.kernels.choose(lattice, context.key, context.offset)
    return lattice, defense.choose(lattice, context)


def _not_finite(name: str, grid: GgmlGrid) -> UnguardableError:
    return UnguardableError(f"{name} cannot be guarded: it holds NaN or infinity as {grid.name} reads it")


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
