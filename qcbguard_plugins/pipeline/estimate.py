"""What a run will cost, before it starts: memory from the plan, time from a small measurement on this machine."""

from __future__ import annotations

import time
from typing import Literal

import torch

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.records import Record
from qcbguard_plugins.defenses import Defense, Stochastic
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.pipeline.budget import plan_memory
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.guard_weight import guard_weight

_PROBE_SHAPE, _WARM_UP_SHAPE = (512, 1024), (2, 1024)
_MATMUL_SIZE = 768


class PlannedTensor(Record):
    """One target tensor and what will be done to it.

    Attributes:
        format: The format that it is guarded for, where that is not the run's.
    """

    name: str
    shape: tuple[int, int] | None = None
    dtype: str = ""
    action: Literal["guard", "ignore"]
    format: str = ""


class PlanReport(Record):
    """What a run would do.

    Attributes:
        types_from: Where the types of a GGUF recipe come from.
    """

    schema_version: Literal[1] = 1
    kind: Literal["plan"] = "plan"
    source: str
    format: str
    method: str
    tensors: tuple[PlannedTensor, ...]
    peak_bytes: int
    streamed: bool = False
    estimated_s: float
    types_from: str = ""

    @property
    def num_guarded(self) -> int:
        return sum(tensor.action == "guard" for tensor in self.tensors)


def describe_plan(plan: Plan, guard: Guard, budget_bytes: int | None = None) -> PlanReport:
    """Put a plan into a report, with its cost within a budget.

    See :func:`~qcbguard_plugins.pipeline.budget.plan_memory` for the budget.
    """
    guarded = [
        PlannedTensor(name=t.name, shape=t.shape, dtype=dtype_name(t.dtype), action="guard") for t in plan.targets
    ]
    ignored = [PlannedTensor(name=name, action="ignore") for name in plan.ignored]
    calibrated = guard.method.needs_calibration
    memory = plan_memory(plan, guard, budget_bytes)
    return PlanReport(
        source=plan.checkpoint.path.resolve().name,
        format=plan.format,
        method=guard.method.name,
        tensors=tuple(guarded + ignored),
        peak_bytes=memory.peak_bytes,
        streamed=memory.streamed,
        estimated_s=_calibrated_seconds(plan, guard) if calibrated else _rounding_seconds(plan, guard.method),
    )


def seconds_per_weight(grid: Grid, method: Defense, dtype: torch.dtype = torch.float32) -> float:
    """The time of one small weight, over the number of its entries."""
    # The first call may compile kernels.
    for shape in (_WARM_UP_SHAPE, _PROBE_SHAPE):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        start = time.perf_counter()
        guard_weight(weight, grid, method, seed=0, name="probe")
    return (time.perf_counter() - start) / weight.numel()


def _rounding_seconds(plan: Plan, method: Defense) -> float:
    return seconds_per_weight(plan.grids(plan.targets[0])[0], method) * plan.num_weights


def _calibrated_seconds(plan: Plan, guard: Guard) -> float:
    """The arithmetic of the forward passes and of the method, at the measured rate of a product."""
    sequences, length = guard.calibration.num_sequences, guard.calibration.sequence_length
    operations = sum(
        2.0 * sequences * length * target.num_weights + guard.method.operations(target.shape, sequences, length)
        for target in plan.targets
    )
    matrix = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    start = time.perf_counter()
    matrix @ matrix
    rate = 2 * _MATMUL_SIZE**3 / (time.perf_counter() - start)
    return operations / rate + _rounding_seconds(plan, Stochastic())
