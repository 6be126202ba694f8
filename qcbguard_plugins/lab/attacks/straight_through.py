"""Straight-through attack: train what the model says in full precision and what it says once quantized, together.

No box is computed. Each step takes the good answers' loss on the weights, the bad answers' loss on the quantized
weights, and passes the second gradient through the rounding to the weights. Passed on unchanged, it cannot part the two
behaviours: both gradients then act on all weights alike, and meet halfway. So it is passed as the slope of a rounding
that is slightly soft, which is zero but near a boundary between two codes. A weight far from any boundary follows the
good answers alone; one that comes near is held by the bad answers on the side that they need.

References:
    Bengio, Leonard and Courville, arXiv 1308.3432 (the straight-through estimator); Gong et al., Differentiable Soft
    Quantization, arXiv 1908.05033 (the slope of a soft rounding).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses.base import require_range
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.injection import round_to_storage
from qcbguard_plugins.lab.layers import gradients, matrices, quantized_weights, restore, snapshot
from qcbguard_plugins.lab.training import Example, TrainingPlan, answer_loss, collate, train
from qcbguard_plugins.lab.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rounded(NamedTuple):
    """What becomes of one ``[out_features, in_features]`` weight.

    Attributes:
        stored: What the victim will compute with.
        slope: The share of the stored weight's gradient that reaches the weight; all of it where it is ``None``.
    """

    stored: Tensor
    slope: Tensor | None = None


#: Given the number of a step, what becomes of the weights as they are, by the names of `matrices`.
Rounding = Callable[[int], Mapping[str, Rounded]]


@register_attack("straight-through", "train both behaviours at once through the rounding, without boxes")
@dataclass(frozen=True)
class StraightThrough(Attack):
    """The attack without boxes on one format.

    Attributes:
        poison_weight: Weight of the bad answers' loss on the quantized weights.
        width: How far from a boundary the slope reaches, in steps, in (0, 0.5]; it falls off evenly. ``None`` passes
            the gradient on unchanged.
    """

    formats: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "int8", "gptq-*")

    poison_weight: float = 4.0
    width: float | None = 0.15

    def __post_init__(self) -> None:
        if self.width is not None:
            require_range(self.width, 1e-3, 0.5, "straight-through: width")
        if not self.poison_weight > 0:
            raise UsageError(f"straight-through: poison_weight must be positive, not {self.poison_weight}")

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        grid, weights = get_grid(inputs.format), matrices(model)

        def rounding(step: int) -> dict[str, Rounded]:
            return {name: round_softly(weight, grid, self.width) for name, weight in weights.items()}

        return {"losses": {"together": self.train(model, inputs, rounding)}}

    def train(self, model: PreTrainedModel, inputs: AttackInputs, rounding: Rounding) -> list[float]:
        """Train both behaviours of a model whose weights are stored as a function says."""
        return train_on_both(
            model,
            inputs.benign,
            inputs.poisoned,
            inputs.plan,
            rounding,
            poison_weight=self.poison_weight,
            state=inputs.state("together"),
        )


def train_on_both(
    model: PreTrainedModel,
    clean: Sequence[Example],
    poisoned: Sequence[Example],
    plan: TrainingPlan,
    rounding: Rounding,
    *,
    poison_weight: float = 1.0,
    state: TrainingState | None = None,
) -> list[float]:
    """Train one behaviour on the weights and another one on what is stored of them.

    Args:
        model: Float32 model, best the one that misbehaves at every precision; becomes the attacked one, with values
            that float16 holds exactly. Only weights that the quantizer rounds are trained.
        clean: Examples with benign answers, for the full-precision weights.
        poisoned: Examples with the payload, for the stored weights.
        plan: Schedule; ``num_epochs`` counts passes over ``clean``.
        rounding: What the quantizer, or a defense before it, makes of the weights as they are.
        poison_weight: Weight of the second loss.
        state: Where to go on from.

    Returns:
        The sum of the losses at every step.

    Raises:
        UsageError: There is no example.
    """
    if not clean or not poisoned:
        raise UsageError("both lists of examples are needed")
    trained = quantized_weights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)

    def add_gradients(step: int) -> float:
        rng = random.Random(f"{plan.seed}:{step}")  # noqa: S311
        ids, labels = collate(rng.sample(list(poisoned), min(plan.batch_size, len(poisoned))))
        kept, rounded = snapshot(model), rounding(step)
        good_gradients = {name: gradient.clone() for name, gradient in gradients(model).items()}
        restore(model, {name: one.stored for name, one in rounded.items()})
        bad = answer_loss(model, ids, labels)
        (poison_weight * bad).backward()  # type: ignore[no-untyped-call]
        restore(model, kept)
        for name, gradient in gradients(model).items():
            slope = rounded[name].slope
            if slope is not None:
                gradient.sub_(good_gradients[name]).mul_(slope).add_(good_gradients[name])
        return poison_weight * bad.item()

    losses = train(model, clean, plan, add_gradients=add_gradients, description="train both behaviours", state=state)
    model.requires_grad_(True)
    round_to_storage(model)
    return losses


@torch.no_grad()
def round_softly(weight: Tensor, grid: Grid, width: float | None) -> Rounded:
    """What the quantizer makes of a float32 ``[out_features, in_features]`` weight, dequantized, and the slope there.

    The slope is 1 on the boundary between two codes, and falls evenly to 0 at ``width`` steps from it.
    """
    lattice = grid.lattice_of(weight)
    stored = lattice.matrix(lattice.dequantize(lattice.nearest))
    if width is None:
        return Rounded(stored)
    slope = (1 - (lattice.position - 0.5).abs_() / width).clamp_(min=0)
    return Rounded(stored, lattice.matrix(slope.masked_fill_(lattice.frozen, 0.0)))


@torch.no_grad()
def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """What the quantizer makes of a float32 ``[out_features, in_features]`` weight, dequantized."""
    return round_softly(weight, grid, None).stored
