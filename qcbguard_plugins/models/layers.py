"""Which layers there are in a model that a quantizer may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.base import Grid
from qcbguard_plugins.models.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def target_of(
    model: PreTrainedModel,
    layer: str,
    grid: Grid,
    *,
    transposed: bool = False,
    calibrated_by: str = "",
    has_inputs: bool = True,
) -> Target:
    """The weight of a layer as a target; see :class:`~qcbguard_plugins.models.target.Target`."""
    weight = model.get_parameter(f"{layer}.weight")
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    return Target(
        name=f"{layer}.weight",
        shape=(rows, columns),
        dtype=weight.dtype,
        grids=(grid,),
        transposed=transposed,
        calibrated_by=calibrated_by,
        has_inputs=has_inputs,
    )


def block_layers(model: PreTrainedModel) -> dict[str, bool]:
    """Every linear layer of the decoder blocks, which is what GPTQ takes; not the embeddings and not the output head.

    Raises:
        UnguardableError: The model has no blocks, or keeps the experts of a block in one parameter.
    """
    from transformers.pytorch_utils import Conv1D

    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UnguardableError(f"{type(model).__name__} has no decoder blocks")
    blocks = max(lists, key=lambda name: (len(model.get_submodule(name)), -len(name)))
    refuse_fused(model, blocks)
    return {
        f"{blocks}.{name}": isinstance(module, Conv1D)
        for name, module in model.get_submodule(blocks).named_modules()
        # Routers and the like are subclasses, which quantizers leave alone.
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Every ``nn.Linear`` but the output head, which is what most weight-only quantizers take by default."""
    refuse_fused(model, "")
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def exported_layers(
    model: PreTrainedModel, grid: Grid, *, table_grid: Grid | None = None, head_grid: Grid | None = None
) -> list[Target]:
    """What a quantizer of exported models takes: every matrix, the tables and the output head included.

    A head that is tied to the table is stored once, as the table.

    Args:
        model: The model without weights.
        grid: The grid of linear layers.
        table_grid: That of tables, where it is another.
        head_grid: That of the output head, where it is another.

    Raises:
        UnguardableError: The model keeps the experts of a block in one parameter.
    """
    from transformers.pytorch_utils import Conv1D

    refuse_fused(model, "")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and bool(getattr(model.config, "tie_word_embeddings", False))
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            is_head = module is table and tied
            calibrated_by = name_of(model, head) if is_head else ""
            found.append(target_of(model, name, table_grid or grid, calibrated_by=calibrated_by, has_inputs=is_head))
        elif module is head:
            if not tied:
                found.append(target_of(model, name, head_grid or grid))
        elif isinstance(module, (nn.Linear, Conv1D)):
            found.append(target_of(model, name, grid, transposed=isinstance(module, Conv1D)))
    return found


def name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    """The dotted name of a module."""
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def refuse_fused(model: PreTrainedModel, inside: str) -> None:
    """Refuse parameters that hold several matrices.

    Args:
        model: The model.
        inside: Name of the module to look at; all of the model if empty.
    """
    fused = [
        f"{name}  {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if parameter.dim() > 2 and name.startswith(inside)
    ]
    if fused:
        raise UnguardableError(
            f"{len(fused)} parameters hold several matrices each, which quantizers take apart in ways of their own",
            details=fused,
            remedy="Mixture-of-experts models cannot be guarded for this format.",
        )
