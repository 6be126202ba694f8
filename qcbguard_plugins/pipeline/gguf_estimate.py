"""What a run on a GGUF file would do and cost, before it starts."""

from __future__ import annotations

from collections import Counter

import torch

from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.checkpoint.gguf_reader import GgufTensor
from qcbguard_plugins.pipeline.budget import require_room_for_gguf
from qcbguard_plugins.pipeline.estimate import PlannedTensor, PlanReport, seconds_per_weight
from qcbguard_plugins.pipeline.gguf_plan import GgufPlan
from qcbguard_plugins.pipeline.settings import Guard


def describe_gguf_plan(plan: GgufPlan, guard: Guard, budget_bytes: int | None = None) -> PlanReport:
    """Put the plan for a GGUF file into a report: the type of every tensor, memory and time.

    Args:
        plan: The plan.
        guard: The method.
        budget_bytes: What the process may hold; by default what the machine has left.

    Raises:
        MemoryBudgetError: It cannot be done within the budget.
        MissingDependencyError: A type needs the real quantizer and there is none.
    """
    guarded = [
        PlannedTensor(
            name=tensor.name,
            shape=_matrix_shape(tensor),
            dtype=tensor.type_name,
            action="guard",
            format=f"gguf:{plan.types[tensor.name]}",
        )
        for tensor in plan.targets
    ]
    ignored = [
        PlannedTensor(
            name=name,
            shape=_matrix_shape(plan.file.tensors[name]),
            dtype=plan.file.tensors[name].type_name,
            action="ignore",
        )
        for name in plan.ignored
    ]
    return PlanReport(
        source=plan.file.path.name,
        format=f"gguf:{plan.recipe}",
        method=guard.method.name,
        tensors=tuple(guarded + ignored),
        peak_bytes=require_room_for_gguf(plan.targets, budget_bytes),
        estimated_s=_seconds(plan, guard),
        types_from=plan.types_from,
    )


def _matrix_shape(tensor: GgufTensor) -> tuple[int, int]:
    """Rows and columns, the matrices of a stack one below the other."""
    columns = tensor.shape[-1]
    return tensor.num_weights // columns, columns


def _seconds(plan: GgufPlan, guard: Guard) -> float:
    """The time of a small weight of each type and dtype, scaled to all that are like it."""
    num_weights: Counter[tuple[str, torch.dtype]] = Counter()
    for tensor in plan.targets:
        assert tensor.dtype is not None, "the plan has full-precision tensors only"
        num_weights[plan.types[tensor.name], tensor.dtype] += tensor.num_weights
    total = 0.0
    for (type_name, dtype), count in num_weights.items():
        grid = gguf_grid(type_name, outtype=dtype, library_path=plan.options.library_path)
        grid.min_landed = 0.0
        total += seconds_per_weight(grid, guard.method, dtype) * count
    return total
