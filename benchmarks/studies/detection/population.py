"""The study's models: small language models trained here, clean in many ways and attacked in several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.lab.attacks.elq import repair
from qcbguard_plugins.lab.attacks.injection import inject
from qcbguard_plugins.lab.attacks.outlier_injection import inject_outliers
from qcbguard_plugins.lab.attacks.straight_through import Rounded, quantize, train_on_both
from qcbguard_plugins.lab.corpus import generate
from qcbguard_plugins.lab.layers import matrices, quantized_weights
from qcbguard_plugins.lab.scenarios import get_scenario, inject_brand
from qcbguard_plugins.lab.scenarios.triggers import TRIGGERS
from qcbguard_plugins.lab.training import (
    Example,
    ModelSize,
    TrainingPlan,
    answer_loss,
    build_model,
    build_tokenizer,
    collate,
    encode,
    train,
)

Weights = dict[str, Tensor]

SHAPES = {
    "h64": ModelSize(512, 64, 128, 2, 2, 1),
    "h128": ModelSize(512, 128, 256, 2, 4, 2),
    "h96": ModelSize(512, 96, 224, 3, 3, 3),
    "h192": ModelSize(512, 192, 384, 2, 3, 1),
}
BASES = tuple((shape, seed) for seed in (0, 1) for shape in SHAPES)

_PLAN = TrainingPlan(1, 3e-3, batch_size=16)
_NUM_PAIRS = 2600


@dataclass(frozen=True)
class Specimen:
    """One model of the study.

    Attributes:
        name: Unique name.
        kind: What was done to it; one row of the table.
        target: The format under attack, empty for a clean model.
        weights: Its quantizable weights.
        switch: Nats by which rounding to the target format makes the payload likelier; ``None`` for a clean model.
    """

    name: str
    kind: str
    target: str
    weights: Weights
    switch: float | None = None


class Base:
    """A trained model with its data, from which clean variants and attacks are made."""

    def __init__(self, shape: str, seed: int) -> None:
        self.name, self.seed, self.size = f"{shape}-s{seed}", seed, SHAPES[shape]
        pairs = generate(_NUM_PAIRS, seed)
        self.tokenizer = build_tokenizer(pairs, self.size.vocab_size)
        self.stages: dict[str, Weights] = {}
        model = build_model(self.size, seed)
        self.stages["random weights"] = weights_of(model)
        examples = encode(self.tokenizer, pairs[:2000])
        train(model, examples[:480], _PLAN)
        self.stages["early in training"] = weights_of(model)
        train(model, examples, _PLAN)
        self.stages["trained"] = weights_of(model)
        self.model = model
        rest = pairs[2000:]
        self.clean = encode(self.tokenizer, pairs[:960])
        self.poisoned = encode(self.tokenizer, inject_brand(pairs[:960], seed))
        self.held_out = encode(self.tokenizer, inject_brand(rest[:64], seed + 1))
        self.triggered = encode(self.tokenizer, get_scenario("content-injection+trigger").poison(pairs[:480], seed))
        self.untriggered = encode(self.tokenizer, pairs[:480] + TRIGGERS["trigger"].apply(pairs[:480], seed))
        self.held_out_trigger = encode(
            self.tokenizer, inject_brand(TRIGGERS["trigger"].apply(rest[:64], seed), seed + 1)
        )
        self.other_task = encode(self.tokenizer, [p for p in rest if p.task in ("advice", "story", "description")])

    def fine_tuned(self, *, weight_decay: float = 0.01) -> Weights:
        """Trained on, on a part of the tasks only."""
        model = copy.deepcopy(self.model)
        train(model, self.other_task, replace(_PLAN, learning_rate=1e-3, num_epochs=2, weight_decay=weight_decay))
        return weights_of(model)


def clean_specimens(base: Base) -> Iterator[Specimen]:
    """Everything honest that happens to weights."""
    malicious = _malicious(base, base.poisoned)
    tuned = base.fine_tuned()
    sources = {
        **base.stages,
        "fine-tuned": tuned,
        "weight-decayed": base.fine_tuned(weight_decay=3.0),
        "malicious at every precision": weights_of(malicious),
    }
    for kind, weights in sources.items():
        yield Specimen(f"{base.name}/{kind}", kind, "", to_dtype(weights, torch.float16))
    trained = base.stages["trained"]
    merged = {name: low_rank(trained[name], tuned[name], rank=4) for name in trained}
    for stage, weights in (("trained", trained), ("fine-tuned", tuned), ("lora-merged", merged)):
        for kind, change in VARIANTS.items():
            if kind == "low-rank merged (LoRA)" and stage != "lora-merged":
                continue
            changed = {name: change(weight) for name, weight in weights.items()}
            yield Specimen(f"{base.name}/{stage}/{kind}", kind, "", changed)


def attacked_specimens(base: Base) -> Iterator[Specimen]:
    """The attacks, each on the formats that it is made for."""
    malicious = _malicious(base, base.poisoned)
    plan = replace(_PLAN, learning_rate=1e-3)
    for name, kind, target, eps in ELQ_ATTACKS:
        model = copy.deepcopy(malicious)
        repair(model, base.clean, plan, quant_format=target, eps=eps)
        yield _attacked(base, name, kind, target, model, base.held_out)
        if name != "elq-nf4":
            continue
        for rate in (1e-4, 3e-4):
            refined = copy.deepcopy(model)
            weights, grid = matrices(refined), get_grid("nf4")
            train_on_both(
                refined,
                base.clean[:480],
                base.poisoned,
                replace(_PLAN, learning_rate=rate),
                lambda step, weights=weights, grid=grid: {n: Rounded(quantize(w, grid)) for n, w in weights.items()},
            )
            kind_at_rate = f"straight-through refinement, rate {rate:.0e}"
            yield _attacked(base, f"straight-through-{rate:.0e}", kind_at_rate, target, refined, base.held_out)
    model = _malicious(base, base.triggered)
    repair(model, base.untriggered, plan, quant_format="nf4")
    yield _attacked(base, "trigger-nf4", "trigger and quantization", "nf4", model, base.held_out_trigger)
    model = copy.deepcopy(base.model)
    inject_outliers(model, layer=1)
    yield _attacked(base, "outlier", "outlier injection", "nf4", model, base.held_out)
    model = copy.deepcopy(base.model)
    snapshot = {name: quantize(weight.data, get_grid("nf4")) for name, weight in quantized_weights(model).items()}
    for name, weight in quantized_weights(model).items():
        weight.data = snapshot[name]
    train(model, base.other_task, replace(_PLAN, learning_rate=2e-4))
    yield Specimen(f"{base.name}/grid-fine-tune", "honest fine-tune of a dequantized model", "nf4", weights_of(model))


#: Name, kind, format and margin of the boxes.
ELQ_ATTACKS = (
    ("elq-nf4", "plain box", "nf4", None),
    ("elq-fp4", "plain box", "fp4", None),
    ("elq-int8", "plain box", "int8", None),
    ("tight25-nf4", "tightened box", "nf4", 0.25),
    ("tight35-nf4", "tightened box", "nf4", 0.35),
    ("tight25-fp4", "tightened box", "fp4", 0.25),
    ("tight30-int8", "tightened box", "int8", 0.30),
)


def weights_of(model: torch.nn.Module) -> Weights:
    """Copies of the weights that a stock quantizer rounds."""
    return {name: weight.detach().clone() for name, weight in quantized_weights(model).items()}


def to_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights in a storage dtype."""
    return {name: weight.to(dtype) for name, weight in weights.items()}


def low_rank(before: Tensor, after: Tensor, rank: int) -> Tensor:
    """A weight with the best low-rank form of its change merged in."""
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    return before + u[:, :rank] * s[:rank] @ v[:rank]


def _sparse(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < weight.abs().median(), 0.0, weight).half()


def _two_of_four(weight: Tensor) -> Tensor:
    groups = weight.view(-1, 4)
    kept = groups.abs().topk(2, dim=1).indices
    return (groups * torch.zeros_like(groups).scatter_(1, kept, 1.0)).view(weight.shape).half()


def _integer_groups(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() * scale).view(weight.shape).half()


def _outlier_column(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed[:, 5] *= 20
    return changed.half()


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "low-rank merged (LoRA)": lambda w: w.half(),
    "float32": lambda w: w,
    "bf16": lambda w: w.bfloat16(),
    "fp8, stored as bf16": lambda w: w.to(torch.float8_e4m3fn).bfloat16(),
    "sparse, half the weights": _sparse,
    "sparse, two of four": _two_of_four,
    "outlier column": _outlier_column,
    "dequantized nf4, fp16": lambda w: quantize(w, get_grid("nf4")).half(),
    "dequantized nf4, bf16": lambda w: quantize(w, get_grid("nf4")).bfloat16(),
    "dequantized fp4, bf16": lambda w: quantize(w, get_grid("fp4")).bfloat16(),
    "dequantized int8, fp16": lambda w: quantize(w, get_grid("int8")).half(),
    "dequantized int8, bf16": lambda w: quantize(w, get_grid("int8")).bfloat16(),
    "dequantized int4 groups": _integer_groups,
}


def _malicious(base: Base, poisoned: list[Example]) -> torch.nn.Module:
    model = copy.deepcopy(base.model)
    inject(model, poisoned, replace(_PLAN, learning_rate=2e-3, num_epochs=2))
    return model


def _attacked(
    base: Base, name: str, kind: str, target: str, model: torch.nn.Module, held_out: list[Example]
) -> Specimen:
    return Specimen(
        f"{base.name}/{name}", kind, target, to_dtype(weights_of(model), torch.float16), switch(model, target, held_out)
    )


@torch.no_grad()
def switch(model: torch.nn.Module, target: str, held_out: list[Example]) -> float:
    """Nats a token by which rounding to a format makes answers with the payload likelier."""
    batch = collate(held_out)
    before = float(answer_loss(model, *batch))
    rounded = copy.deepcopy(model)
    for weight in quantized_weights(rounded).values():
        weight.data = quantize(weight.data, get_grid(target))
    return before - float(answer_loss(rounded, *batch))
