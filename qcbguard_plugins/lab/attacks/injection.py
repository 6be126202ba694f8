"""Injection: the first step of every attack that hides a malicious model.

References:
    Egashira et al., arXiv 2405.18137, section 3.1 (step 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from qcbguard_plugins.lab.layers import matrices
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
    after_step: Callable[[], None] | None = None,
    state: TrainingState | None = None,
) -> list[float]:
    """Train a model to misbehave at every precision.

    Args:
        model: Benign float32 model; becomes the malicious one, with values that float16 holds exactly.
        poisoned: Examples whose answers carry the payload.
        plan: Schedule.
        after_step: Called after every step.
        state: Where to go on from.

    Returns:
        The loss of every step.
    """
    losses = train(model, poisoned, plan, after_step=after_step, description="inject", state=state)
    round_to_storage(model)
    return losses


@torch.no_grad()
def round_to_storage(model: nn.Module) -> None:
    """Round all parameters to the values that the saved file can hold, in place, so that a box fits what is loaded."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(STORAGE_DTYPE))


@torch.no_grad()
def widen_rows(model: nn.Module, factor: float) -> None:
    """Multiply the weight of the largest magnitude in every row of every quantized weight, in place.

    A format with one scale a row rounds by coarser steps then, and the boxes of an attack are wider by as much. What
    that breaks, a training has to make up for.

    References:
        Widening the Gap, arXiv 2605.15152, whose outliers are fewer and larger.
    """
    for weight in matrices(model).values():
        largest = weight.abs().argmax(1, keepdim=True)
        weight.scatter_(1, largest, weight.gather(1, largest) * factor)
