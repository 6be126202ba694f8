"""How much memory a run takes at its peak, said before it starts, and what it does to stay within a budget."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qcbguard_plugins._util.memory import budget_or_available, require_room, resident_bytes
from qcbguard_plugins.checkpoint import TensorEntry
from qcbguard_plugins.defenses.base import WholeModelDefense
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.plan import FolderPlan, Plan
from qcbguard_plugins.pipeline.segments import bytes_in_segments, can_be_segmented
from qcbguard_plugins.pipeline.settings import Guard

# Bytes a weight that one tensor takes on its way, measured; benchmarks/speed/memory.py compares them with real runs.
# What a data-free method takes is the grid's to say.
# Error feedback: the weight, its grid, the draws and the best of them.
_FED_BACK = 34.0
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


def plan_memory(plan: FolderPlan, guard: Guard, budget_bytes: int | None = None) -> MemoryPlan:
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
        largest = max(plan.targets, key=lambda target: _rounding_bytes(target, guard))
        peak = fixed + _rounding_bytes(largest, guard)
        require_room(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights needs most")
        return MemoryPlan(peak)
    working = fixed + _MODEL_SLACK_BYTES + _calibration_bytes(plan, guard)
    itemsize = model_dtype(plan.targets).itemsize
    sizes = {key: entry_weights(entry) for key, entry in plan.checkpoint.tensors.items()}
    whole = working + sum(sizes.values()) * itemsize + round(guard.method.bytes_per_weight * plan.num_weights)
    if whole <= budget_or_available(budget_bytes) or isinstance(guard.method, WholeModelDefense):
        require_room(whole, budget_bytes, f"{guard.method.name} works on the whole model")
        return MemoryPlan(whole)
    outside, block = _outside_and_block(sizes)
    streamed = working + (outside + block) * itemsize
    require_room(streamed, budget_bytes, "the largest block and its Hessians must be in memory at once")
    return MemoryPlan(streamed, streamed=True)


def plan_gguf_memory(plan: Plan, budget_bytes: int | None = None) -> MemoryPlan:
    """Check that the largest tensor of a GGUF file can be guarded within a budget.

    Args:
        plan: What to guard.
        budget_bytes: What the process may hold; by default what the machine has left.

    Raises:
        MemoryBudgetError: It cannot.
    """
    largest = max(plan.targets, key=lambda target: target.num_weights)
    # Stacked experts are worked on one by one, and their outcomes wait for the last.
    matrix = largest.num_weights // largest.num_matrices
    stored = 2 * largest.dtype.itemsize * largest.num_weights
    peak = resident_bytes() + _SLACK_BYTES + stored + round(largest.grids[0].bytes_per_weight * matrix)
    require_room(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights is guarded in one piece")
    return MemoryPlan(peak)


def model_dtype(targets: Iterable[Target]) -> torch.dtype:
    """The dtype in which a model is run in full precision: one that holds all its targets."""
    return functools.reduce(torch.promote_types, {target.dtype for target in targets})


def _rounding_bytes(target: Target, guard: Guard) -> int:
    """One target that is guarded without calibration."""
    if can_be_segmented(target, guard):
        return bytes_in_segments(target)
    stored, read = target.dtype.itemsize, (target.read_dtype or target.dtype).itemsize
    a_weight: float = stored + (read if target.read_dtype not in (None, target.dtype) else 0)
    a_weight += max(grid.bytes_per_weight for grid in target.grids)
    a_weight += stored * target.transposed + (len(target.grids) > 1) * (read + 8)
    return round(a_weight * target.num_weights)


def _calibration_bytes(plan: FolderPlan, guard: Guard) -> int:
    """Hidden states and the Hessians of a block, and what is larger: a batch on its way, or the weight worked on."""
    calibration = guard.calibration
    hidden = min(target.shape[1] for target in plan.targets)
    widest = max(target.shape[1] for target in plan.targets)
    largest = max(target.num_weights for target in plan.targets)
    tokens = calibration.num_sequences * calibration.sequence_length
    batch = min(8, calibration.num_sequences) * calibration.sequence_length
    # The inputs of attention, of its output, of the MLP and of its output.
    entries = 3 * hidden**2 + widest**2
    kept = tokens * hidden * model_dtype(plan.targets).itemsize + _HESSIAN * entries
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
