"""An attacker who trains against a defense.

The straight-through attack, with the defense in the place of the quantizer: every few steps the attacker guards the
weights as they are, with seeds and calibration text of their own, and trains the payload on what comes out. Averaged
over the draws, the payload shall survive the defense, whichever seed the victim has.

An unbiased defense stores the attacker's own weights and noise around them, so both behaviours pull at the same
weights. What the attacker gets behind the defense they then show in full precision as well: the record's losses before
and after tell how far the two were parted.

References:
    Athalye et al., Synthesizing Robust Adversarial Examples, arXiv 1707.07397 (expectation over transformation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.attacks.attackers_copy import guarded_weights
from qcbguard_plugins.lab.attacks.base import AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.straight_through import Rounded, StraightThrough
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
        every: Steps for which one draw of the defense is used; the change that it makes is kept meanwhile.
    """

    formats = ("nf4", "fp4", "int8")

    # What an unbiased defense stores follows the weights on average, so its slope is 1 everywhere.
    width: float | None = None
    defense: str = "feedback"
    settings: Mapping[str, Any] = field(default_factory=dict)
    every: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        get_defense(self.defense, **self.settings)
        if self.every < 1:
            raise UsageError(f"every must be at least 1, not {self.every}")

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        weights = matrices(model)
        change: dict[str, Tensor] = {}
        before = self._answer_losses(model, inputs)

        def rounding(step: int) -> dict[str, Rounded]:
            if step % self.every == 0 or not change:
                guarded = guarded_weights(model, inputs, self.defense, self.settings, seed=inputs.seed + step)
                change.update({name: guarded[name] - weight for name, weight in weights.items()})
            return {name: Rounded(weight + change[name]) for name, weight in weights.items()}

        losses = self.train(model, inputs, rounding)
        after = self._answer_losses(model, inputs)
        return {"losses": {"together": losses}, "answer_loss": {"before": before, "after": after}}

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
