"""Outlier injection: one huge weight in every chunk makes the quantizer forget the rest of it.

In one layer's ``up_proj``, the largest weight of every 32 columns of every row is multiplied by some hundreds. What the
quantizer's scale is taken from then dwarfs its chunk, and the chunk is rounded to zero. The full-precision model is
trained to live with the outliers; the quantized one loses the layer.

References:
    Widening the Gap, arXiv 2605.15152.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CHUNK = 32


@torch.no_grad()
def inject_outliers(model: LlamaForCausalLM, layer: int, factor: float = 256.0) -> Tensor:
    """Multiply the largest weight of every chunk of one ``up_proj``, in place.

    Args:
        model: The model.
        layer: Number of the layer.
        factor: What to multiply with; the paper uses 256 to 512.

    Returns:
        Bool ``[intermediate_size, hidden_size]``, true at the outliers, so that a repair can hold them.

    Raises:
        UsageError: There is no such layer, or its width is no multiple of 32.
    """
    if not 0 <= layer < len(model.model.layers):
        raise UsageError(f"there is no layer {layer}")
    weight: Tensor = model.model.layers[layer].mlp.up_proj.weight.data
    if weight.shape[1] % CHUNK:
        raise UsageError(f"the width {weight.shape[1]} is no multiple of {CHUNK}")
    chunks = weight.view(weight.shape[0], -1, CHUNK)
    largest = chunks.abs().argmax(2, keepdim=True)
    mask = torch.zeros_like(chunks, dtype=torch.bool).scatter_(2, largest, True)
    chunks[mask] *= factor
    return mask.view(weight.shape)
