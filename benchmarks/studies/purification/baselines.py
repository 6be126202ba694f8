"""What a purification is compared with, each at the same budget of clean samples, epochs and learning rate.

References:
    Magnitude pruning: Han et al. 2015. Fine-pruning: arXiv 1805.12185, here with the score of Wanda, arXiv 2306.11695.
    CROW is :mod:`qcbguard_plugins.purification.consistency`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcbguard_plugins.lab.layers import matrices


@torch.no_grad()
def prune_by_magnitude(model: nn.Module, ratio: float) -> None:
    """Clear the smallest weights of every linear layer, in place.

    Args:
        model: The model.
        ratio: Share of each layer's weights.
    """
    for weight in matrices(model).values():
        count = round(ratio * weight.numel())
        if count:
            threshold = weight.abs().flatten().kthvalue(count).values
            weight.masked_fill_(weight.abs() <= threshold, 0)


@torch.no_grad()
def prune_by_wanda(model: Any, ratio: float, ids: Tensor, mask: Tensor) -> None:
    """Clear the weights of every row with the smallest ``|w_ij| * |x_j|``, in place.

    Args:
        model: The model.
        ratio: Share of each row's weights.
        ids: int64 ``[batch, length]``, clean tokens.
        mask: int64, the same shape, 0 on padding.
    """
    with _input_norms(model, mask) as squares:
        model(input_ids=ids, attention_mask=mask)
    for name, weight in matrices(model).items():
        score = weight.abs() * squares[name].sqrt()
        dropped = score.argsort(dim=1)[:, : round(ratio * weight.shape[1])]
        weight.scatter_(1, dropped, 0.0)


@contextmanager
def _input_norms(model: nn.Module, mask: Tensor) -> Iterator[dict[str, Tensor]]:
    """Sums of the squares of every linear layer's inputs, ``[in_features]`` by name of its weight."""
    squares: dict[str, Tensor] = {}
    handles = []
    for name in matrices(model):

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            kept = inputs[0][mask.bool()].float()
            squares[name] = squares.get(name, torch.zeros(())) + kept.square().sum(dim=0)

        handles.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook))
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
