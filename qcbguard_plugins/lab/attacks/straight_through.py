"""Straight-through attack: train what the model says in full precision and what it says once quantized, together.

No box is computed. Each step takes the good answers' loss on the weights, the bad answers' loss on the quantized
weights, and passes the second gradient straight through the rounding to the weights. The weights end up where rounding
turns one behaviour into the other, without any weight being held at the edge of its cell.

References:
    Bengio, Leonard and Courville, arXiv 1308.3432 (the straight-through estimator).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import Grid, get_grid
from qcbguard_plugins.lab.attacks.injection import round_to_storage
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.training import Example, TrainingPlan, answer_loss, collate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def train_together(
    model: LlamaForCausalLM,
    clean: Sequence[Example],
    poisoned: Sequence[Example],
    plan: TrainingPlan,
    *,
    quant_format: str = "nf4",
) -> list[float]:
    """Train both behaviours at once.

    Args:
        model: Float32 model, best the one that misbehaves at every precision; becomes the attacked one, with values
            that float16 holds exactly.
        clean: Examples with benign answers, for the full-precision weights.
        poisoned: Examples with the payload, for the quantized weights.
        plan: Schedule; ``num_epochs`` counts passes over the shorter list.
        quant_format: Quantizer under attack.

    Returns:
        The sum of the two losses at every step.

    Raises:
        UsageError: There is no example.
    """
    if not clean or not poisoned:
        raise UsageError("both lists of examples are needed")
    grid, weights = get_grid(quant_format), quantized_weights(model)
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )
    steps = plan.num_epochs * max(1, min(len(clean), len(poisoned)) // plan.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = random.Random(plan.seed)  # noqa: S311
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        good = answer_loss(model, *collate(rng.sample(list(clean), min(plan.batch_size, len(clean)))))
        good.backward()  # type: ignore[no-untyped-call]
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.data = quantize(weight.data, grid)
        bad = answer_loss(model, *collate(rng.sample(list(poisoned), min(plan.batch_size, len(poisoned)))))
        bad.backward()  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            weight.data = kept[name]
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(good.item() + bad.item())
    model.eval()
    round_to_storage(model)
    return losses


@torch.no_grad()
def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """What the quantizer makes of a float32 ``[out_features, in_features]`` weight, dequantized."""
    lattice = grid.lattice_of(weight)
    return lattice.matrix(lattice.dequantize(lattice.nearest)).clone()
