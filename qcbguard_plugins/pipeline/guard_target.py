"""One target through the guard: what every front door does with each weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.checkpoint.manifest import TensorRecord, TensorVerdict
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.multi_format import coarsest_first, require_all_grids
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.digests import combined_digest, stacked_digest
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight


@dataclass(frozen=True)
class Evidence:
    """What is known of a weight besides its values.

    Attributes:
        hessian: float32 ``[in_features, in_features]``, for a method that needs calibration.
        looks_attacked: Whether the weight tests saw an attack in the model; true where nobody looked.
        round_up: Bool ``[out_features, in_features]``, what a whole-model method learned.
        why_data_free: Why there is nothing that a method that needs calibration could go by; empty where there is.
    """

    hessian: Tensor | None = None
    looks_attacked: bool = True
    round_up: Tensor | None = None
    why_data_free: str = ""


def guard_target(
    target: Target, stored: Tensor, guard: Guard, evidence: Evidence | None = None, *, overwrite: bool = False
) -> tuple[Tensor, TensorRecord]:
    """Guard one target.

    Args:
        target: The target.
        stored: The weight as it is stored.
        guard: The method, its seed drawn.
        evidence: What is known of the weight.
        overwrite: The memory of ``stored`` may take the outcome.

    Returns:
        The guarded weight as it is to be stored, and the plan for it.

    Raises:
        UnguardableError: It cannot be guarded, or not for all of its formats.
        CalibrationError: The method needs calibration that is not there, or that went wrong.
    """
    evidence = evidence or Evidence()
    is_stack = stored.dim() > 2
    matrices = stored.view(target.num_matrices, *stored.shape[-2:]) if is_stack else [stored]
    results = []
    for index, matrix in enumerate(matrices):
        name = f"{target.name}[{index}]" if is_stack else target.name
        results.append(_guard_matrix(target, name, index, matrix, guard, evidence, overwrite=overwrite))
    weights = [target.turn_back(result.weight) for result in results]
    guarded = weights[0] if len(weights) == 1 else torch.cat(weights)
    return guarded.view(stored.shape), record_of(target, results)


def record_of(target: Target, results: Sequence[GuardedWeight]) -> TensorRecord:
    """What the report keeps of a guarded target, one result for each of its matrices."""
    first = results[0]
    energy = sum(result.energy for result in results)
    change = sum(result.relative_change**2 * result.energy for result in results)
    return TensorRecord(
        name=target.name,
        key=target.key or target.name,
        shape=(target.num_matrices * target.shape[0], target.shape[1]),
        transposed=target.transposed,
        dtype=dtype_name(target.dtype),
        read_dtype=dtype_name(target.read_dtype or target.dtype),
        num_weights=target.num_weights,
        num_moved=sum(result.num_moved for result in results),
        num_frozen=sum(result.num_frozen for result in results),
        relative_change=first.relative_change if len(results) == 1 else (change / energy) ** 0.5 if energy else 0.0,
        num_as_planned=sum(result.num_as_planned for result in results),
        codes_sha256=stacked_digest([result.digest for result in results]),
        formats=target.formats,
        stored_name=target.stored_name,
        chosen=dict(first.chosen),
        why_data_free=first.why_data_free,
    )


def stored_digest(weight: Tensor, grids: Sequence[Grid]) -> str:
    """The digest of what the stock quantizers of some grids store for a weight.

    Args:
        weight: ``[out_features, in_features]`` in the dtype that they read.
        grids: Their grids.
    """
    digests = {grid.name: backend_of(grid.name).stored_digest(weight, grid) for grid in grids}
    return next(iter(digests.values())) if len(digests) == 1 else combined_digest(digests)


def verify_target(target: Target, stored: Tensor, record: TensorRecord) -> TensorVerdict:
    """Ask the stock quantizers what they store for a guarded weight, from each dtype in which it may be read.

    Args:
        target: The target.
        stored: The guarded weight as it is stored.
        record: The plan for it.
    """
    weight = stored.T if target.transposed else stored
    compared: Tensor | None = None
    for dtype in sorted({target.dtype, target.read_dtype or target.dtype}, key=str):
        read = weight.to(dtype)
        if compared is not None and torch.equal(read.float(), compared.float()):
            continue
        compared = read
        if stored_digest(read, target.grids) != record.codes_sha256:
            return TensorVerdict.other_codes(record.name, dtype)
    return TensorVerdict(name=record.name, as_planned=True)


def _guard_matrix(
    target: Target, name: str, index: int, stored: Tensor, guard: Guard, evidence: Evidence, *, overwrite: bool
) -> GuardedWeight:
    assert guard.seed is not None, "the seed is drawn once a run"
    why_data_free = evidence.why_data_free
    if not target.has_inputs and guard.method.needs_calibration:
        why_data_free = "a table that multiplies nothing"
    weight = target.turn(stored)
    grids = coarsest_first(weight, [grid.of_matrix(index) for grid in target.grids])
    guarded = None
    if not why_data_free:
        try:
            guarded = guard_weight(
                weight,
                grids[0],
                guard.method,
                seed=guard.seed,
                name=name,
                hessian=evidence.hessian,
                # Only unbiased rounding serves quantizers of other grids.
                looks_attacked=evidence.looks_attacked or len(grids) > 1,
                round_up=evidence.round_up,
                # With several grids it is compared with the outcome.
                overwrite=overwrite and len(grids) == 1,
            )
        except CalibrationError as error:
            if evidence.hessian is None:
                raise CalibrationError(
                    f"{name}: {error.summary}", details=error.details, remedy=error.remedy
                ) from error
            why_data_free = error.summary
    if guarded is None:
        data_free = guard_weight(weight, grids[0], Stochastic(), seed=guard.seed, name=name)
        guarded = replace(data_free, why_data_free=why_data_free)
    return require_all_grids(weight, guarded, grids, name)
