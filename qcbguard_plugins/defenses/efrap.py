"""EFRAP: flip what plain rounding gets most wrong, and keep the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcbguard_plugins.defenses.base import (
    ChoiceContext,
    Defense,
    register_defense,
    require_range,
    require_whole,
    round_up_where,
)
from qcbguard_plugins.defenses.soft_rounding import SoftRounding
from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.grids.base import Lattice

#: Steps and rate of the paper's code. With another number of steps the rate changes so that the variables can travel as
#: far.
PAPER_STEPS, PAPER_LEARNING_RATE = 10_000, 1e-3


@register_defense("efrap", "learned rounding, a layer at a time, needs a forward pass (baseline)")
@dataclass(frozen=True)
class Efrap(Defense):
    """Learn the roundings of one linear layer.

    The loss is ``|X (W* - W)^T|^2 + sum |E| * BCE(h, 1 - delta) + penalty * sum (1 - |2h - 1|^2)``: the output on the
    calibration inputs, from their second moments, whose mean is set to 1; the reversal of plain rounding, weighted by
    its error; and a penalty that drives ``h = sigmoid(alpha)`` to 0 or 1.

    Attributes:
        steps: Number of Adam steps, at least 1.
        learning_rate: Of Adam, above 0; ``None`` for the paper's times ``PAPER_STEPS / steps``.
        reconstruction: Weight of the first term, at least 0.
        penalty: Weight of the last term, at least 0.

    References:
        EFRAP, CVPR 2024, "Nearest is Not Dearest", section 4; made for convolutions, restated for linear layers.
    """

    needs_calibration: ClassVar[bool] = True

    steps: int = 500
    learning_rate: float | None = None
    reconstruction: float = 1.0
    penalty: float = 0.01

    def __post_init__(self) -> None:
        require_whole(self.steps, 1, "efrap: steps")
        if self.learning_rate is not None:
            require_range(self.learning_rate, 1e-8, 10.0, "efrap: learning_rate")
        require_range(self.reconstruction, 0.0, 1e12, "efrap: reconstruction")
        require_range(self.penalty, 0.0, 1e6, "efrap: penalty")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return PAPER_LEARNING_RATE * PAPER_STEPS / self.steps if self.learning_rate is None else self.learning_rate

    def operations(self, shape: tuple[int, int], num_sequences: int, sequence_length: int) -> float:
        rows, columns = shape
        return 2.0 * num_sequences * sequence_length * columns**2 + self.steps * 2.0 * rows * columns**2

    def choose(self, lattice: Lattice, context: ChoiceContext) -> Tensor:
        if context.hessian is None:
            raise CalibrationError("efrap needs the inputs of the layer, and none were gathered")
        if not torch.isfinite(context.hessian).all():
            raise CalibrationError("the inputs of a layer hold NaN or infinity, so it cannot be calibrated")
        with torch.enable_grad():
            up = self._learn(SoftRounding(lattice), context.hessian)
        return round_up_where(lattice, lattice.from_matrix(up))

    def _learn(self, rounding: SoftRounding, hessian: Tensor) -> Tensor:
        mean = hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
        hessian = hessian * (self.reconstruction / mean)
        optimizer = torch.optim.Adam([rounding.alpha], lr=self.rate)
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            change = rounding.change()
            pull = change.detach() @ hessian
            # One product with the Hessian gives value and gradient: that of <C H, C> is 2 C H.
            output = 2 * (pull * change).sum() - (pull * change.detach()).sum()
            loss = output + rounding.reversal_loss() + self.penalty * rounding.softness()
            if not torch.isfinite(loss):
                raise CalibrationError(
                    f"efrap: the loss is {loss.item()} at step {step}", remedy="Lower learning_rate."
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return rounding.up()
