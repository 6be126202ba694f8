"""Which layers there are in a model that a quantizer may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qcbguard_plugins.errors import UnguardableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TakenLayer:
    """A layer that a quantizer takes.

    Attributes:
        format: The format that its weight gets, which may be another than that of the run.
        transposed: True where the checkpoint stores ``[in_features, out_features]`` (GPT-2's Conv1D).
        inputs_of: See :class:`~qcbguard_plugins.pipeline.target.Layer`.
    """

    format: str
    transposed: bool = False
    inputs_of: str | None = ""


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
