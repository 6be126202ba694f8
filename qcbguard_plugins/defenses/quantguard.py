"""QuantGuard: learn the rounding of the whole model from its full-precision self."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcbguard_plugins.defenses.base import (
    ModelWeight,
    WholeModelDefense,
    register_defense,
    require_range,
    require_whole,
)
from qcbguard_plugins.defenses.learned_rounding import learn_roundings
from qcbguard_plugins.defenses.soft_rounding import SoftRounding
from qcbguard_plugins.errors import UsageError

#: Steps of the paper: 1,000 samples in batches of 8. With another number the rate changes so that the variables can
#: travel as far.
PAPER_STEPS = 125
#: Learning rates of the paper and weights that its code uses and its text omits, by the fineness of the grid.
LEARNING_RATE_INT8, LEARNING_RATE_4BIT = 0.05, 0.01
DIST_SCALE_INT8, DIST_SCALE_4BIT = 5e7, 1e7
# alpha, its gradient, two moments, lower, step, position and direction are 32; the rest are temporaries of a step.
# Every weight costs its replacement, which is kept for the backward pass (benchmarks/studies/learned_memory.py).
_BYTES_PER_VARIABLE, _BYTES_PER_WEIGHT = 56.0, 12.0
#: Weight of the divergence in the paper's code, and one at which a hardened student ends near the full-precision model
#: (docs/methods.md).
KL_SCALE, KL_SCALE_HARDENED = 100.0, 3000.0
TEACHER_DTYPES = {"model": None, "bfloat16": torch.bfloat16}


@register_defense("quantguard", "learned rounding, trained through the whole model (arXiv 2606.29239)")
@dataclass(frozen=True)
class QuantGuard(WholeModelDefense):
    """Learn, for all weights together, on which side of its neighbours each shall lie.

    The student has the weights ``W* = lower + sigmoid(alpha) * step``, the teacher those of the full-precision model.
    The loss is ``kl_scale * KL(teacher || student) + lambda1 * rev_scale * L_Rev + lambda2 * dist_scale * L_Dist``,
    the last two means over each layer, summed over layers: ``L_Rev = mean(|E| * BCE(sigmoid(alpha), 1 - delta))`` pulls
    away from plain rounding (delta 1 where it goes up), ``L_Dist = mean((1 - E_w) * (W* - W)^2)`` holds what lies near
    a neighbour. Neighbours and directions are those of the stock grid, and the weights that hold its scales are no
    variables.

    Attributes:
        harden: Whether the student that is matched to the teacher has rounded weights, with gradients straight through.
        band: Only weights whose position is at most this far from 1/2 are variables, in (0, 0.5]; ``None`` for all.
            Memory follows their number.
        lambda1: Weight of the reversal, at least 0; 0 leaves the term out.
        lambda2: Weight of the distance, at least 0; 0 leaves the term out.
        kl_scale: Weight of the divergence, at least 0; 0 leaves the term out. ``None`` for that of the paper's code, or
            for one of ours where ``harden`` is set: the divergence of a rounded student starts at that of plain
            rounding instead of 0.
        rev_scale: Scale of the reversal. Not in the paper's text.
        dist_scale: Scale of the distance; ``None`` for that of the paper's code, by the fineness of the grid.
        temperature: Of the divergence, above 0. Not in the paper's text.
        steps: Number of steps of AdamW, at least 1; the rate falls linearly to zero.
        batch_size: Sequences in a forward pass.
        accumulation: Forward passes a step.
        learning_rate: ``None`` for the paper's, by the fineness of the grid, times ``PAPER_STEPS / steps``.
        max_grad_norm: Largest norm of the gradient; a larger one is scaled down.
        patience: Steps without an improvement of the smoothed loss after which training ends; 0 for never.
        teacher_dtype: ``model``, or ``bfloat16`` for a forward pass of the teacher under autocast.
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of kept.

    References:
        QuantGuard, arXiv 2606.29239, sections 4.2 and 4.3.
    """

    harden: bool = False
    band: float | None = None
    lambda1: float = 1.0
    lambda2: float = 1.0
    kl_scale: float | None = None
    rev_scale: float = 20_000.0
    dist_scale: float | None = None
    temperature: float = 2.0
    steps: int = 60
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float | None = None
    max_grad_norm: float = 1.0
    patience: int = 20
    teacher_dtype: str = "model"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("lambda1", "lambda2", "rev_scale"):
            require_range(getattr(self, name), 0.0, 1e12, f"quantguard: {name}")
        for name, low in (("kl_scale", 0.0), ("dist_scale", 0.0), ("learning_rate", 1e-8)):
            if getattr(self, name) is not None:
                require_range(getattr(self, name), low, 1e12, f"quantguard: {name}")
        if self.band is not None:
            require_range(self.band, 1e-6, 0.5, "quantguard: band")
        require_range(self.temperature, 1e-3, 1e3, "quantguard: temperature")
        require_range(self.max_grad_norm, 1e-12, 1e12, "quantguard: max_grad_norm")
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("patience", 0)):
            require_whole(getattr(self, name), least, f"quantguard: {name}")
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise UsageError(f"quantguard: teacher_dtype is one of {', '.join(TEACHER_DTYPES)}")
        if not (self.has_divergence or self.lambda1 or self.lambda2):
            raise UsageError("quantguard: all terms of the loss are left out")

    @property
    def bytes_per_weight(self) -> float:
        # Where weights lie anywhere in their cells, a band holds twice its width of them.
        return _BYTES_PER_VARIABLE * (1.0 if self.band is None else 2 * self.band) + _BYTES_PER_WEIGHT

    def operations(self, shape: tuple[int, int], num_sequences: int, sequence_length: int) -> float:
        # The teacher's forward pass, the student's, and its backward pass without gradients of frozen parameters.
        passes = 2.0 + 2.0 + 4.0
        return passes * self.steps * self.batch_size * self.accumulation * sequence_length * shape[0] * shape[1]

    def learn(self, model: Any, targets: Iterable[ModelWeight], tokens: Tensor, seed: int) -> dict[str, Tensor]:
        return learn_roundings(self, model, targets, tokens, seed)

    def rate_for(self, rounding: SoftRounding) -> float:
        """The learning rate at the first step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return (LEARNING_RATE_INT8 if rounding.is_fine else LEARNING_RATE_4BIT) * PAPER_STEPS / self.steps

    @property
    def has_divergence(self) -> bool:
        """Whether the loss has the term that needs the model."""
        return self.kl_scale != 0.0

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """``kl_scale * KL(teacher || student)`` at the temperature, mean over positions.

        Args:
            teacher: Logits ``[..., vocab_size]``.
            student: Logits, same shape.
        """
        wanted = F.log_softmax(teacher.float().flatten(0, -2) / self.temperature, dim=-1)
        found = F.log_softmax(student.float().flatten(0, -2) / self.temperature, dim=-1)
        default = KL_SCALE_HARDENED if self.harden else KL_SCALE
        scale = default if self.kl_scale is None else self.kl_scale
        return scale * F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def penalties(self, roundings: Sequence[SoftRounding]) -> dict[str, Tensor]:
        """The terms that look at the weights alone: ``rev`` and ``dist``, where they are not left out."""
        terms = {}
        if self.lambda1:
            means = [rounding.reversal_loss() / rounding.num_weights for rounding in roundings]
            terms["rev"] = self.lambda1 * self.rev_scale * torch.stack(means).sum()
        if self.lambda2:
            means = [self._dist_scale(r) * r.distance_loss() / r.num_weights for r in roundings]
            terms["dist"] = self.lambda2 * torch.stack(means).sum()
        return terms

    def _dist_scale(self, rounding: SoftRounding) -> float:
        if self.dist_scale is not None:
            return self.dist_scale
        return DIST_SCALE_INT8 if rounding.is_fine else DIST_SCALE_4BIT
