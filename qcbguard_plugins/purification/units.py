"""The units that are scored and suppressed: MLP channels, attention heads, rank components of an adapter.

A unit is spread over several parameters, some along rows and some along columns. A group holds the units of one kind in
one block (or one adapted layer); its parts say where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.purification.architectures import Architecture, blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["channel", "head", "rank"]


@dataclass(frozen=True)
class Part:
    """One parameter's share of the units of a group.

    Attributes:
        parameter: Its name.
        dim: The dimension along which units follow each other.
        width: Entries of that dimension in each unit.
        offset: Where the first unit begins.
    """

    parameter: str
    dim: int
    width: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Group:
    """The units of one kind in one place.

    Attributes:
        name: The place.
        kind: What its units are.
        num_units: How many.
        parts: Where they lie.
        reader: The module that reads what the units say; its inputs are theirs, side by side.
    """

    name: str
    kind: Kind
    num_units: int
    parts: tuple[Part, ...]
    reader: str


def mlp_channels(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """The channels of every MLP: rows of its input layers with the columns of its output layer, biases included."""
    groups = []
    for block in blocks_of(model, architecture):
        reader = f"{block}.{architecture.mlp_out}"
        num_units = _size(model, reader, is_output=False)
        parts = [
            part
            for name in architecture.mlp_in
            for number in range(architecture.num_fused)
            for part in _rows(model, f"{block}.{name}", offset=number * num_units)
        ]
        for name in architecture.mlp_in:
            _require_size(model, f"{block}.{name}", num_units * architecture.num_fused)
        groups.append(Group(f"{block}.mlp", "channel", num_units, (*parts, _columns(model, reader)), reader))
    return groups


def attention_heads(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """The heads of every attention: their rows of the query layer with their columns of the output layer.

    Keys and values may be shared between heads, and are left alone.
    """
    num_heads = int(model.config.num_attention_heads)
    groups = []
    for block in blocks_of(model, architecture):
        reader = f"{block}.{architecture.attention_out}"
        width = _size(model, reader, is_output=False) // num_heads
        parts = _rows(model, f"{block}.{architecture.query}", width=width)
        parts.append(_columns(model, reader, width))
        groups.append(Group(f"{block}.attention", "head", num_heads, tuple(parts), reader))
    return groups


def lora_ranks(model: nn.Module, architecture: Architecture, adapter: str = "default") -> list[Group]:
    """The rank components of every adapted MLP layer: a row of A with the column of B that it feeds.

    Raises:
        UsageError: The adapter changes no MLP layer, so there is nothing to score.
    """
    groups = []
    names = (*architecture.mlp_in, architecture.mlp_out)
    for name, module in _lora_layers(model, adapter).items():
        if name.endswith(names):
            rank = module.lora_A[adapter].weight.shape[0]
            parts = (Part(f"{name}.lora_A.{adapter}.weight", 0), Part(f"{name}.lora_B.{adapter}.weight", 1))
            groups.append(Group(name, "rank", rank, parts, f"{name}.lora_B.{adapter}"))
    if not groups:
        raise UsageError(
            "the adapter changes no MLP layer, where backdoors lie",
            remedy=f"Its target modules must include some of: {', '.join(names)}.",
        )
    return groups


def lora_heads(model: Any, architecture: Architecture, adapter: str = "default") -> list[Group]:
    """The heads of every attention as an adapter changes them: rows of B of the query layer, columns of A of the output
    layer; those of the two that are adapted.

    Raises:
        UsageError: The adapter changes neither.
    """
    num_heads = int(model.config.num_attention_heads)
    layers = _lora_layers(model, adapter)
    blocks = sorted({name.rsplit(f".{part}", 1)[0] for name in layers for part in _attention(architecture, name)})
    groups = []
    for block in blocks:
        query, reader = f"{block}.{architecture.query}", f"{block}.{architecture.attention_out}"
        width = _size(model, reader, is_output=False) // num_heads
        parts = [Part(f"{query}.lora_B.{adapter}.weight", 0, width)] if query in layers else []
        if reader in layers:
            parts.append(Part(f"{reader}.lora_A.{adapter}.weight", 1, width))
        groups.append(Group(f"{block}.attention", "head", num_heads, tuple(parts), reader))
    if not groups:
        raise UsageError(
            "the adapter changes neither queries nor attention outputs, so it has no heads to suppress",
            remedy="Set num_heads to 0.",
        )
    return groups


def _attention(architecture: Architecture, name: str) -> list[str]:
    return [part for part in (architecture.query, architecture.attention_out) if name.endswith(f".{part}")]


def gather(parameters: Mapping[str, Tensor], group: Group) -> Tensor:
    """The units of a group side by side.

    Args:
        parameters: Parameters by name.
        group: Which units.

    Returns:
        float32 ``[num_units, num_features]`` on the CPU, a copy.
    """
    columns = [
        _of_units(parameters[part.parameter].detach(), part, group.num_units).flatten(1).float().cpu()
        for part in group.parts
    ]
    return torch.cat(columns, dim=1)


def gather_all(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """The units of several groups of a model, see :func:`gather`."""
    parameters = dict(model.named_parameters())
    return {group.name: gather(parameters, group) for group in groups}


@torch.no_grad()
def write_units(parameter: Tensor, part: Part, num_units: int, units: Tensor, values: Tensor) -> None:
    """Overwrite some units in one parameter, in place.

    Args:
        parameter: The parameter.
        part: Where the units lie in it.
        num_units: How many units there are.
        units: int64, the numbers of those to overwrite.
        values: As many values as they have entries, ``[len(units), width, ...]``.
    """
    view = _of_units(parameter, part, num_units)
    view[units.to(parameter.device)] = values.to(parameter).view(len(units), *view.shape[1:])


def reader_norms(model: nn.Module, group: Group) -> Tensor:
    """Norm of the weights with which each unit is read, float32 ``[num_units]`` on the CPU."""
    module: Any = model.get_submodule(group.reader)
    module = getattr(module, "base_layer", module)
    by_input = module.weight.detach() if _is_transposed(module) else module.weight.detach().T
    norms: Tensor = by_input.reshape(group.num_units, -1).float().norm(dim=1).cpu()
    return norms


def unit_shape(parameter: Tensor, part: Part, num_units: int) -> tuple[int, ...]:
    """Shape of one unit's share of a parameter."""
    return tuple(_of_units(parameter, part, num_units).shape[1:])


def _of_units(parameter: Tensor, part: Part, num_units: int) -> Tensor:
    """A view ``[num_units, width, ...]`` of a parameter."""
    rows = parameter.narrow(part.dim, part.offset, num_units * part.width).movedim(part.dim, 0)
    return rows.view(num_units, part.width, *rows.shape[1:])


def _rows(model: nn.Module, name: str, *, width: int = 1, offset: int = 0) -> list[Part]:
    """Parts along a layer's outputs, its bias included."""
    parts = [Part(f"{name}.weight", 1 if _is_transposed(model.get_submodule(name)) else 0, width, offset)]
    if getattr(model.get_submodule(name), "bias", None) is not None:
        parts.append(Part(f"{name}.bias", 0, width, offset))
    return parts


def _columns(model: nn.Module, name: str, width: int = 1) -> Part:
    """The part along a layer's inputs."""
    return Part(f"{name}.weight", 0 if _is_transposed(model.get_submodule(name)) else 1, width)


def _size(model: nn.Module, name: str, *, is_output: bool) -> int:
    module: Any = model.get_submodule(name)
    module = getattr(module, "base_layer", module)
    return int(module.weight.shape[0 if is_output != _is_transposed(module) else 1])


def _require_size(model: nn.Module, name: str, num_outputs: int) -> None:
    found = _size(model, name, is_output=True)
    if found != num_outputs:
        raise UsageError(
            f"{name} has {found} outputs where its MLP has {num_outputs}",
            remedy="Pass the architecture whose module names and fusion these are.",
        )


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if adapter in getattr(module, "lora_A", {})
    }
    return found
