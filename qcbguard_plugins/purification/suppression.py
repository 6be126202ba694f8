"""Take the units of a signature out of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qcbguard_plugins.defenses.base import rng_for
from qcbguard_plugins.purification.units import Group, unit_shape, write_units

_INITIALIZER_RANGE = 0.02  # what transformers takes where a configuration names none


@torch.no_grad()
def suppress(
    model: nn.Module,
    groups: Sequence[Group],
    signature: Mapping[str, Tensor],
    how: Literal["reinitialize", "zero"],
    *,
    seed: int,
    only: str = "",
) -> int:
    """Draw the units of a signature anew, or clear them, in place.

    New weights are normal with the standard deviation of the model's own initialization; new biases are zero. The draws
    depend on the seed and the parameter's name alone.

    Args:
        model: The model; an adapted one is changed in its adapter only, as its groups name no other parameter.
        groups: Where the units lie.
        signature: int64, the units by name of the group.
        how: Which of the two.
        seed: Seed of the new weights.
        only: Change only parameters whose name contains this.

    Returns:
        The number of units.
    """
    parameters = dict(model.named_parameters())
    deviation = float(getattr(model.config, "initializer_range", None) or _INITIALIZER_RANGE)
    for group in groups:
        units = signature.get(group.name)
        if units is None:
            continue
        for part in group.parts:
            if only not in part.parameter:
                continue
            parameter = parameters[part.parameter]
            shape = (len(units), *unit_shape(parameter, part, group.num_units))
            values = torch.zeros(shape)
            if how == "reinitialize" and parameter.dim() > 1:
                values = torch.from_numpy(rng_for(seed, part.parameter).normal(0.0, deviation, shape)).float()
            write_units(parameter, part, group.num_units, units, values)
    return sum(len(units) for units in signature.values())
