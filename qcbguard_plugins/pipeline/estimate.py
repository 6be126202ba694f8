"""What a run will cost, before it starts: memory from the plan, time from a small measurement on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.records import Record, Report
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor
from qcbguard_plugins.defenses import Defense, Stochastic
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.pipeline.budget import MemoryPlan
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.guard_weight import guard_weight

_PROBE_SHAPE, _WARM_UP_SHAPE = (512, 1024), (2, 1024)
_MATMUL_SIZE = 768


class PlannedTensor(Record):
    """One target tensor and what will be done to it.

    Attributes:
        name: Its name.
        shape: ``[out_features, in_features]``, the matrices of a stack one below the other; ``None`` where ignored.
        dtype: Dtype in which it is stored.
        action: Whether it is guarded.
        formats: The formats that it is guarded for.
    """

    name: str
    shape: tuple[int, int] | None = None
    dtype: str = ""
    action: Literal["guard", "ignore"]
    formats: tuple[str, ...] = ()


class PlanReport(Report):
    """What a run would do.

    Attributes:
        source: Name of what is guarded.
        formats: The formats.
        method: The defense.
        tensors: All targets.
        peak_bytes: Peak of the resident memory of a process.
        streamed: Whether the model is read block by block.
        estimated_s: Seconds that the run takes.
        types_from: Where the types of a GGUF recipe come from.
        uncovered: Tensors that the quantizer leaves alone and another of the format would take.
    """

    schema_version: Literal[2] = 2
    kind: Literal["plan"] = "plan"
    source: str
    formats: tuple[str, ...]
    method: str
    tensors: tuple[PlannedTensor, ...]
    peak_bytes: int
    streamed: bool = False
    estimated_s: float
    types_from: str = ""
    uncovered: tuple[UncoveredTensor, ...] = ()

    @property
    def num_guarded(self) -> int:
        return sum(tensor.action == "guard" for tensor in self.tensors)


def describe_plan(plan: Plan, guard: Guard, memory: Callable[[], MemoryPlan]) -> PlanReport:
    """Put a plan into a report, with its cost.

    Args:
        plan: The plan.
        guard: The method.
        memory: What the run will hold, such as :func:`~qcbguard_plugins.pipeline.budget.plan_memory` says.

    Raises:
        MemoryBudgetError: It cannot be done within the budget.
    """
    guarded = [
        PlannedTensor(
            name=target.name,
            shape=(target.num_matrices * target.shape[0], target.shape[1]),
            dtype=dtype_name(target.dtype),
            action="guard",
            formats=target.formats,
        )
        for target in plan.targets
    ]
    ignored = [PlannedTensor(name=name, action="ignore") for name in plan.ignored]
    planned = memory()
    seconds = _calibrated_seconds if guard.method.needs_calibration else _rounding_seconds
    return PlanReport(
        versions=versions(),
        source=plan.source,
        formats=plan.formats,
        method=guard.method.name,
        tensors=tuple(guarded + ignored),
        peak_bytes=planned.peak_bytes,
        streamed=planned.streamed,
        estimated_s=seconds(plan, guard),
        types_from=plan.facts.get("types_from", ""),
        uncovered=plan.uncovered,
    )


def seconds_per_weight(grid: Grid, method: Defense, dtype: torch.dtype = torch.float32) -> float:
    """The time of one small weight, over the number of its entries."""
    # The first call may compile kernels.
    for shape in (_WARM_UP_SHAPE, _PROBE_SHAPE):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        start = time.perf_counter()
        guard_weight(weight, grid.probe(), method, seed=0, name="probe")
    return (time.perf_counter() - start) / weight.numel()


def _rounding_seconds(plan: Plan, guard: Guard) -> float:
    """The time of a small weight on each grid and of each dtype, scaled to all that are like it."""
    method = Stochastic() if guard.method.needs_calibration else guard.method
    num_weights: Counter[tuple[str, torch.dtype]] = Counter()
    grids: dict[str, Grid] = {}
    for target in plan.targets:
        grid = target.grids[0]
        grids[grid.name] = grid
        num_weights[grid.name, target.dtype] += target.num_weights
    return sum(seconds_per_weight(grids[name], method, dtype) * count for (name, dtype), count in num_weights.items())


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
    return operations / rate + _rounding_seconds(plan, guard)
