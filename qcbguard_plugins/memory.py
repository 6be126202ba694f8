"""How much memory a run takes at its peak, said before it starts, and what it does to stay within a budget."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcbguard_plugins.defenses.base import WholeModelDefense
from qcbguard_plugins.errors import MemoryBudgetError
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.one_pass import bytes_in_one_pass, goes_in_one_pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qcbguard_plugins.checkpoint import TensorEntry
    from qcbguard_plugins.checkpoint.gguf_reader import GgufTensor
    from qcbguard_plugins.checkpoint.source import WeightSource
    from qcbguard_plugins.grids import Grid
    from qcbguard_plugins.guard import Guard
    from qcbguard_plugins.plan import Plan, Target

_STATUS = Path("/proc/self/status")

# Bytes a weight that one tensor takes on its way, measured; benchmarks/memory.py compares them with real runs.
# Data-free: its codes, and what the stock quantizer makes of it when it is verified.
_ROUNDED = 2.0
# A ggml type is searched with several float32 copies.
_LANDED = 10.0
# Error feedback: the weight, its grid, the draws and the best of them.
_FED_BACK = 34.0
# Bytes a weight that is tested for an attack, and the libraries that are loaded for it; a ggml type is searched.
_SCANNED, _SCANNED_ON_GGML = 95.0, 125.0
_SCAN_BYTES, _GGML_SCAN_BYTES = 25 << 20, 60 << 20
# Bytes an entry of a Hessian: itself, and once more while batches are added; a copy in order and factors in float64.
_HESSIAN, _ADDED, _FACTORS = 4.0, 4.0, 36.0
# What every run needs besides: libraries that are loaded late, buffers, the allocator's slack; and what running a model
# adds to that.
_SLACK_BYTES, _MODEL_SLACK_BYTES = 100 << 20, 90 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds in memory.

    Attributes:
        peak_bytes: Peak of its resident memory, the program included.
        streamed: Whether the model is read block by block.
    """

    peak_bytes: int
    streamed: bool = False


def plan_memory(plan: Plan, guard: Guard, budget_bytes: int | None = None) -> MemoryPlan:
    """Decide how a checkpoint is guarded within a budget.

    Args:
        plan: What to guard.
        guard: The method.
        budget_bytes: What one process may hold; by default what the machine has left.

    Raises:
        MemoryBudgetError: It cannot be done within the budget.
    """
    fixed = resident_bytes() + _SLACK_BYTES
    if not guard.method.needs_calibration:
        largest = max(plan.targets, key=lambda target: _rounding_bytes(plan, target, guard))
        peak = fixed + _rounding_bytes(plan, largest, guard)
        _require(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights needs most")
        return MemoryPlan(peak)
    working = fixed + _MODEL_SLACK_BYTES + _calibration_bytes(plan, guard)
    itemsize = model_dtype(plan).itemsize
    sizes = {key: entry_weights(entry) for key, entry in plan.checkpoint.tensors.items()}
    whole = working + sum(sizes.values()) * itemsize + round(guard.method.bytes_per_weight * plan.num_weights)
    if whole <= _budget(budget_bytes) or isinstance(guard.method, WholeModelDefense):
        _require(whole, budget_bytes, f"{guard.method.name} works on the whole model")
        return MemoryPlan(whole)
    outside, block = _outside_and_block(sizes)
    streamed = working + (outside + block) * itemsize
    _require(streamed, budget_bytes, "the largest block and its Hessians must be in memory at once")
    return MemoryPlan(streamed, streamed=True)


def require_room_for_gguf(targets: Sequence[GgufTensor], budget_bytes: int | None = None) -> int:
    """Check that the largest tensor of a GGUF file can be guarded within a budget.

    Args:
        targets: The tensors to guard.
        budget_bytes: What the process may hold; by default what the machine has left.

    Returns:
        The peak of its resident memory, in bytes.

    Raises:
        MemoryBudgetError: It cannot.
    """
    largest = max(targets, key=lambda tensor: tensor.num_weights)
    matrix = largest.shape[-1] * largest.shape[-2]
    # Stacked experts are worked on one by one, and their outcomes wait for the last.
    peak = resident_bytes() + _SLACK_BYTES + 2 * largest.num_bytes + round(_LANDED * matrix)
    _require(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights is guarded in one piece")
    return peak


def require_room_for_scan(
    source: WeightSource, grids: Iterable[Grid], max_weights: int, budget_bytes: int | None = None
) -> int:
    """Check that the largest tensor of a model can be scanned within a budget.

    Args:
        source: The model.
        grids: Those that it is tested on.
        max_weights: Weights of one tensor that are tested.
        budget_bytes: What the process may hold; by default what the machine has left.

    Returns:
        The peak of its resident memory, in bytes.

    Raises:
        MemoryBudgetError: It cannot.
    """
    largest = max(source.targets, key=lambda target: target.num_bytes)
    tested = min(max_weights, max(target.num_weights for target in source.targets))
    searched = any(isinstance(grid, GgmlGrid) for grid in grids)
    peak = resident_bytes() + (_GGML_SCAN_BYTES if searched else _SCAN_BYTES)
    peak += largest.num_bytes * (1 + largest.transposed)
    peak += round((_SCANNED_ON_GGML if searched else _SCANNED) * tested)
    why = f"{largest.name} of {largest.num_weights} weights is read in one piece, {tested} weights are tested at once"
    _require(peak, budget_bytes, why, remedy="Raise --max-memory or free some, or leave --exhaustive out.")
    return peak


def model_dtype(plan: Plan) -> torch.dtype:
    """The dtype in which a model is run in full precision: one that holds all its targets."""
    return functools.reduce(torch.promote_types, {target.dtype for target in plan.targets})


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    return read_status("VmRSS") or 0


def available_bytes() -> int:
    """Memory that this process could hold: what it has and what the machine has left."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    left = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), pages)
    return left + resident_bytes()


def read_status(field: str) -> int | None:
    """A size in ``/proc/self/status``, in bytes; ``None`` where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _rounding_bytes(plan: Plan, target: Target, guard: Guard) -> int:
    """One tensor that is guarded without calibration."""
    grids = plan.grids(target)
    if goes_in_one_pass(target, grids, guard):
        return bytes_in_one_pass(target, grids[0])
    stored, read = target.dtype.itemsize, target.read_dtype.itemsize
    a_weight: float = stored + (read if target.read_dtype != target.dtype else 0)
    a_weight += _LANDED if any(isinstance(grid, GgmlGrid) for grid in grids) else _ROUNDED
    a_weight += stored * target.transposed + (len(grids) > 1) * (read + 8)
    return round(a_weight * target.num_weights)


def _calibration_bytes(plan: Plan, guard: Guard) -> int:
    """Hidden states and the Hessians of a block, and what is larger: a batch on its way, or the weight worked on."""
    calibration = guard.calibration
    hidden = min(target.shape[1] for target in plan.targets)
    widest = max(target.shape[1] for target in plan.targets)
    largest = max(target.num_weights for target in plan.targets)
    tokens = calibration.num_sequences * calibration.sequence_length
    batch = min(8, calibration.num_sequences) * calibration.sequence_length
    # The inputs of attention, of its output, of the MLP and of its output.
    entries = 3 * hidden**2 + widest**2
    kept = tokens * hidden * model_dtype(plan).itemsize + _HESSIAN * entries
    adding = batch * widest * 4 * 4 + _ADDED * entries
    return round(kept + max(adding, _FACTORS * widest**2 + 8 * largest, _FED_BACK * largest))


def _outside_and_block(sizes: dict[str, int]) -> tuple[int, int]:
    """Weights outside all decoder blocks, and of the largest block, from the numbers in the tensors' names."""
    blocks: dict[str, int] = {}
    for key, size in sizes.items():
        block = _block_of(key)
        blocks[block] = blocks.get(block, 0) + size
    return blocks.pop("", 0), max(blocks.values(), default=0)


def _block_of(key: str) -> str:
    """The part of a tensor's name up to the first number; empty for a tensor outside all blocks."""
    parts = key.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def entry_weights(entry: TensorEntry) -> int:
    """Number of weights of a tensor."""
    return torch.Size(entry.shape).numel()


def _budget(budget_bytes: int | None) -> int:
    return available_bytes() if budget_bytes is None else budget_bytes


def _require(
    peak: int,
    budget_bytes: int | None,
    why: str,
    remedy: str = "Raise --max-memory or free some; --method stochastic needs least.",
) -> None:
    budget = _budget(budget_bytes)
    if peak <= budget:
        return
    limit = "--max-memory" if budget_bytes is not None else "the memory that is left"
    raise MemoryBudgetError(
        f"this run needs about {human_bytes(peak)} of memory, and {limit} is {human_bytes(budget)}: {why}",
        remedy=remedy,
    )
