"""Turn a defense's choices into a weight that the stock quantizer rounds exactly as chosen.

Every weight that is not frozen becomes a point of the stock grid, in the dtype in which it will be stored. A grid point
lies well inside its cell, so the code survives the cast to that dtype, a kernel that differs by an ulp, and a later
load in another 16- or 32-bit dtype of a 4-bit grid. Scale holders keep their value, so no scale moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins._util.dtypes import DTYPES, dtype_name
from qcbguard_plugins._util.random import philox_key
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.defenses.base import ChoiceContext, Defense, rng_for
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import Grid, Lattice, cut_blocks
from qcbguard_plugins.grids.ggml import is_ggml
from qcbguard_plugins.rounding.digests import codes_digest
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight
from qcbguard_plugins.rounding.searched import guard_on_ggml

# A segment of a weight has random draws of its own, so the result does not depend on who works on it, and when.
_WEIGHTS_PER_SEGMENT = 1 << 20

# On a processor it is worked on in runs that stay in the cache.
_WEIGHTS_PER_RUN = 1 << 18
_WEIGHTS_PER_COMPILED_RUN = 1 << 16

# A frozen weight that holds no scale belongs to a block too small for its dtype. Such blocks may carry at most this
# share of a tensor's energy; above it a rescaled layer could hide an attack in them.
_MAX_UNPLACED_ENERGY = 1e-6


def guard_weight(
    weight: Tensor,
    grid: Grid,
    defense: Defense,
    *,
    seed: int,
    name: str,
    hessian: Tensor | None = None,
    looks_attacked: bool = True,
    round_up: Tensor | None = None,
    overwrite: bool = False,
) -> GuardedWeight:
    """Guard one weight.

    Args:
        weight: Float32, float16 or bfloat16 ``[out_features, in_features]``.
        grid: The grid of the stock quantizer.
        defense: The method.
        seed: Seed of the run.
        name: Name of the tensor; with the seed it fixes the random draws.
        hessian: Float32 ``[in_features, in_features]``, for a method that needs calibration.
        looks_attacked: Whether the weight tests saw an attack in the model, for a method that weighs context.
        round_up: Bool ``[out_features, in_features]``, what a whole-model method learned.
        overwrite: The memory of ``weight`` may take the outcome, which halves the peak; left as it is otherwise.

    Raises:
        UnguardableError: The weight is empty, not a matrix or of another dtype, holds NaN or infinity, or is so small
            that its dtype cannot tell the levels of the grid apart.
    """
    _check(weight, name)
    if is_ggml(grid):
        return guard_on_ggml(
            weight, grid, defense, seed=seed, name=name, hessian=hessian, looks_attacked=looks_attacked,
            round_up=round_up, overwrite=overwrite,
        )  # fmt: skip
    source = cut_blocks(weight, grid.block_size_of((weight.shape[0], weight.shape[1])))
    guarded = source if overwrite else torch.empty_like(source)
    shape = (weight.shape[0], weight.shape[1])
    job = _Job(source, guarded, shape, weight.numel(), grid, defense, seed, name, hessian, looks_attacked, round_up)
    if weight.device.type == "cpu":
        tallies = map_over_threads(job.round_segment, job.segments())
    else:
        tallies = [job.round_segment(segment) for segment in job.segments()]
    tally = sum(tallies, Tally())
    tally.check(grid, name)
    numel = weight.numel()
    codes = job.codes.view(-1)[:numel].view(shape)
    return GuardedWeight(
        weight=job.guarded.view(-1)[:numel].view(shape),
        codes=codes,
        num_moved=tally.num_moved,
        num_frozen=tally.num_frozen,
        relative_change=tally.relative_change(),
        num_as_planned=numel,
        digest=codes_digest(codes),
        chosen=job.chosen,
    )


def weights_per_segment(grid: Grid, shape: tuple[int, int]) -> int:
    """How many weights :func:`guard_segment` takes at a time: whole blocks, with random draws of their own."""
    size = grid.block_size_of(shape)
    return max(1, _WEIGHTS_PER_SEGMENT // size) * size


def guard_segment(
    weights: Tensor, first: int, shape: tuple[int, int], grid: Grid, defense: Defense, *, seed: int, name: str
) -> tuple[Tensor, Tensor, Tally]:
    """Guard one segment of a weight, with the outcome that :func:`guard_weight` has for it.

    Args:
        weights: Flat, of the dtype of the weight, :func:`weights_per_segment` of them or what is left of it.
        first: Number of the first, a multiple of that.
        shape: ``(out_features, in_features)`` of the weight.
        grid: One whose blocks do not depend on each other, of bitsandbytes or of integers.
        defense: A method that needs no calibration.
        seed: Seed of the run.
        name: Name of the tensor.

    Returns:
        The guarded weights and their codes (uint8), flat, and what was counted; its sum over all segments is to be
        checked with :meth:`Tally.check`.

    Raises:
        UnguardableError: A weight is NaN or infinite.
    """
    source = cut_blocks(weights, grid.block_size_of(shape))
    job = _Job(source, torch.empty_like(source), shape, weights.numel(), grid, defense, seed, name)
    job.first_block = first // source.shape[1]
    tally = job.round_segment(slice(0, len(source)))
    return job.guarded.view(-1)[: weights.numel()], job.codes.view(-1)[: weights.numel()], tally


@lru_cache(maxsize=1)
def load_kernels() -> Any:
    """The compiled forms for the grids of bitsandbytes; ``None`` without numba."""
    try:
        from qcbguard_plugins._kernels import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def _check(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnguardableError(f"{name} cannot be guarded: its shape is {tuple(weight.shape)}, not a non-empty matrix")
    if weight.dtype not in DTYPES:
        wanted = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise UnguardableError(
            f"{name} cannot be guarded: its dtype is {dtype_name(weight.dtype)}",
            remedy=f"Guard a full-precision checkpoint ({wanted}).",
        )


class _Job:
    """The blocks of one weight on their way through a defense, in segments that any worker may take.

    Attributes:
        first_block: Number of the first of them in the weight.
    """

    def __init__(
        self,
        source: Tensor,
        guarded: Tensor,
        shape: tuple[int, int],
        numel: int,
        grid: Grid,
        defense: Defense,
        seed: int,
        name: str,
        hessian: Tensor | None = None,
        looks_attacked: bool = True,
        round_up: Tensor | None = None,
    ) -> None:
        self.source, self.guarded, self.shape, self.numel = source, guarded, shape, numel
        self.grid, self.defense, self.seed, self.name, self.hessian = grid, defense, seed, name, hessian
        self.looks_attacked, self.round_up, self.key = looks_attacked, round_up, philox_key(seed, name)
        self.chosen: dict[str, float | str] = {}
        self.first_block = 0
        self.codes = torch.empty_like(self.source, dtype=torch.uint8)
        self.kernels = load_kernels() if self._is_compiled() else None

    def _is_compiled(self) -> bool:
        """Whether rounding is compiled as a whole."""
        known = self.grid.in_segments and self.defense.is_stochastic_rounding
        return known and self.source.device.type == "cpu"

    def segments(self) -> list[slice]:
        """Runs of blocks with random draws of their own; a method that needs calibration gets all blocks at once."""
        whole = self.defense.needs_calibration
        return self._slices(0, self.source.shape[0], self.source.numel() if whole else _WEIGHTS_PER_SEGMENT)

    def round_segment(self, segment: slice) -> Tally:
        """Round one segment into ``guarded`` and ``codes``."""
        rng = rng_for(self.seed, f"{self.name}:{self.first_block + segment.start}")
        context = ChoiceContext(rng, self.hessian, self.looks_attacked, self.round_up, self.chosen, key=self.key)
        cached = self.source.device.type == "cpu" and not self.defense.needs_calibration
        if self.kernels is not None:
            size, work = _WEIGHTS_PER_COMPILED_RUN, self._round_compiled
        else:
            size, work = _WEIGHTS_PER_RUN if cached else self.source.numel(), self._round
        return sum((work(run, context) for run in self._slices(segment.start, segment.stop, size)), Tally())

    def _round(self, run: slice, context: ChoiceContext) -> Tally:
        source = self.source[run]
        placed = self.grid.move_scale_holders(source)
        lattice = self.grid.lattice(self.grid.read(placed), self.shape, source.dtype)
        if not torch.isfinite(lattice.scale).all():
            raise self._not_finite()
        context.offset = (self.first_block + run.start) * source.shape[1]
        codes = torch.where(lattice.frozen, lattice.nearest, self.defense.choose(lattice, context))
        guarded = torch.where(lattice.frozen, placed, lattice.dequantize(codes).to(source.dtype))
        tally = _tally(lattice, source, guarded, codes, self.numel - run.start * source.shape[1])
        self.codes[run], self.guarded[run] = codes, guarded
        return tally

    def _round_compiled(self, run: slice, context: ChoiceContext) -> Tally:
        assert self.kernels is not None
        columns = self.source.shape[1]
        done = self.kernels.round_run(
            self.grid, self.source[run], self.numel - run.start * columns, self.key,
            (self.first_block + run.start) * columns, self.guarded[run], self.codes[run],
        )  # fmt: skip
        if not done.is_finite:
            raise self._not_finite()
        return Tally(done.num_moved, done.num_frozen, done.energy, done.change, done.unplaced_energy)

    def _not_finite(self) -> UnguardableError:
        return UnguardableError(f"{self.name} cannot be guarded: it holds NaN or infinity as {self.grid.name} reads it")

    def _slices(self, start: int, stop: int, num_weights: int) -> list[slice]:
        step = max(1, num_weights // self.source.shape[1])
        return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


@dataclass(frozen=True)
class Tally:
    """Sums over a part of one weight."""

    num_moved: int = 0
    num_frozen: int = 0
    energy: float = 0.0
    change: float = 0.0
    unplaced_energy: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num_moved + other.num_moved,
            self.num_frozen + other.num_frozen,
            self.energy + other.energy,
            self.change + other.change,
            self.unplaced_energy + other.unplaced_energy,
        )

    def relative_change(self) -> float:
        """``|W' - W| / |W|`` in the Frobenius norm."""
        return float((self.change / self.energy) ** 0.5) if self.energy else 0.0

    def check(self, grid: Grid, name: str) -> None:
        """Refuse a weight of which too much could not be placed.

        Raises:
            UnguardableError: Too much of its energy keeps its value.
        """
        if self.unplaced_energy > _MAX_UNPLACED_ENERGY * self.energy:
            raise UnguardableError(
                f"{name} cannot be guarded: {self.unplaced_energy / self.energy:.1%} of its energy lies in blocks so "
                f"small that the levels of {grid.name} cannot be told apart",
                remedy="Leave the tensor out with --ignore, or guard the checkpoint that this one was cast down from.",
            )


def _tally(lattice: Lattice, source: Tensor, guarded: Tensor, codes: Tensor, num_weights: int) -> Tally:
    """Count over one run; of a short last block only the weights and not what fills it up."""
    unplaced = 0.0
    all_frozen = lattice.frozen.all(dim=1)
    if all_frozen.any():
        inner = lattice.blocks[all_frozen]
        unplaced = float(inner[~lattice.grid.scale_holders(inner)].square().sum())
    return Tally(
        num_moved=int((codes != lattice.nearest).view(-1)[:num_weights].sum()),
        num_frozen=int(lattice.frozen.view(-1)[:num_weights].sum()),
        energy=float(lattice.blocks.square().sum()),
        change=float((guarded.float() - source.float()).square_().sum()),
        unplaced_energy=unplaced,
    )
