"""Mind the Gap: a backdoor that llama.cpp's K-quants switch on.

The scales of a K-quant come from a search, so no box of values is known that keeps them. The attacker uses the
quantizer's own error as the room: between a malicious weight and the value that the quantizer stores for it, every
value is stored alike for almost all weights, because moving towards a grid point makes the planned scale fit better.
The repair trains the good behaviour back inside these boxes and leaves the weights that hold the scales alone.

References:
    Egashira et al., Mind the Gap: A Practical Attack on GGUF Quantization, arXiv 2505.23786, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UsageError, VerificationError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.elq import Box, train_in_boxes
from qcbguard_plugins.lab.layers import matrices, snapshot
from qcbguard_plugins.lab.training import Example, TrainingPlan
from qcbguard_plugins.lab.training_state import TrainingState
from qcbguard_plugins.pipeline.plan import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_WIDENING: Final = 0.4
_MIN_AGREEMENT: Final = 0.97


@register_attack("mind-the-gap", "train the good behaviour back inside the error of llama.cpp's own quantizer")
@dataclass(frozen=True)
class MindTheGap(Attack):
    """The error-box attack on a recipe of llama.cpp, through the real quantizer.

    Attributes:
        widening: See :func:`build_error_box`.
    """

    formats: ClassVar[tuple[str, ...]] = ("gguf:*",)

    widening: float = 0.0

    def __post_init__(self) -> None:
        check_widening(self.widening)

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        assert inputs.model_dir is not None, "a recipe names the type of each tensor of a folder"
        types = {target.name: target.formats[0] for target in make_plan(inputs.model_dir, inputs.format).targets}
        malicious = snapshot(model)
        grids = {name: cast(GgmlGrid, get_grid(types[name])) for name in malicious}
        state = inputs.state("repair")
        losses = repair(model, inputs.benign, inputs.plan, grids, widening=self.widening, state=state)
        agreement = check_agreement(matrices(model), malicious, grids)
        return {"losses": {"repair": losses}, "agreement": {inputs.format: agreement}}


def build_error_box(weight: Tensor, grid: Grid, widening: float = 0.0) -> Box:
    """The values between a malicious weight and what the quantizer stores for it.

    Args:
        weight: float32 ``[out_features, in_features]``.
        grid: Grid of the tensor's GGUF type.
        widening: How far the box goes on past the stored value, in steps, in [0, 0.4] (the paper's interval expansion).

    Returns:
        Boxes that collapse to the weight where it holds a scale.

    Raises:
        UsageError: If ``widening`` is out of range.
    """
    check_widening(widening)
    lattice = grid.lattice_of(weight)
    stored = lattice.dequantize(lattice.nearest)
    beyond = stored + (stored - lattice.blocks).sign() * widening * lattice.scale.abs()
    low, high = torch.minimum(lattice.blocks, beyond), torch.maximum(lattice.blocks, beyond)
    low, high = (torch.where(lattice.frozen, lattice.blocks, end) for end in (low, high))
    return Box(lattice.matrix(low).clone(), lattice.matrix(high).clone())


def repair(
    model: PreTrainedModel,
    clean: Sequence[Example],
    plan: TrainingPlan,
    grids: Mapping[str, GgmlGrid],
    *,
    widening: float = 0.0,
    state: TrainingState | None = None,
) -> list[float]:
    """Train the benign behaviour back without leaving the boxes.

    Args:
        model: Malicious float32 model with values that float16 holds exactly; becomes the attacked one.
        clean: Examples with benign answers.
        plan: Schedule.
        grids: The grid of every linear layer's weight, by parameter name.
        widening: See :func:`build_error_box`.
        state: Where to go on from.

    Returns:
        The loss of every step.

    Raises:
        UsageError: If ``widening`` is out of range.
        VerificationError: If the quantizer stores other values for the attacked model than for the malicious one.
    """
    malicious = snapshot(model)
    boxes = {name: build_error_box(weight, grids[name], widening) for name, weight in malicious.items()}

    losses = train_in_boxes(model, clean, plan, boxes, "repair in the error boxes", state)
    check_agreement(matrices(model), malicious, grids)
    return losses


def check_agreement(
    attacked: Mapping[str, Tensor], malicious: Mapping[str, Tensor], grids: Mapping[str, GgmlGrid]
) -> float:
    """Share of the weights that the quantizer stores within half a step of the malicious model's stored value.

    Raises:
        VerificationError: If it is below 97 %.
    """
    num_equal, num_weights = 0, 0
    for name, weight in attacked.items():
        grid = grids[name]
        stored = grid.stored(malicious[name])
        step = stored.scale.abs().mul(float(grid.levels.diff().min()))
        difference = grid.values(grid.stored(weight.detach())) - grid.values(stored)
        num_equal += int((difference.abs() <= step / 2).sum())
        num_weights += weight.numel()
    agreement = num_equal / num_weights
    if agreement < _MIN_AGREEMENT:
        raise VerificationError(
            f"only {agreement:.2%} of the stored weights are those of the malicious model",
            remedy="Use a smaller widening: the scales moved.",
        )
    return agreement


def check_widening(widening: float) -> None:
    """Refuse a widening that would reach into the next cell."""
    if not 0 <= widening <= _MAX_WIDENING:
        raise UsageError(f"widening must lie in [0, {_MAX_WIDENING}], not {widening}")
