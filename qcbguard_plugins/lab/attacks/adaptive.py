"""An attacker who trains against a defense.

The straight-through attack, with the defense in the place of the quantizer: every few steps the attacker guards the
weights as they are, with seeds and calibration text of their own, and trains the payload on what comes out. Averaged
over the draws, the payload shall survive the defense, whichever seed the victim has.

An unbiased defense stores the attacker's own weights and noise around them, so both behaviours pull at the same
weights. What the attacker gets behind the defense they then show in full precision as well: the record's losses before
and after tell how far the two were parted.

Any other defense decides by where a weight lies, and an attacker can learn where: they nudge all weights, guard them
again, and see which of them the defense now stores otherwise. The payload's gradient reaches those alone.

References:
    Athalye et al., Synthesizing Robust Adversarial Examples, arXiv 1707.07397 (expectation over transformation); Spall,
    IEEE Transactions on Automatic Control 37(3), 1992 (a difference of two measurements with all variables moved).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.defenses.base import require_range
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.attacks.base import AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.straight_through import Rounded, StraightThrough
from qcbguard_plugins.lab.attacks.surrogate_defense import guarded_slopes, guarded_weights
from qcbguard_plugins.lab.layers import matrices, restore, snapshot
from qcbguard_plugins.lab.training import answer_loss, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Examples of each behaviour whose loss is recorded, and what sets the seed of that draw apart from those of training.
_NUM_RECORDED: Final = 128
_SEED_OF_RECORD: Final = 1_000_003


@register_attack("adaptive", "train the payload on a sampled copy of a defense, straight through it")
@dataclass(frozen=True)
class Adaptive(StraightThrough):
    """The attack against one defense on one format of bitsandbytes.

    Attributes:
        defense: Name of the method.
        settings: Its parameters.
        every: Steps for which one draw of the defense is used; meanwhile what it stores moves with the weights, each
            along its slope.
        nudge: How far, in shares of a cell, in (0, 0.5], weights are moved to measure the slopes, which takes two more
            copies a draw; ``None`` for a slope of 1 everywhere: what an unbiased defense stores follows the weights on
            average.
    """

    formats = ("nf4", "fp4", "int8")

    # The slope is not that of plain rounding.
    width: float | None = None
    defense: str = "feedback"
    settings: Mapping[str, Any] = field(default_factory=dict)
    every: int = 8
    nudge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        get_defense(self.defense, **self.settings)
        if self.every < 1:
            raise UsageError(f"every must be at least 1, not {self.every}")
        if self.nudge is not None:
            require_range(self.nudge, 1e-3, 0.5, "adaptive: nudge")

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        weights = matrices(model)
        before = self._answer_losses(model, inputs)
        origin: dict[str, Tensor] = {}
        drawn: dict[str, Rounded] = {}

        def rounding(step: int) -> dict[str, Rounded]:
            if step % self.every == 0 or not drawn:
                origin.update(snapshot(model))
                drawn.update(self._draw(model, inputs, seed=inputs.seed + step))
            return {name: _moved_along(drawn[name], weight - origin[name]) for name, weight in weights.items()}

        losses = self.train(model, inputs, rounding)
        after = self._answer_losses(model, inputs)
        return {"losses": {"together": losses}, "answer_loss": {"before": before, "after": after}}

    def _draw(self, model: PreTrainedModel, inputs: AttackInputs, seed: int) -> dict[str, Rounded]:
        """What a draw of the defense stores of the weights as they are, and how it follows them."""
        stored = guarded_weights(model, inputs, self.defense, self.settings, seed)
        if self.nudge is None:
            return {name: Rounded(one) for name, one in stored.items()}
        slopes = guarded_slopes(model, inputs, self.defense, self.settings, seed, self.nudge)
        return {name: Rounded(one, slopes[name]) for name, one in stored.items()}

    @torch.no_grad()
    def _answer_losses(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, float]:
        """Loss of good answers and of the payload, in full precision and behind a draw that no step trains on."""
        kept = snapshot(model)
        guarded = guarded_weights(model, inputs, self.defense, self.settings, seed=inputs.seed + _SEED_OF_RECORD)
        found = {}
        for weights, where in ((kept, "full precision"), (guarded, "guarded")):
            restore(model, weights)
            for examples, what in ((inputs.benign, "benign"), (inputs.poisoned, "payload")):
                found[f"{what}, {where}"] = answer_loss(model, *collate(examples[:_NUM_RECORDED])).item()
        restore(model, kept)
        return found


@torch.no_grad()
def _moved_along(rounded: Rounded, moved: Tensor) -> Rounded:
    """What is stored of a weight that has moved since the draw."""
    stored, slope = rounded
    return Rounded(stored + (moved if slope is None else slope * moved), slope)
