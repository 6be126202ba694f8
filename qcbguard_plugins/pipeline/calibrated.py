"""Guard the layers of a model that can be run: for methods that look at its inputs, or at all of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.checkpoint.manifest import TensorRecord
from qcbguard_plugins.defenses import ModelWeight, WholeModelDefense
from qcbguard_plugins.detection.weights.prescreen import looks_attacked
from qcbguard_plugins.errors import CalibrationError, QcbguardError, UncalibratableError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.calibration import calibration_tokens, fit_to_model, self_generated_tokens
from qcbguard_plugins.models.hessians import Weights, WeightsInMemory, gather_hessians
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.models.text_pass import one_line
from qcbguard_plugins.pipeline.guard_target import Evidence, guard_target
from qcbguard_plugins.pipeline.multi_format import coarsest_first
from qcbguard_plugins.pipeline.settings import Guard


def tokens_for(guard: Guard, config: Any, tokenizer: Any) -> Tensor | None:
    """The calibration sequences of a run, int64 ``[num_sequences, sequence_length]``.

    Returns:
        ``None`` for a method that needs none, and where the model is to write them.

    Raises:
        CalibrationError: There is no usable text, or no tokenizer to read it with.
    """
    if not guard.method.needs_calibration:
        return None
    return calibration_tokens(guard.calibration, config, tokenizer)


@torch.no_grad()
def guard_layers(
    model: Any,
    targets: Sequence[Target],
    guard: Guard,
    tokens: Tensor | None,
    progress: Progress | None = None,
    *,
    pending: Collection[str] | None = None,
    weights: Weights | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[tuple[Target, Tensor, TensorRecord]]:
    """Guard the weights of a model in place, one after the other.

    Args:
        model: The model, in full precision.
        targets: Its weights.
        guard: The method, its seed drawn.
        tokens: int64 ``[num_sequences, sequence_length]`` for a method that needs calibration; ``None`` lets the model
            write them.
        progress: Called with the number of weights of each target when it is done.
        pending: Names of the targets to guard, of those that the method shall know of; all of them by default.
        weights: Where the model's weights are; in memory by default.
        group: The processes that share the calibration, each with targets of its own; all of them take every step.

    Yields:
        Each target, its guarded weight as it is to be stored, and the plan for it.
    """
    assert guard.seed is not None, "the seed is drawn once a run"
    weights = weights or WeightsInMemory(model)
    attack_seen = not guard.method.weighs_evidence or group.broadcast(
        group.rank == 0 and looks_attacked(_tested(weights, targets), guard.seed)
    )
    wanted = {target.layer: target for target in targets if pending is None or target.name in pending}
    hessians: Iterator[tuple[str, Tensor | None]] = iter(dict.fromkeys(wanted).items())
    learned: dict[str, Tensor] = {}
    whys: dict[str, str] = {}
    if guard.method.needs_calibration:
        try:
            tokens = _fitting_tokens(model, tokens, guard, group)
        except UncalibratableError as error:
            if isinstance(guard.method, WholeModelDefense):
                raise
            whys = dict.fromkeys(wanted, error.summary)
        else:
            if isinstance(guard.method, WholeModelDefense):
                learned = _learn(model, targets, guard, tokens)
            else:
                hessians = _hessians(model, tokens, targets, set(group.gather(list(wanted))), weights, group, whys)
    for layer, hessian in hessians:
        if layer not in wanted:
            continue
        target, stored = wanted[layer], model.get_parameter(f"{layer}.weight").data
        is_elsewhere = stored.is_meta  # a layer that text did not reach, of a model that is read block by block
        if is_elsewhere:
            stored = weights.weight(layer)
        evidence = Evidence(hessian, attack_seen, learned.get(layer), whys.get(layer, ""))
        guarded, record = guard_target(target, stored, guard, evidence)
        if not is_elsewhere:
            stored.copy_(guarded)
        yield target, guarded, record
        if progress is not None:
            progress(target.num_weights)


def _fitting_tokens(model: Any, tokens: Tensor | None, guard: Guard, group: ProcessGroup) -> Tensor:
    """The sequences as the model can take them.

    Raises:
        UncalibratableError: There are none for this model.
    """
    assert guard.seed is not None, "the seed is drawn once a run"
    if tokens is None:
        tokens = self_generated_tokens(guard.calibration, model, seed=guard.seed)
    return fit_to_model(group.broadcast(tokens).to(model.device), model)


def _learn(model: Any, targets: Sequence[Target], guard: Guard, tokens: Tensor) -> dict[str, Tensor]:
    """What a whole-model method learns.

    Raises:
        CalibrationError: The model cannot be trained on text.
    """
    assert isinstance(guard.method, WholeModelDefense) and guard.seed is not None
    try:
        return guard.method.learn(model, _model_weights(model, targets), tokens, guard.seed)
    except QcbguardError:
        raise
    except Exception as error:  # a model may break in any way on inputs that it was not made for
        raise CalibrationError(
            f"{guard.method.name} cannot learn from {type(model).__name__}: {one_line(error)}",
            remedy="Use feedback or stochastic: they take models of every kind.",
        ) from error


def _hessians(
    model: Any,
    tokens: Tensor,
    targets: Sequence[Target],
    wanted: Collection[str],
    weights: Weights,
    group: ProcessGroup,
    whys: dict[str, str],
) -> Iterator[tuple[str, Tensor | None]]:
    """Hessians by layer name; ``None`` for layers that have no inputs, and ``whys`` says why."""
    by_module = {target.calibrated_by or target.layer: target.layer for target in targets if target.has_inputs}
    skipped = {module for module, layer in by_module.items() if layer not in wanted}
    unreached: dict[str, str] = {}
    groups = gather_hessians(
        model, tokens, list(by_module), skip=skipped, weights=weights, group=group, unreached=unreached
    )
    for hessians in groups:
        for module, hessian in hessians.items():
            yield by_module[module], hessian
    whys.update({by_module[module]: why for module, why in unreached.items()})
    yield from dict.fromkeys(by_module[module] for module in unreached).items()
    # Last, because the blocks that were still to come had read the full-precision table.
    for target in targets:
        if not target.has_inputs and target.layer in wanted:
            yield target.layer, None


def _tested(weights: Weights, targets: Sequence[Target]) -> Iterator[tuple[str, Tensor, Grid]]:
    """The weights that the tests look at: those whose choices depend on what they see."""
    for target in targets:
        if target.has_inputs:
            weight = target.turn(weights.weight(target.layer))
            yield target.name, weight, coarsest_first(weight, target.grids)[0]


def _model_weights(model: Any, targets: Sequence[Target]) -> Iterator[ModelWeight]:
    """What a whole-model method chooses for."""
    for target in targets:
        if not target.has_inputs:
            continue
        readers = dict.fromkeys([target.layer, target.calibrated_by or target.layer])
        modules = tuple(model.get_submodule(reader) for reader in readers)
        weight = target.turn(modules[0].weight.data)
        grid = coarsest_first(weight, target.grids)[0]
        yield ModelWeight(target.layer, modules, target.transposed, grid.planned_lattice_of(weight))
