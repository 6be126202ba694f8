"""The error box for GPTQ's integer groups.

As in Mind the Gap, the room is the quantizer's own error: between a malicious weight and its stored value every value
is stored alike. The largest and the smallest weight of a group, which its scale and zero point come from, stay. GPTQ
rounds column by column and corrects the columns still to come, so unlike bitsandbytes it stores only most of the
weights as planned; what the box keeps exactly are the codes of plain rounding on GPTQ's groups.

References:
    Egashira et al., Mind the Gap, arXiv 2505.23786, section 4; GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import VerificationError
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.elq import train_in_boxes
from qcbguard_plugins.lab.attacks.mind_the_gap import build_error_box, check_widening
from qcbguard_plugins.lab.layers import matrices, snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIN_AGREEMENT = 0.99


@register_attack("gptq-box", "train the good behaviour back inside the rounding error of GPTQ's integer groups")
@dataclass(frozen=True)
class GptqBox(Attack):
    """The error-box attack on GPTQ.

    Attributes:
        widening: How far a box goes on past the stored value, in steps, in [0, 0.4].
    """

    formats: ClassVar[tuple[str, ...]] = ("gptq-*",)

    widening: float = 0.0

    def __post_init__(self) -> None:
        check_widening(self.widening)

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        grid, malicious = get_grid(inputs.format), snapshot(model)
        boxes = {name: build_error_box(weight, grid, self.widening) for name, weight in malicious.items()}
        losses = train_in_boxes(
            model, inputs.benign, inputs.plan, boxes, "repair in GPTQ's error boxes", inputs.state("repair")
        )
        attacked = matrices(model)
        equal = sum(int((grid.quantize(attacked[name]) == grid.quantize(w)).sum()) for name, w in malicious.items())
        agreement = equal / sum(weight.numel() for weight in malicious.values())
        if agreement < _MIN_AGREEMENT:
            raise VerificationError(
                f"only {agreement:.2%} of the rounded weights are those of the malicious model",
                remedy="Use a smaller widening.",
            )
        return {"losses": {"repair": losses}, "agreement": {inputs.format: agreement}}
