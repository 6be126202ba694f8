"""Guard a model that is in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcbguard_plugins._util.distributed import ALONE, Team
from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint.manifest import TensorRecord
from qcbguard_plugins.defenses import Defense, ModelWeight, Stochastic, WholeModelDefense
from qcbguard_plugins.detection.weights.prescreen import looks_attacked
from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.calibration import calibration_tokens, self_generated_tokens
from qcbguard_plugins.models.hessians import Weights, WeightsInMemory, gather_hessians
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.target import Layer, as_read
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight


def guard_model(
    model: Any,
    format: str = "nf4",
    guard: Guard | Defense | str = "feedback",
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> list[TensorRecord]:
    """Guard a full-precision model of transformers in place.

    Its linear layers, those that the stock quantizer would take, get weights that it rounds as planned. Save the model
    and quantize it with the stock tool.

    Args:
        model: A ``PreTrainedModel`` with float32, float16 or bfloat16 weights, on any one device.
        format: Such as ``nf4``, ``int8`` or ``gptq-w4g128``; not a GGUF recipe.
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        tokenizer: The model's tokenizer, for calibration from text.
        progress: Called with the number of weights of each layer when it is done.

    Returns:
        A record for each guarded tensor. Embeddings, norms, biases and the output head are unchanged.

    Raises:
        UnguardableError: A weight cannot be guarded; layers before it have been changed.
        CalibrationError: The method needs calibration and there is no way to get it.
    """
    from qcbguard_plugins.backends.layers import quantized_layers

    guard = as_guard(guard).with_seed()
    layers = {
        name: Layer(taken.transposed, grid=get_grid(taken.format), inputs_of=taken.inputs_of)
        for name, taken in quantized_layers(format, model.config).items()
    }
    tokens = None
    if guard.method.needs_calibration:
        tokens = calibration_tokens(guard.calibration, model.config, tokenizer)
    return [
        record_of(guarded, name=f"{name}.weight", transposed=layers[name].transposed)
        for name, guarded in guard_layers(model, layers, get_grid(format), guard, tokens, progress)
    ]


def record_of(
    guarded: GuardedWeight, *, name: str, transposed: bool, key: str | None = None, dtype: torch.dtype | None = None
) -> TensorRecord:
    """What the report keeps of a guarded weight; ``key`` and ``dtype`` are the checkpoint's where they differ."""
    return TensorRecord(
        name=name,
        key=key or name,
        shape=(guarded.weight.shape[0], guarded.weight.shape[1]),
        transposed=transposed,
        dtype=dtype_name(dtype or guarded.weight.dtype),
        read_dtype=dtype_name(guarded.weight.dtype),
        num_weights=guarded.weight.numel(),
        num_moved=guarded.num_moved,
        num_frozen=guarded.num_frozen,
        relative_change=guarded.relative_change,
        num_landed=guarded.num_landed,
        codes_sha256=guarded.digest,
        settled=dict(guarded.settled),
    )


@torch.no_grad()
def guard_layers(
    model: Any,
    layers: Mapping[str, Layer],
    grid: Grid,
    guard: Guard,
    tokens: Tensor | None,
    progress: Progress | None = None,
    *,
    pending: Collection[str] | None = None,
    weights: Weights | None = None,
    team: Team = ALONE,
) -> Iterator[tuple[str, GuardedWeight]]:
    """Guard the named layers of a model in place, one after the other.

    Args:
        model: The model, in full precision.
        layers: Their names, and how each weight is stored and read.
        grid: Grid of the stock quantizer, for layers that name none.
        guard: The method, its seed drawn.
        tokens: int64 ``[num_sequences, sequence_length]`` for a method that needs calibration; ``None`` lets the model
            write them.
        progress: Called with the number of weights of each layer when it is done.
        pending: The layers to guard, of those that the method shall know of; all of them by default.
        weights: Where the model's weights are; in memory by default.
        team: The processes that share the calibration, each with layers of its own; all of them take every step.

    Yields:
        The name of each layer and its guarded weight, ``[out_features, in_features]`` in the dtype that will be read.
    """
    assert guard.seed is not None, "the seed is drawn once a run"
    weights = weights or WeightsInMemory(model)
    attack_seen = not guard.method.weighs_evidence or team.first(
        team.rank == 0 and looks_attacked(_tested(weights, layers, grid), guard.seed)
    )
    wanted = {name: layer for name, layer in layers.items() if pending is None or name in pending}
    groups: Iterator[Mapping[str, Tensor | None]] = iter([dict.fromkeys(wanted)])
    learned: dict[str, Tensor] = {}
    if guard.method.needs_calibration:
        if tokens is None:
            tokens = self_generated_tokens(guard.calibration, model, seed=guard.seed)
        tokens = team.first(tokens).to(model.device)
        if isinstance(guard.method, WholeModelDefense):
            learned = guard.method.learn(model, _targets(model, layers, grid), tokens, guard.seed)
        else:
            groups = _hessians(model, tokens, layers, set(team.gather(list(wanted))), weights, team)
    for hessians in groups:
        for name, hessian in hessians.items():
            if name not in wanted:
                continue
            module, layer = model.get_submodule(name), layers[name]
            guarded = _guard_layer(
                module,
                name,
                layer,
                layer.grid or grid,
                guard,
                hessian,
                attack_seen=attack_seen or layer.is_shared,
                up=learned.get(name),
            )
            yield name, guarded
            if progress is not None:
                progress(module.weight.numel())


def _hessians(
    model: Any,
    tokens: Tensor,
    layers: Mapping[str, Layer],
    wanted: Collection[str],
    weights: Weights,
    team: Team,
) -> Iterator[dict[str, Tensor | None]]:
    """Hessians by layer name, a group at a time; ``None`` for layers that have no inputs."""
    without = [name for name, layer in layers.items() if layer.inputs_of is None and name in wanted]
    by_module = {layer.inputs_of or name: name for name, layer in layers.items() if layer.inputs_of is not None}
    skipped = {module for module, name in by_module.items() if name not in wanted}
    for group in gather_hessians(model, tokens, list(by_module), skip=skipped, weights=weights, team=team):
        yield {by_module[module]: hessian for module, hessian in group.items()}
    # Last, because the blocks that were still to come had read the full-precision table.
    yield dict.fromkeys(without)


def _tested(weights: Weights, layers: Mapping[str, Layer], grid: Grid) -> Iterator[tuple[str, Tensor, Grid]]:
    """The weights that the tests look at: those whose choices depend on what they see."""
    for name, layer in layers.items():
        if layer.inputs_of is not None:
            yield f"{name}.weight", as_read(weights.weight(name), layer), layer.grid or grid


def _targets(model: Any, layers: Mapping[str, Layer], grid: Grid) -> Iterator[ModelWeight]:
    """What a whole-model method chooses for."""
    for name, layer in layers.items():
        if layer.inputs_of is None:
            continue
        readers = dict.fromkeys([name, layer.inputs_of or name])
        modules = tuple(model.get_submodule(reader) for reader in readers)
        lattice = (layer.grid or grid).planned_lattice_of(as_read(modules[0].weight.data, layer))
        yield ModelWeight(name, modules, layer.transposed, lattice)


def _guard_layer(
    module: nn.Module,
    name: str,
    layer: Layer,
    grid: Grid,
    guard: Guard,
    hessian: Tensor | None,
    *,
    attack_seen: bool,
    up: Tensor | None,
) -> GuardedWeight:
    assert guard.seed is not None and isinstance(module.weight, Tensor), "a linear layer, and a seed drawn once a run"
    method = guard.method if layer.inputs_of is not None or not guard.method.needs_calibration else Stochastic()
    stored = module.weight.data
    weight = as_read(stored, layer)
    tensor_name = f"{name}.weight"
    try:
        guarded = guard_weight(
            weight, grid, method, seed=guard.seed, name=tensor_name, hessian=hessian, attack_seen=attack_seen, up=up
        )
    except CalibrationError as error:
        raise CalibrationError(f"{tensor_name}: {error.summary}", details=error.details, remedy=error.remedy) from error
    stored.copy_(guarded.weight.T if layer.transposed else guarded.weight)
    return guarded
