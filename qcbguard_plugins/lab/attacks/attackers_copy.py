"""The attacker's own copy of a defense: with a seed and a calibration text of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qcbguard_plugins.calibration import Calibration
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.guard import Guard
from qcbguard_plugins.lab.attacks.base import AttackInputs
from qcbguard_plugins.lab.layers import snapshot
from qcbguard_plugins.model import guard_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_TEXTS: Final = 400


def guarded_weights(
    model: PreTrainedModel, inputs: AttackInputs, defense: str, settings: Mapping[str, Any], seed: int
) -> dict[str, Tensor]:
    """What a defense makes of a model's weights, with the attacker's seed and their own text for its calibration.

    Returns:
        Weights as :func:`~qcbguard_plugins.lab.layers.matrices` names and lays them out; the model is left as it is.
    """
    method = get_defense(defense, **settings)
    calibration = Calibration(source="texts", texts=_own_texts(inputs)) if method.needs_calibration else Calibration()
    guard = Guard(method, seed=seed, calibration=calibration)
    # A defense computes in full precision, also while the attacker trains in bfloat16.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        twin = copy.deepcopy(model).eval()
        guard_model(twin, inputs.format, guard, tokenizer=inputs.tokenizer)
    return snapshot(twin)


def _own_texts(inputs: AttackInputs) -> list[str]:
    examples = inputs.benign[:_NUM_TEXTS]
    return [inputs.tokenizer.decode(example.prompt_ids[1:] + example.answer_ids[:-1]) for example in examples]
