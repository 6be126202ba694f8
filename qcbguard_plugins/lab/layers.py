"""The weights that a stock quantizer rounds, in the orientation in which it rounds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


def quantized_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a stock load quantizes, by name: those of all linear layers but the output layer."""
    return {
        f"{name}.weight": cast(nn.Parameter, module.weight)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_transposed(module)) and name != "lm_head"
    }


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The same weights as ``[out_features, in_features]``, views of the model's own memory, outside of autograd.

    GPT-2 stores its linear layers (``Conv1D``) transposed; quantizers turn them round first.
    """
    found = {}
    for name, weight in quantized_weights(model).items():
        module = model.get_submodule(name.removesuffix(".weight"))
        found[name] = weight.data.T if _is_transposed(module) else weight.data
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Their gradients in the same form, views as well; those that there are."""
    found = {}
    for name, weight in quantized_weights(model).items():
        if weight.grad is not None:
            turned = _is_transposed(model.get_submodule(name.removesuffix(".weight")))
            found[name] = weight.grad.T if turned else weight.grad
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of :func:`matrices`."""
    return {name: weight.clone() for name, weight in matrices(model).items()}


@torch.no_grad()
def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights in the form of :func:`matrices` back into a model."""
    for name, weight in matrices(model).items():
        weight.copy_(weights[name])


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
