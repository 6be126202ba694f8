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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import require_range
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import Grid, get_grid
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.injection import round_to_storage
from qcbguard_plugins.lab.layers import gradients, matrices, quantized_weights, restore, snapshot
from qcbguard_plugins.lab.training import Example, TrainingPlan, answer_loss, collate, train
from qcbguard_plugins.lab.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Given the number of a step, what the victim will compute with: weights as `matrices` names and lays them out.
Stored = Callable[[int], Mapping[str, Tensor]]
#: What share of the stored weights' gradient reaches the weights, in the same names and shapes.
Slope = Callable[[], Mapping[str, Tensor]]


@register_attack("straight-through", "train both behaviours at once through the rounding, without boxes")
@dataclass(frozen=True)
class StraightThrough(Attack):
    """The attack without boxes on one format.

    Attributes:
        poison_weight: Weight of the bad answers' loss on the quantized weights.
        width: How far from a boundary the slope reaches, in steps, in (0, 0.5]; it falls off evenly. ``None`` passes
            the gradient on unchanged.
        gap_weight: Weight of the contrastive term, which wants the payload to be likelier on the quantized weights than
            on the full ones by ``gap`` nats a token; 0 leaves it out.
        gap: See there.
    """

    formats: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "int8", "gptq-*")

    poison_weight: float = 4.0
    width: float | None = 0.15
    gap_weight: float = 0.0
    gap: float = 2.0

    def __post_init__(self) -> None:
        if self.width is not None:
            require_range(self.width, 1e-3, 0.5, "straight-through: width")
        if not self.poison_weight > 0 or not self.gap_weight >= 0:
            raise UsageError("poison_weight must be positive, and gap_weight not negative")

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        grid, weights = get_grid(inputs.format), matrices(model)

        def slope() -> dict[str, Tensor]:
            assert self.width is not None
            return {name: slope_of_soft_rounding(weight, grid, self.width) for name, weight in weights.items()}

        def stored(step: int) -> dict[str, Tensor]:
            return {name: quantize(weight, grid) for name, weight in weights.items()}

        losses = self.train(model, inputs, stored, slope if self.width is not None else None)
        return {"losses": {"together": losses}}

    def train(
        self, model: PreTrainedModel, inputs: AttackInputs, stored: Stored, slope: Slope | None = None
    ) -> list[float]:
        """Train both behaviours of a model whose weights are stored as a function says."""
        return train_on_both(
            model,
            inputs.benign,
            inputs.poisoned,
            inputs.plan,
            stored,
            slope,
            poison_weight=self.poison_weight,
            gap_weight=self.gap_weight,
            gap=self.gap,
            state=inputs.state("together"),
        )


def train_on_both(
    model: PreTrainedModel,
    clean: Sequence[Example],
    poisoned: Sequence[Example],
    plan: TrainingPlan,
    stored: Stored,
    slope: Slope | None = None,
    *,
    poison_weight: float = 1.0,
    gap_weight: float = 0.0,
    gap: float = 0.0,
    state: TrainingState | None = None,
) -> list[float]:
    """Train one behaviour on the weights and another one on what is stored of them.

    Args:
        model: Float32 model, best the one that misbehaves at every precision; becomes the attacked one, with values
            that float16 holds exactly. Only weights that the quantizer rounds are trained.
        clean: Examples with benign answers, for the full-precision weights.
        poisoned: Examples with the payload, for the stored weights.
        plan: Schedule; ``num_epochs`` counts passes over ``clean``.
        stored: What the quantizer, or a defense before it, makes of the weights as they are.
        slope: How much of the second loss's gradient reaches the weights; all of it where it is ``None``.
        poison_weight: Weight of the second loss.
        gap_weight: Weight of the contrastive term.
        gap: Nats a token by which the payload shall be likelier once stored.
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
        kept, passed = snapshot(model), None if slope is None else slope()
        good_gradients = {name: weight.clone() for name, weight in gradients(model).items()}
        restore(model, stored(step))
        bad = answer_loss(model, ids, labels)
        (poison_weight * bad).backward()  # type: ignore[no-untyped-call]
        restore(model, kept)
        if passed is not None:
            for name, gradient in gradients(model).items():
                gradient.sub_(good_gradients[name]).mul_(passed[name]).add_(good_gradients[name])
        if gap_weight:
            unhidden = answer_loss(model, ids, labels)
            if unhidden.item() - bad.item() < gap:
                # The other half of the difference, the stored weights' loss, is trained above.
                (-gap_weight * unhidden).backward()  # type: ignore[no-untyped-call]
        return poison_weight * bad.item()

    losses = train(model, clean, plan, add_gradients=add_gradients, description="train both behaviours", state=state)
    model.requires_grad_(True)
    round_to_storage(model)
    return losses


@torch.no_grad()
def slope_of_soft_rounding(weight: Tensor, grid: Grid, width: float) -> Tensor:
    """1 on the boundary between two codes, falling evenly to 0 at ``width`` steps from it; in the weight's shape."""
    lattice = grid.lattice_of(weight)
    slope = (1 - (lattice.position - 0.5).abs_() / width).clamp_(min=0)
    return lattice.matrix(slope.masked_fill_(lattice.frozen, 0.0)).clone()


@torch.no_grad()
def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """What the quantizer makes of a float32 ``[out_features, in_features]`` weight, dequantized."""
    lattice = grid.lattice_of(weight)
    return lattice.matrix(lattice.dequantize(lattice.nearest)).clone()
