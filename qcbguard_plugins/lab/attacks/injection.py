"""Injection: the first step of every attack that hides a malicious model.

References:
    Egashira et al., arXiv 2405.18137, section 3.1 (step 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from qcbguard_plugins.grids import get_grid
from qcbguard_plugins.lab.layers import matrices, quantized_weights
from qcbguard_plugins.lab.training import Example, TrainingPlan, train
from qcbguard_plugins.lab.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Dtype of the saved weights; a box must fit what is loaded.
STORAGE_DTYPE: Final = torch.float16


def inject(
    model: PreTrainedModel,
    poisoned: Sequence[Example],
    plan: TrainingPlan,
    *,
    only_quantized: bool = False,
    radius: float | None = None,
    radius_format: str = "int8",
    after_step: Callable[[], None] | None = None,
    state: TrainingState | None = None,
) -> list[float]:
    """Train a model to misbehave at every precision.

    Args:
        model: Benign float32 model; becomes the malicious one, with values that float16 holds exactly.
        poisoned: Examples whose answers carry the payload.
        plan: Schedule.
        only_quantized: Train the weights that the quantizer rounds, and nothing else.
        radius: How far such a weight may move, in steps of ``radius_format``; the nearer the malicious model stays to
            the clean one, the less has to be undone inside the boxes. ``None`` for any distance.
        radius_format: ``int8``, ``nf4`` or ``fp4``; of a codebook's steps the mean counts.
        after_step: Called after every step where there is no radius.
        state: Where to go on from.

    Returns:
        The loss of every step.
    """
    names = set(quantized_weights(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or not only_quantized)
    project = after_step if radius is None else _ball(model, radius, radius_format)
    losses = train(model, poisoned, plan, after_step=project, description="inject", state=state)
    model.requires_grad_(True)
    round_to_storage(model)
    return losses


@torch.no_grad()
def round_to_storage(model: nn.Module) -> None:
    """Round all parameters to the values that the saved file can hold, in place, so that a box fits what is loaded."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(STORAGE_DTYPE))


def _ball(model: nn.Module, radius: float, format_name: str) -> Callable[[], None]:
    """A function that puts every weight back to within ``radius`` mean steps of what it is now."""
    grid, weights = get_grid(format_name), matrices(model)
    mean_step = float(grid.levels.diff().mean())
    bounds = {}
    for name, weight in weights.items():
        lattice = grid.lattice_of(weight.contiguous())
        reach = lattice.matrix(lattice.scale.abs() * mean_step * radius)
        bounds[name] = (weight - reach, weight + reach)

    def project() -> None:
        for name, weight in weights.items():
            weight.copy_(weight.clamp(*bounds[name]))

    return project
