"""Turn a defense's choices into a weight that the stock quantizer rounds exactly as chosen.

Every weight that is not frozen becomes a point of the stock grid, in the dtype in which it will be stored. A grid point
lies well inside its cell, so the code survives the cast to that dtype, a kernel that differs by an ulp, and a later
load in another 16- or 32-bit dtype of a 4-bit grid. Scale holders keep their value, so no scale moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import Defense, Evidence, rng_for
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import Grid, Lattice, cut_blocks
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.guarded_weight import GuardedWeight, codes_digest
from qcbguard_plugins.landing import guard_on_ggml

__all__ = ["DTYPES", "GuardedWeight", "codes_digest", "guard_weight"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Blocks are worked on in runs of about this many weights, which stay in a processor's cache.
_WEIGHTS_PER_RUN = 1 << 17

# A frozen weight that holds no scale belongs to a block too small for its dtype. Such blocks may carry at most this
# share of a tensor's energy; above it a rescaled layer could hide an attack in them.
_MAX_UNPLACED_ENERGY = 1e-6


def guard_weight(
    weight: Tensor, grid: Grid, defense: Defense, *, seed: int, name: str, hessian: Tensor | None = None
) -> GuardedWeight:
    """Guard one weight.

    Args:
        weight: Float32, float16 or bfloat16 ``[out_features, in_features]``; left as it is.
        grid: The grid of the stock quantizer.
        defense: The method.
        seed: Seed of the run.
        name: Name of the tensor; with the seed it fixes the random draws.
        hessian: Float32 ``[in_features, in_features]``, for a method that needs calibration.

    Raises:
        UnguardableError: The weight is empty, not a matrix or of another dtype, holds NaN or infinity, or is so small
            that its dtype cannot tell the levels of the grid apart.
    """
    _check(weight, name)
    if isinstance(grid, GgmlGrid):
        return guard_on_ggml(weight, grid, defense, Evidence(rng_for(seed, name), hessian), name)
    shape = (weight.shape[0], weight.shape[1])
    source = cut_blocks(weight, grid.block_size_of(shape))
    read = cut_blocks(grid.read(weight), source.shape[1])
    evidence = Evidence(rng_for(seed, name), hessian)
    guarded = torch.empty_like(source)
    codes = torch.empty_like(source, dtype=torch.uint8)
    tally = _Tally()
    for run in _runs(read, whole=defense.needs_calibration):
        lattice = grid.lattice(read[run], shape, weight.dtype)
        if not torch.isfinite(lattice.scale).all():
            raise UnguardableError(f"{name} cannot be guarded: it holds NaN or infinity as {grid.name} reads it")
        codes[run] = torch.where(lattice.frozen, lattice.nearest, defense.choose(lattice, evidence))
        points = lattice.dequantize(codes[run])
        guarded[run] = torch.where(lattice.frozen, source[run], points.to(weight.dtype))
        num_weights = min(weight.numel() - run.start * source.shape[1], source[run].numel())
        tally.add(lattice, source[run], guarded[run], codes[run], num_weights)
    tally.check(grid, weight.dtype, name)
    result = guarded.view(-1)[: weight.numel()].view(shape)
    planned = codes.view(-1)[: weight.numel()].view(shape)
    if tally.unplaced_energy:
        # Blocks too small to be guarded keep plain rounding, of which only the exact one is what the quantizer does.
        planned = torch.where(result == weight, grid.quantize(result), planned)
    return GuardedWeight(
        weight=result,
        codes=planned,
        num_moved=tally.num_moved,
        num_frozen=tally.num_frozen,
        relative_change=tally.relative_change(),
        num_landed=weight.numel(),
        digest=codes_digest(planned),
    )


def _check(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnguardableError(f"{name} cannot be guarded: its shape is {tuple(weight.shape)}, not a non-empty matrix")
    if weight.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnguardableError(
            f"{name} cannot be guarded: its dtype is {str(weight.dtype).removeprefix('torch.')}",
            remedy=f"Guard a full-precision checkpoint ({wanted}).",
        )


def _runs(blocks: Tensor, *, whole: bool) -> Iterator[slice]:
    """Slices of consecutive blocks; a method that needs calibration gets all of them at once."""
    step = blocks.shape[0] if whole else max(1, _WEIGHTS_PER_RUN // blocks.shape[1])
    return (slice(start, start + step) for start in range(0, blocks.shape[0], step))


class _Tally:
    """Sums over the runs of one weight."""

    def __init__(self) -> None:
        self.num_moved = 0
        self.num_frozen = 0
        self.energy = 0.0
        self.change = 0.0
        self.unplaced_energy = 0.0

    def add(self, lattice: Lattice, source: Tensor, guarded: Tensor, codes: Tensor, num_weights: int) -> None:
        # What fills up a short last block is no weight and is not counted.
        self.num_moved += int((codes != lattice.nearest).view(-1)[:num_weights].sum())
        self.num_frozen += int(lattice.frozen.view(-1)[:num_weights].sum())
        self.energy += float(lattice.blocks.square().sum())
        self.change += float((guarded.float() - source.float()).square_().sum())
        all_frozen = lattice.frozen.all(dim=1)
        if all_frozen.any():
            inner = lattice.blocks[all_frozen]
            holders = inner.abs() == inner.abs().amax(dim=1, keepdim=True)
            self.unplaced_energy += float(inner[~holders].square().sum())

    def relative_change(self) -> float:
        return float((self.change / self.energy) ** 0.5) if self.energy else 0.0

    def check(self, grid: Grid, dtype: torch.dtype, name: str) -> None:
        if self.unplaced_energy > _MAX_UNPLACED_ENERGY * self.energy:
            raise UnguardableError(
                f"{name} cannot be guarded: {self.unplaced_energy / self.energy:.1%} of its energy lies in blocks so "
                f"small that {str(dtype).removeprefix('torch.')} cannot hold the levels of {grid.name}",
                remedy="Store the checkpoint in float32, or leave the tensor out with --ignore.",
            )
