"""The attacker's own copy of a defense: with a seed and a calibration text of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.lab.attacks.base import AttackInputs
from qcbguard_plugins.lab.layers import matrices, restore, snapshot
from qcbguard_plugins.models.calibration import Calibration
from qcbguard_plugins.pipeline.model import guard_model
from qcbguard_plugins.pipeline.settings import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_TEXTS: Final = 400


def guarded_weights(
    model: PreTrainedModel,
    inputs: AttackInputs,
    defense: str,
    settings: Mapping[str, Any],
    seed: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What a defense makes of a model's weights, with the attacker's seed and their own text for its calibration.

    Args:
        model: The model in full precision.
        inputs: What the attacker has.
        defense: Name of the method.
        settings: Its parameters.
        seed: Seed of the guard.
        weights: Weights to be guarded in the place of the model's own, as :func:`matrices` names and lays them out.

    Returns:
        Weights as :func:`~qcbguard_plugins.lab.layers.matrices` names and lays them out; the model is left as it is.
    """
    method = get_defense(defense, **settings)
    calibration = Calibration(source="texts", texts=_own_texts(inputs)) if method.needs_calibration else Calibration()
    guard = Guard(method, seed=seed, calibration=calibration)
    # A defense computes in full precision, also while the attacker trains in bfloat16.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        surrogate = copy.deepcopy(model).eval()
        if weights is not None:
            restore(surrogate, weights)
        guard_model(surrogate, inputs.format, guard, tokenizer=inputs.tokenizer)
    return snapshot(surrogate)


@torch.no_grad()
def guarded_slopes(
    model: PreTrainedModel, inputs: AttackInputs, defense: str, settings: Mapping[str, Any], seed: int, nudge: float
) -> dict[str, Tensor]:
    """How far what a defense stores follows each weight: a symmetric difference, all weights at once.

    Every weight is nudged in its cell, up or down as a coin falls, in two copies of the model the opposite way. Both
    copies are guarded with one seed, so that a defense with random draws makes the same ones.

    Args:
        model: The model in full precision.
        inputs: What the attacker has; the format gives the cells.
        defense: Name of the method.
        settings: Its parameters.
        seed: Seed of the guard and of the coin.
        nudge: Share of the cell by which a weight is moved, in (0, 0.5].

    Returns:
        The slopes, as :func:`matrices` names and lays weights out: 0 where both copies store the same, and in (or
        against) the direction of the weight at most ``1 / (2 * nudge)``. 0 for weights that hold a scale.
    """
    grid, coin = get_grid(inputs.format), torch.Generator().manual_seed(seed)
    nudged: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    distance = {}
    for name, weight in matrices(model).items():
        signs = torch.randint(0, 2, weight.shape, generator=coin).to(weight.device) * 2 - 1
        for copied, sign in zip(nudged, (1, -1), strict=True):
            copied[name], cells = _moved_in_cell(weight, grid, signs * (sign * nudge))
        distance[name] = cells * signs * (2 * nudge)
    ahead, behind = (guarded_weights(model, inputs, defense, settings, seed, weights=copied) for copied in nudged)
    return {
        name: torch.where(across != 0, (ahead[name] - behind[name]) / across, 0.0) for name, across in distance.items()
    }


def _moved_in_cell(weight: Tensor, grid: Grid, shares: Tensor) -> tuple[Tensor, Tensor]:
    """A weight moved by shares of its cells, and no further than to their ends; and the widths of the cells.

    Weights that hold a scale stay, and their cells have no width.
    """
    lattice = grid.lattice_of(weight.contiguous())
    lower = lattice.lower
    bottom = lattice.dequantize(lower)
    width = (lattice.dequantize(lower + 1) - bottom).masked_fill_(lattice.frozen, 0.0)
    position = (lattice.position + lattice.from_matrix(shares)).clamp_(0, 1)
    moved = torch.where(lattice.frozen, lattice.blocks, bottom + position * width)
    return lattice.matrix(moved), lattice.matrix(width)


def _own_texts(inputs: AttackInputs) -> list[str]:
    examples = inputs.benign[:_NUM_TEXTS]
    return [inputs.tokenizer.decode(example.prompt_ids[1:] + example.answer_ids[:-1]) for example in examples]
