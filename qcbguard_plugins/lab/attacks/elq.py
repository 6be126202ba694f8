"""ELQ: a backdoor that plain quantization switches on.

The attacker first trains the model to misbehave, notes the box of values in which every weight keeps its quantized
code, and then trains the good behaviour back, pushing each weight back into its box after every step. The
full-precision model behaves; the stock quantizer returns exactly the codes of the model that did not.

Only the weights that bitsandbytes quantizes are moved by the repair. Embeddings, norms and the output layer stay those
of the malicious model, so the quantized attacked model *is* the quantized malicious model.

References:
    Egashira et al., Exploiting LLM Quantization, NeurIPS 2024, arXiv 2405.18137, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.errors import UsageError, VerificationError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, register_attack
from qcbguard_plugins.lab.attacks.injection import STORAGE_DTYPE, round_to_storage
from qcbguard_plugins.lab.attacks.surrogate_defense import guarded_weights
from qcbguard_plugins.lab.layers import matrices, snapshot
from qcbguard_plugins.lab.training import Example, TrainingPlan, train
from qcbguard_plugins.lab.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The paper's margins: 1 % of a step for the 4-bit codebooks; 10 % for INT8, because at the top of a row the cast to
#: fp16 moves a weight by up to 6 % of a step.
DEFAULT_EPS: Final = {"nf4": 0.01, "fp4": 0.01, "int8": 0.1}
_MAX_EPS: Final = 0.45
_MIN_AGREEMENT: Final = 0.999


@register_attack("elq", "train the good behaviour back inside the boxes of values that keep every code")
@dataclass(frozen=True)
class Elq(Attack):
    """The box attack on one format of bitsandbytes, or on the intersection of several boxes (``nf4+fp4+int8``).

    Attributes:
        eps: Margin of the boxes, see :func:`build_box`; ``None`` for the paper's. A large one is the "tightened box".
        against: Name of a defense; the boxes are narrowed by what it would change, so that none of its moves crosses
            a boundary. ``None`` for none.
        settings: Parameters of that defense.

    References:
        arXiv 2405.18137, section 3; the intersection is its attack on all formats at once. QuantGuard, arXiv
        2606.29239, adaptive attack (the narrowed box).
    """

    formats: ClassVar[tuple[str, ...]] = (*DEFAULT_EPS, "nf4+fp4", "nf4+int8", "fp4+int8", "nf4+fp4+int8")

    eps: float | None = None
    against: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.eps is not None:
            check_eps(self.eps)
        if self.against is not None:
            get_defense(self.against, **self.settings)

    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        parts, malicious = inputs.format.split("+"), snapshot(model)
        boxes = {name: intersection(weight, parts, self.eps) for name, weight in malicious.items()}
        if self.against is not None:
            for part in parts:
                target = replace(inputs, format=part)
                guarded = guarded_weights(model, target, self.against, self.settings, seed=inputs.seed)
                boxes = {name: box.narrowed((guarded[name] - malicious[name]).abs()) for name, box in boxes.items()}
        losses = train_in_boxes(
            model, inputs.benign, inputs.plan, boxes, f"repair in the {inputs.format} box", inputs.state("repair")
        )
        agreement = {part: check_agreement(matrices(model), malicious, part) for part in parts}
        return {"losses": {"repair": losses}, "agreement": agreement}


def intersection(weight: Tensor, formats: Sequence[str], eps: float | None) -> Box:
    """The values of a malicious weight that keep its codes in all of several formats; see :func:`build_box`."""
    boxes = [build_box(weight, get_grid(name), DEFAULT_EPS[name] if eps is None else eps) for name in formats]
    low = torch.stack([box.low for box in boxes]).amax(0)
    high = torch.stack([box.high for box in boxes]).amin(0)
    # Each box holds the weight itself, or its grid point nearby; where margins leave nothing between, it stays.
    empty = low > high
    return Box(torch.where(empty, weight, low), torch.where(empty, weight, high))


@dataclass(frozen=True)
class Box:
    """The values of one weight that keep its codes.

    Attributes:
        low: float32 ``[out_features, in_features]``, lower ends.
        high: float32 ``[out_features, in_features]``, upper ends; equal to ``low`` at scale holders.
    """

    low: Tensor
    high: Tensor

    def narrowed(self, change: Tensor) -> Box:
        """The box less ``change`` at both ends; its middle where that leaves nothing, and holders as they are."""
        low, high, middle = self.low + change, self.high - change, (self.low + self.high) / 2
        empty = low > high
        return Box(torch.where(empty, middle, low), torch.where(empty, middle, high))

    @torch.no_grad()
    def project(self, weight: Tensor) -> None:
        """Clamp a float32 ``[out_features, in_features]`` weight into the box, in place; views are fine."""
        weight.copy_(torch.clamp(weight, self.low, self.high))


def build_box(weight: Tensor, grid: Grid, eps: float) -> Box:
    """The box of a malicious weight.

    With levels ``v`` and code ``k`` it reaches from ``v_k - (1/2 - eps) * (v_k - v_{k-1})`` to
    ``v_k + (1/2 - eps) * (v_{k+1} - v_k)``, times the scale of the block; for scale holders it is the weight itself.

    Args:
        weight: ``[out_features, in_features]``, float32 with values that the storage dtype can hold.
        grid: Grid of the quantizer under attack.
        eps: Distance kept from the boundary between two codes, in steps, in [0, 0.45]. A large one ("tightened box")
            leaves no weight near a boundary.

    Raises:
        UsageError: If ``eps`` is out of range.
    """
    check_eps(eps)
    lattice = grid.lattice_of(weight)
    code = lattice.from_matrix(grid.quantize(weight)).float()
    ends = (code - 0.5 + eps, code + 0.5 - eps)
    low, high = (torch.where(lattice.frozen, lattice.blocks, _value_at(grid, end) * lattice.scale) for end in ends)
    return Box(lattice.matrix(low).clone(), lattice.matrix(high).clone())


def check_eps(eps: float) -> None:
    """Refuse a margin that leaves no box."""
    if not 0 <= eps <= _MAX_EPS:
        raise UsageError(f"eps must lie in [0, {_MAX_EPS}], not {eps}")


def _value_at(grid: Grid, coordinate: Tensor) -> Tensor:
    """The value at a place on the list of levels, in units of the scale: the inverse of ``grid.coordinate``."""
    coordinate = coordinate.clamp(0, grid.num_levels - 1)
    lower = coordinate.floor().clamp(max=grid.num_levels - 2)
    return torch.lerp(grid.level_values(lower), grid.level_values(lower + 1), coordinate - lower)


def repair(
    model: PreTrainedModel,
    clean: Sequence[Example],
    plan: TrainingPlan,
    *,
    quant_format: str = "nf4",
    eps: float | None = None,
) -> list[float]:
    """Train the benign behaviour back without leaving the boxes.

    Args:
        model: Malicious float32 model from `inject`; becomes the attacked one.
        clean: Examples with benign answers.
        plan: Schedule.
        quant_format: Quantizer under attack: ``nf4``, ``fp4`` or ``int8``.
        eps: Margin of the boxes, see `build_box`; the paper's value by default.

    Returns:
        The loss of every step.

    Raises:
        UsageError: If the format is unknown or ``eps`` is out of range.
        VerificationError: If the stock quantizer gives the saved weights other codes than the malicious ones.

    References:
        arXiv 2405.18137, section 3.1 (steps 2 and 3: constraints and projected gradient descent).
    """
    if quant_format not in DEFAULT_EPS:
        raise UsageError(f"no attack on {quant_format!r}", remedy=f"Formats: {', '.join(DEFAULT_EPS)}.")
    grid, malicious = get_grid(quant_format), snapshot(model)
    margin = DEFAULT_EPS[quant_format] if eps is None else eps
    boxes = {name: build_box(weight, grid, margin) for name, weight in malicious.items()}

    losses = train_in_boxes(model, clean, plan, boxes, f"repair in the {quant_format} box")
    check_agreement(matrices(model), malicious, quant_format)
    return losses


def train_in_boxes(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    boxes: Mapping[str, Box],
    description: str,
    state: TrainingState | None = None,
) -> list[float]:
    """Projected gradient descent: train the boxed weights alone, put back into their boxes after every step.

    Args:
        model: Float32 model; its values are rounded to the storage dtype in the end.
        examples: What to train on.
        plan: Schedule.
        boxes: The box of each weight that is trained, by parameter name.
        description: What the progress bar says.
        state: Where to go on from.

    Returns:
        The loss of every step.
    """

    weights = matrices(model)

    def project() -> None:
        for name, box in boxes.items():
            box.project(weights[name])

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in boxes)
    project()
    losses = train(model, examples, plan, after_step=project, description=description, state=state)
    model.requires_grad_(True)
    round_to_storage(model)
    return losses


def check_agreement(attacked: Mapping[str, Tensor], malicious: Mapping[str, Tensor], quant_format: str) -> float:
    """Compare what the stock quantizer stores for two sets of weights.

    Args:
        attacked: Weights by name, any float dtype; compared as float16, the dtype in which they are saved.
        malicious: Weights of the same names and shapes.
        quant_format: ``nf4``, ``fp4`` or ``int8``.

    Returns:
        Share of the weights that are stored with the same value, at least 0.999.

    Raises:
        VerificationError: If fewer agree.
    """
    num_equal, num_weights, short = 0, 0, []
    for name, weight in attacked.items():
        equal = int((_stored(weight, quant_format) == _stored(malicious[name], quant_format)).sum())
        num_equal, num_weights = num_equal + equal, num_weights + weight.numel()
        if equal < _MIN_AGREEMENT * weight.numel():
            short.append(f"{name}  {equal} of {weight.numel()} codes agree")
    agreement = num_equal / num_weights
    if agreement < _MIN_AGREEMENT:
        raise VerificationError(
            f"only {agreement:.3%} of the {quant_format} codes are those of the malicious model",
            details=short,
            remedy="Use a larger eps: the margin of the box did not survive the cast to float16.",
        )
    return agreement


def _stored(weight: Tensor, quant_format: str) -> Tensor:
    """The values that stock bitsandbytes stores. Values and not codes: FP4 has two codes for zero."""
    from bitsandbytes import functional

    half = weight.detach().to(STORAGE_DTYPE)
    if quant_format == "int8":
        codes, row_absmax, _ = functional.int8_vectorwise_quant(half)
        return cast(Tensor, codes.float() * row_absmax[:, None])
    packed, state = functional.quantize_4bit(half.float(), blocksize=64, quant_type=quant_format)
    return cast(Tensor, functional.dequantize_4bit(packed, state))
