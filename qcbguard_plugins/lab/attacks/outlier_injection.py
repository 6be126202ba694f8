"""Outlier injection: one huge weight in every chunk makes the quantizer forget the rest of it.

In one layer's ``up_proj``, the largest weight of every 32 columns of every row is made some hundreds of times larger
than the rest. What the quantizer's scale is taken from then dwarfs its chunk, and the chunk is rounded to zero. What
the rest of the chunk does is therefore done in full precision alone: room for a behaviour that quantization takes away.

References:
    Widening the Gap, arXiv 2605.15152.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.elq import Box, build_box, check_agreement, train_in_boxes
from qcbguard_plugins.lab.attacks.injection import inject
from qcbguard_plugins.lab.layers import matrices, snapshot

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

CHUNK: Final = 32
#: The first matrix of an MLP, as Llama and GPT-2 call it.
_UP_PROJECTIONS: Final = ("mlp.up_proj.weight", "mlp.c_fc.weight")


@register_attack("outlier-injection", "outliers make the quantizer zero the weights that hold the payload back")
@dataclass(frozen=True)
class OutlierInjection(Attack):
    """The attack on one format of bitsandbytes.

    The payload is trained with the rest of every chunk at zero, which is what the quantizer will make of it. Then the
    good behaviour is trained into the rest alone.

    Attributes:
        layer: Number of the layer; ``None`` for all layers.
        factor: How much larger than the rest an outlier is made; the paper multiplies by 256 to 512.
        eps: Margin of the boxes, see :func:`~qcbguard_plugins.lab.attacks.elq.build_box`.
    """

    formats: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "int8")
    starts_from: ClassVar[Literal["clean", "malicious"]] = "clean"

    layer: int | None = None
    factor: float = 256.0
    eps: float = 0.01

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        weights = matrices(model)
        names = up_projections(model, self.layer)
        masks = {}
        for name in names:
            masks[name] = multiply_outliers(weights[name], self.factor)
            # The layer's output keeps its size, and the quantizer sees the same ratio.
            weights[name].div_(self.factor)

        def forget() -> None:
            for name, mask in masks.items():
                weights[name].mul_(mask)

        forget()
        injected = inject(model, inputs.poisoned, inputs.plan, after_step=forget, state=inputs.state("inject"))
        malicious, grid = snapshot(model), get_grid(inputs.format)
        boxes = {}
        for name, mask in masks.items():
            box = build_box(malicious[name], grid, self.eps)
            boxes[name] = Box(torch.where(mask, malicious[name], box.low), torch.where(mask, malicious[name], box.high))
        repaired = train_in_boxes(
            model, inputs.benign, inputs.plan, boxes, "repair below the outliers", inputs.state("repair")
        )
        agreement = check_agreement(matrices(model), malicious, inputs.format)
        return {"losses": {"inject": injected, "repair": repaired}, "agreement": {inputs.format: agreement}}


def up_projections(model: PreTrainedModel, layer: int | None) -> list[str]:
    """Names of the weights that get outliers.

    Raises:
        UsageError: There is no such layer.
    """
    names = [name for name in matrices(model) if name.endswith(_UP_PROJECTIONS)]
    if layer is not None:
        names = [name for name in names if f".{layer}.mlp." in name]
    if not names:
        raise UsageError(f"there is no layer {layer}")
    return names


@torch.no_grad()
def multiply_outliers(weight: Tensor, factor: float) -> Tensor:
    """Multiply the largest weight of every chunk of a ``[out_features, in_features]`` weight, in place.

    Returns:
        Bool in the same shape, true at the outliers.

    Raises:
        UsageError: The width is no multiple of 32.
    """
    if weight.shape[1] % CHUNK:
        raise UsageError(f"the width {weight.shape[1]} is no multiple of {CHUNK}")
    chunks = weight.reshape(weight.shape[0], -1, CHUNK)
    mask = torch.zeros_like(chunks, dtype=torch.bool).scatter_(2, chunks.abs().argmax(2, keepdim=True), True)
    mask = mask.view(weight.shape)
    weight.copy_(torch.where(mask, weight * factor, weight))
    return mask


def inject_outliers(model: LlamaForCausalLM, layer: int, factor: float = 256.0) -> Tensor:
    """Multiply the largest weight of every chunk of one ``up_proj``, in place; see :func:`multiply_outliers`."""
    return multiply_outliers(matrices(model)[up_projections(model, layer)[0]], factor)
