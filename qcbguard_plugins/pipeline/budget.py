"""How much memory a run takes at its peak, said before it starts, and what it does to stay within a budget."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcbguard_plugins.defenses.base import WholeModelDefense
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.pipeline.segments import bytes_in_one_pass, goes_in_one_pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcbguard_plugins.checkpoint import TensorEntry
    from qcbguard_plugins.checkpoint.gguf_reader import GgufTensor
    from qcbguard_plugins.pipeline.plan import Plan
    from qcbguard_plugins.pipeline.settings import Guard
    from qcbguard_plugins.pipeline.target import Target
from qcbguard_plugins._util.memory import budget_or_available, require_room, resident_bytes

# Bytes a weight that one tensor takes on its way, measured; benchmarks/memory.py compares them with real runs.
# Data-free: its codes, and what the stock quantizer makes of it when it is verified.
_ROUNDED = 2.0
# A ggml type is searched with several float32 copies.
_LANDED = 10.0
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
        require_room(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights needs most")
        return MemoryPlan(peak)
    working = fixed + _MODEL_SLACK_BYTES + _calibration_bytes(plan, guard)
    itemsize = model_dtype(plan).itemsize
    sizes = {key: entry_weights(entry) for key, entry in plan.checkpoint.tensors.items()}
    whole = working + sum(sizes.values()) * itemsize + round(guard.method.bytes_per_weight * plan.num_weights)
    if whole <= budget_or_available(budget_bytes) or isinstance(guard.method, WholeModelDefense):
        require_room(whole, budget_bytes, f"{guard.method.name} works on the whole model")
        return MemoryPlan(whole)
    outside, block = _outside_and_block(sizes)
    streamed = working + (outside + block) * itemsize
    require_room(streamed, budget_bytes, "the largest block and its Hessians must be in memory at once")
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
    require_room(peak, budget_bytes, f"{largest.name} of {largest.num_weights} weights is guarded in one piece")
    return peak


def model_dtype(plan: Plan) -> torch.dtype:
    """The dtype in which a model is run in full precision: one that holds all its targets."""
    return functools.reduce(torch.promote_types, {target.dtype for target in plan.targets})


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
