"""Which layers a stock quantizer takes, for any format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qcbguard_plugins.backends.transformers import build_skeleton
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import IntegerGrid, get_grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized_layers(format: str, config: Any) -> dict[str, bool]:
    """The layers of a model that the quantizer of a format takes.

    Args:
        format: Any format but a GGUF recipe.
        config: The model's configuration.

    Returns:
        Dotted layer names, each with true where the checkpoint stores ``[in_features, out_features]`` (GPT-2's Conv1D).

    Raises:
        UsageError: The format is unknown.
        UnguardableError: The quantizer takes weights of the model that cannot be guarded.
    """
    skeleton = build_skeleton(config)
    if isinstance(get_grid(format), IntegerGrid):
        return block_layers(skeleton)
    from qcbguard_plugins.backends.bitsandbytes import stock

    return stock.quantized_layers(skeleton, stock.config_for(format))


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
    fused = [
        f"{blocks}.{name}  {tuple(parameter.shape)}"
        for name, parameter in model.get_submodule(blocks).named_parameters()
        if parameter.dim() > 2
    ]
    if fused:
        raise UnguardableError(
            f"{len(fused)} parameters hold several matrices each, which quantizers take apart in ways of their own",
            details=fused,
            remedy="Mixture-of-experts models cannot be guarded for this format.",
        )
    return {
        f"{blocks}.{name}": isinstance(module, Conv1D)
        for name, module in model.get_submodule(blocks).named_modules()
        # Routers and the like are subclasses, which quantizers leave alone.
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
